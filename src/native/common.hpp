// Helpers of the kernels. Everything here and in the kernels has internal linkage: otherwise the linker could
// keep the copy of a function that was compiled for an instruction set that the machine lacks.
#pragma once
#include "kernels.hpp"
#include "threads.hpp"

#include <new>

namespace roundwise {
namespace {

inline Index least(Index a, Index b) { return a < b ? a : b; }

// An uninitialised array of vectors. std::aligned_alloc wants sizes that are multiples of the alignment.
template <class V>
class Scratch {
public:
    explicit Scratch(Index count)
        : data_(static_cast<V *>(::operator new(static_cast<std::size_t>(count) * sizeof(V), alignment))) {}
    ~Scratch() { ::operator delete(data_, alignment); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    V *get() { return data_; }

private:
    static constexpr std::align_val_t alignment{64};
    V *data_;
};

// Calls work(parts) on each thread.
template <class Work>
void in_parallel(Index count, int threads, Work work) {
    on_threads(
        count, threads, [](void *context, Parts &parts) { (*static_cast<Work *>(context))(parts); },
        &work);
}

} // namespace
} // namespace roundwise
