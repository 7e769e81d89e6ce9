#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace roundwise {
namespace {

std::atomic<RunOnTeam> team{nullptr};

struct Job {
    Parts parts;
    void (*work)(void *, Parts &);
    void *context;
    std::atomic<bool> failed{false};
};

void take_part(void *data) {
    Job &job = *static_cast<Job *>(data);
    try {
        job.work(job.context, job.parts);
    } catch (const std::bad_alloc &) {
        job.failed = true;
    }
}

} // namespace

void use_team(RunOnTeam run) { team = run; }

void on_threads(std::int64_t count, int threads, void (*work)(void *, Parts &), void *context) {
    Job job{Parts(count), work, context};
    const int wanted = static_cast<int>(std::min<std::int64_t>(threads, count));
    const RunOnTeam run = team;
    if (wanted <= 1) {
        take_part(&job);
    } else if (run != nullptr) {
        run(take_part, &job, static_cast<unsigned>(wanted), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < wanted; ++i) {
            try {
                others.emplace_back(take_part, &job);
            } catch (const std::system_error &) {
                break; // no further thread can be started: those that run do all the work
            }
        }
        take_part(&job);
        for (auto &other : others) other.join();
    }
    if (job.failed) throw std::bad_alloc();
}

} // namespace roundwise
