// Who may work on a plan.
#pragma once

#include "step_plan.h"

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

// One thread at a time works on a plan. A second one waits, without the GIL; Python code that is
// called from inside a step and steps the same optimizer again gets an error instead of a deadlock.
class StepPlan::Turn {
 public:
  explicit Turn(StepPlan& plan) : plan_(plan) {
    if (plan.owner_.load() == std::this_thread::get_id()) {
      throw std::runtime_error("step() was called from inside a step() of the same optimizer");
    }
    if (!plan.mutex_.try_lock()) {
      const GilReleased released(true);
      plan.mutex_.lock();
    }
    plan.owner_ = std::this_thread::get_id();
  }
  ~Turn() {
    plan_.owner_ = std::thread::id();
    plan_.mutex_.unlock();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  StepPlan& plan_;
};

}  // namespace momentum_ext::binding
