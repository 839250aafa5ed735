// The memory limit: how fast can this machine read p, g, m and write p, m, doing as little else as
// possible?
//
// One loop, no tensors, no optimizer, compiled for the machine at hand. Its threads are those of
// the OpenMP runtime that torch has already loaded (GOMP_parallel is what `#pragma omp parallel`
// turns into): a second pool would compete with it.

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
}

namespace {

constexpr int kMaxThreads = 1024;

struct Job {
  float* param;
  const float* grad;
  float* momentum_buffer;
  int64_t numel;
  float momentum;
  float lr;
};

int64_t thread_ids[kMaxThreads];  // the system's ids of the threads that ran the last step

void step_slice(const Job& job, int64_t begin, int64_t end) {
  float* __restrict__ p = job.param;
  const float* __restrict__ g = job.grad;
  float* __restrict__ m = job.momentum_buffer;
  const float momentum = job.momentum;
  const float lr = job.lr;
  for (int64_t i = begin; i < end; ++i) {
    m[i] = momentum * m[i] + g[i];
    p[i] -= lr * m[i];
  }
}

void run_one_thread(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  const int64_t thread = omp_get_thread_num();
  const int64_t threads = omp_get_num_threads();
  thread_ids[thread] = syscall(SYS_gettid);
  step_slice(job, job.numel * thread / threads, job.numel * (thread + 1) / threads);
}

}  // namespace

// 1 where torch's OpenMP runtime was found, else 0.
extern "C" int memory_limit_has_openmp() {
  return GOMP_parallel && omp_get_thread_num && omp_get_num_threads;
}

// One pass over numel elements on `threads` threads (1 to kMaxThreads).
extern "C" void memory_limit_step(float* param, const float* grad, float* momentum_buffer,
                                  int64_t numel, float momentum, float lr, int threads) {
  Job job = {param, grad, momentum_buffer, numel, momentum, lr};
  if (threads > 1) {
    GOMP_parallel(run_one_thread, &job, static_cast<unsigned>(threads), 0);
  } else {
    thread_ids[0] = syscall(SYS_gettid);
    step_slice(job, 0, numel);
  }
}

// How many different threads have run steps since the last call, which forgets them.
extern "C" int memory_limit_threads_seen() {
  int different = 0;
  for (int i = 0; i < kMaxThreads; ++i) {
    bool is_new = thread_ids[i] != 0;
    for (int j = 0; j < i; ++j) is_new = is_new && thread_ids[j] != thread_ids[i];
    different += is_new;
  }
  for (int64_t& id : thread_ids) id = 0;
  return different;
}
