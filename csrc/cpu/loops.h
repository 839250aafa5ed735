// All loops of an instruction set, in the order in which they build on each other.
#include "transpose.h"
//
#include "tiles.h"
//
#include "random.h"
//
#include "blocks.h"
//
#include "slots.h"
//
#include "loop.h"
//
#include "move_loop.h"
//
#include "count_loop.h"
//
#include "norm_loop.h"

#define MOMENTUM_EXT_STEP(Rule) {run_step<Rule>},
constexpr Loops kLoops = {MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_STEP){
    run_move<false>,
    run_move<true>,
    run_count,
    {run_norm<Norm::kSumOfSquares>, run_norm<Norm::kSumOfAbs>, run_norm<Norm::kMax>}}};
#undef MOMENTUM_EXT_STEP
