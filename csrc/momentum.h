// What a backend offers. No torch here: raw pointers, sizes and numbers.
#pragma once

#include <string>
#include <vector>

#include "tensor_table.h"

namespace momentum_ext::cpu {

// Updates every tensor of the table in one parallel region of at most max_threads threads. Entries
// must not overlap in memory, except that a gradient may be its own parameter.
void step(const TensorTable& table, int max_threads);

// The instruction sets that this build has and this machine can run, best first; which one step()
// uses; and a choice by name, which throws std::invalid_argument for a name that is not in the
// list.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);

// False when no OpenMP runtime was found in the process: step() then runs on the calling thread.
bool has_threads();

}  // namespace momentum_ext::cpu
