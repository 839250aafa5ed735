// All rules. What is compiled for each of them, the CPU's loops, the CUDA kernels and the binding's groups, takes them from
// here: adding a rule is its header and a line.
#pragma once

#include "adam.h"
#include "nadam.h"
#include "sgd.h"

#define MOMENTUM_EXT_FOR_EACH_RULE(visit) visit(Sgd) visit(Adam) visit(NAdam)
