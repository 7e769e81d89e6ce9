#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace roundwise {

void on_threads(std::int64_t count, int threads, void (*work)(void *, Parts &), void *context) {
    Parts parts(count);
    std::atomic<bool> failed{false};
    auto body = [&] {
        try {
            work(context, parts);
        } catch (const std::bad_alloc &) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < std::min<std::int64_t>(threads, count); ++i) {
        try {
            others.emplace_back(body);
        } catch (const std::system_error &) {
            break; // no further thread to be had: those there are do all the work
        }
    }
    body();
    for (auto &other : others) other.join();
    if (failed) throw std::bad_alloc();
}

} // namespace roundwise
