// What the CPU backend offers. No torch here: raw pointers, sizes and numbers.
#pragma once

#include <string>
#include <vector>

#include "../rules/clip.h"
#include "../rules/sgd.h"
#include "../table.h"

namespace momentum_ext::cpu {

// Updates every tensor of the table in one parallel region of at most max_threads threads. Entries
// must not overlap in memory, except that a gradient may be its own parameter.
template <typename Rule>
void step(const StepTable<Rule>& table, int max_threads);

// Moves parameters that were trained with Nesterov from the look-ahead point to the iterate and
// back. Entries have a momentum buffer; grad is a tensor that keeps the look-ahead point in
// between, and a group's momentum the distance. The way back restores the very bits of what was not
// changed.
void move_to_iterate(const StepTable<Sgd>& table, int max_threads);
void move_to_lookahead(const StepTable<Sgd>& table, int max_threads);

// Adds to each entry's UpdateCounts, whose place is its average; writes nothing else. Entries have
// a low_precision, and a grad that may be any tensor where the rule needs none.
void count_updates(const StepTable<Sgd>& table, int max_threads);

constexpr int64_t kNormBlock = 16384;  // elements

// Elements are multiplied by `scale` first (sum of squares only). The table's entries have grad,
// numel, grad_dtype and layout; its first_element is the prefix sum of the number of blocks of
// kNormBlock elements, and block_norms has a place for each. The result has the same bits for every
// number of threads. A NaN anywhere makes it NaN.
double norm(Norm kind, const TensorTable& table, double scale, double* block_norms,
            int max_threads);

// A parallel region has at least this many elements for each of its threads.
void set_elements_per_thread(int64_t count);

// The instruction sets that this build has and this machine can run, best first; which one step()
// uses; and a choice by name, which throws std::invalid_argument for a name that is not in the
// list.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);

// False when no OpenMP runtime was found in the process: step() then runs on the calling thread.
bool has_threads();

}  // namespace momentum_ext::cpu
