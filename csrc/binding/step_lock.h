// Who may work on a plan.
#pragma once

#include <Python.h>

#include <atomic>
#include <cstdint>
#include <semaphore>
#include <stdexcept>
#include <utility>

namespace momentum_ext::binding {

class GilReleased {
 public:
  explicit GilReleased(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~GilReleased() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

// One step at a time works on a plan.
class StepMutex {
 public:
  // A second thread waits, without the GIL. Python code that is called from inside a step and steps
  // the same optimizer again gets an error instead of a deadlock.
  void lock() {
    if (owner_.load() == this_thread()) {
      throw std::runtime_error(
          "called from inside a step() of the same optimizer, which must finish first");
    }
    if (!free_.try_acquire()) {
      const GilReleased released(true);
      free_.acquire();
    }
    owner_ = this_thread();
  }
  void unlock() {
    owner_ = 0;
    free_.release();
  }

 private:
  // Not the system's id, which a later thread may get again.
  static uint64_t this_thread() {
    static std::atomic<uint64_t> count{0};
    static thread_local const uint64_t number = ++count;
    return number;
  }

  // Unlike a mutex, any thread may release it: a step may be destroyed in another.
  std::binary_semaphore free_{1};
  std::atomic<uint64_t> owner_{0};
};

// Holds the mutex as long as it lives.
class StepLock {
 public:
  explicit StepLock(StepMutex& mutex) : mutex_(&mutex) { mutex.lock(); }
  StepLock(StepLock&& other) noexcept : mutex_(std::exchange(other.mutex_, nullptr)) {}
  ~StepLock() {
    if (mutex_ != nullptr) mutex_->unlock();
  }
  StepLock& operator=(StepLock&&) = delete;

 private:
  StepMutex* mutex_;
};

}  // namespace momentum_ext::binding
