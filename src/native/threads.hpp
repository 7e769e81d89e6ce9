// Runs the parts of a job on several threads: those of an OpenMP runtime that is loaded already, such as
// torch's, whose idle threads would otherwise spin beside ours; else threads that live as long as the call.
#pragma once
#include <cstdint>

namespace roundwise {

// Hands out 0 … count - 1, each once, over all threads; then -1.
class Parts {
public:
    explicit Parts(std::int64_t count) : count_(count) {}
    std::int64_t next() {
        const std::int64_t mine = __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED);
        return mine < count_ ? mine : -1;
    }

private:
    std::int64_t count_, taken_ = 0;
};

// GOMP_parallel of an OpenMP runtime: calls work(data) on `threads` threads and waits for them.
typedef void (*RunOnTeam)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
void use_team(RunOnTeam run);

// Calls work(context, parts) on up to `threads` threads, this one included, and waits for all.
// Throws std::bad_alloc if one of them did.
void on_threads(std::int64_t count, int threads, void (*work)(void *, Parts &), void *context);

} // namespace roundwise
