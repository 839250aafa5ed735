// The memory limit: how fast can this machine move the bytes of one pass, doing as little else as
// possible?
//
// The pass is given to the compiler as bytes for each element: -DUPDATED=4,4 are arrays that are
// read and written (parameter, momentum), -DREAD=4 those only read (the gradient); -DREAD_BEFORE=1
// reads the latter once more, in a loop of its own before (a norm of all gradients).
//
// No tensors, no optimizer, compiled for the machine at hand. The threads are those of the OpenMP
// runtime that torch has already loaded (GOMP_parallel is what `#pragma omp parallel` turns into):
// a second pool would compete with it.

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
constexpr int kSums = 4;  // independent, so that no addition waits for the one before

// Elements are taken 64 at a time: a cache line of each array whose elements have a byte.
using Line = float __attribute__((vector_size(64), aligned(4), may_alias));

template <int... kBytes>
struct Arrays {};

using Updated = Arrays<UPDATED>;
using Read = Arrays<READ>;

struct Job {
  float* const* arrays;  // the updated ones, then those only read
  int64_t lines;         // of 64 elements
  bool before;           // only read
};

int64_t thread_ids[kMaxThreads];  // the system's ids of the threads that ran the last step
Line results[kMaxThreads];        // so that no reading is left out

template <int kBytes>
inline void read(const float* array, int64_t line, Line (&sums)[kSums]) {
  const Line* x = reinterpret_cast<const Line*>(array) + line * kBytes;
  for (int i = 0; i < kBytes; ++i) sums[i % kSums] += x[i];
}

template <int kBytes>
inline void update(float* array, int64_t line, const Line (&sums)[kSums]) {
  Line* x = reinterpret_cast<Line*>(array) + line * kBytes;
  for (int i = 0; i < kBytes; ++i) x[i] = x[i] * 0.5f + sums[i % kSums];
}

template <int... kUpdated, int... kRead>
void run_slice(const Job& job, int64_t begin, int64_t end, int64_t thread, Arrays<kUpdated...>,
               Arrays<kRead...>) {
  if (job.before) {
    Line sums[kSums] = {};
    for (int64_t line = begin; line < end; ++line) {
      float* const* array = job.arrays + sizeof...(kUpdated);
      (read<kRead>(*array++, line, sums), ...);
    }
    results[thread] = sums[0] + sums[1] + sums[2] + sums[3];
    return;
  }
  for (int64_t line = begin; line < end; ++line) {
    Line sums[kSums] = {};
    float* const* array = job.arrays + sizeof...(kUpdated);
    (read<kRead>(*array++, line, sums), ...);
    array = job.arrays;
    (update<kUpdated>(*array++, line, sums), ...);
  }
}

void run_one_thread(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  const int64_t thread = omp_get_thread_num();
  const int64_t threads = omp_get_num_threads();
  thread_ids[thread] = syscall(SYS_gettid);
  run_slice(job, job.lines * thread / threads, job.lines * (thread + 1) / threads, thread,
            Updated(), Read());
}

void run(Job job, int threads) {
  if (threads > 1) {
    GOMP_parallel(run_one_thread, &job, static_cast<unsigned>(threads), 0);
  } else {
    thread_ids[0] = syscall(SYS_gettid);
    run_slice(job, 0, job.lines, 0, Updated(), Read());
  }
}

}  // namespace

// 1 where torch's OpenMP runtime was found, else 0.
extern "C" int memory_limit_has_openmp() {
  return GOMP_parallel && omp_get_thread_num && omp_get_num_threads;
}

// One pass over 64 * lines elements on `threads` threads (1 to kMaxThreads).
extern "C" void memory_limit_pass(float* const* arrays, int64_t lines, int threads) {
  if (READ_BEFORE) run({arrays, lines, true}, threads);
  run({arrays, lines, false}, threads);
}

// How many different threads have run passes since the last call, which forgets them.
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
