// All loops of an instruction set, in the order in which they build on each other.
#include "transpose.h"
//
#include "tiles.h"
//
#include "slots.h"
//
#include "loop.h"
//
#include "move_loop.h"
//
#include "norm_loop.h"

constexpr Loops kLoops = {
    run_step,
    run_move<false>,
    run_move<true>,
    {run_norm<Norm::kSumOfSquares>, run_norm<Norm::kSumOfAbs>, run_norm<Norm::kMax>}};
