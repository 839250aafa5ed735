// One parallel region on the OpenMP threads that torch itself uses.
//
// A second pool of threads would compete with torch's, whose workers spin for milliseconds after
// each of its own regions. So this file has no OpenMP pragma, which would bind to the compiler's
// runtime: it calls the runtime that torch has loaded into the process, through the entry point
// that GNU's and LLVM's libraries both export. It therefore needs no -fopenmp and works alike with
// g++ and clang++.
#pragma once

#include <pthread.h>

#include <atomic>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads,
                                         unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
}

namespace momentum_ext::cpu {

inline bool has_thread_team() {
  return GOMP_parallel != nullptr && omp_get_thread_num != nullptr &&
         omp_get_num_threads != nullptr;
}

// A forked child has inherited the runtime's record of its threads but not the threads: waiting for
// them would hang.
inline std::atomic<bool> is_forked_child{false};
inline const int fork_handler = pthread_atfork(
    nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });

// Calls task(i) once for each i in [0, num_tasks), each on its own thread where the runtime grants
// as many. Always asks for the whole team: a runtime may end threads that a smaller team leaves
// over, and would have to start them again for torch's next region.
template <typename Task>
void run_on_team(int num_tasks, int team_size, const Task& task) {
  struct Region {
    int num_tasks;
    const Task* task;
  } region{num_tasks, &task};
  GOMP_parallel(
      [](void* data) {
        const auto& r = *static_cast<const Region*>(data);
        const int num_threads = omp_get_num_threads();
        for (int i = omp_get_thread_num(); i < r.num_tasks; i += num_threads) (*r.task)(i);
      },
      &region, static_cast<unsigned>(team_size), 0);
}

}  // namespace momentum_ext::cpu
