// Slots with companions: what the kernels read of a parameter's master and of a state's scales, and
// the count of steps that random rounding depends on.
#pragma once

#include "plan.h"
#include "state_format.h"

namespace momentum_ext::binding {

// By its dtype in the state.
Master kind_of_master(at::ScalarType dtype);

// After a slot was examined and has its entry: what the kernels read, and what the next step
// compares.
void attach_companions(Plan& plan, size_t i, const at::Tensor& param, const StartingState& start);

// True when a slot's companions are as they were; they are then those of this step.
bool find_companions(Plan& plan, size_t i) noexcept;

// Once all slots are prepared: what the devices' random numbers depend on. Raises where a captured
// step would be the first to need it.
void count_for_rounding(Plan& plan, std::vector<DeviceShare>& shares);

}  // namespace momentum_ext::binding
