// The kernels' way into the format of roots and out of it, by steps of the rule that there is: momentum
// of 0 and a gradient that are the values, then momentum of 1 and a gradient of 0.
#include <cstring>
#include <string>

#include "../../csrc/cpu/backend.h"

using namespace momentum_ext;

namespace {

struct Run {
  int64_t n;
  const float* grad;
  float* param;
  uint8_t* codes;
  ScaleBits* scales;
};

void step(const Run& run, bool is_first, bool at_random, uint64_t seed, uint32_t number) {
  LowPrecision low{};
  low.scale[0] = run.scales;
  TensorEntry entry{};
  entry.param = run.param;
  entry.grad = run.grad;
  entry.state[0] = run.codes;
  entry.low_precision = &low;
  entry.numel = run.n;
  entry.param_dtype = entry.grad_dtype = Dtype::kFloat32;
  entry.state_dtype[0] = Dtype::kUInt8Root;
  entry.is_first_step = is_first;
  Hyperparams<Sgd> h;
  h.has_momentum = true;
  h.f64 = {1, 0, 1, 1, 1, 1, is_first ? 0.0 : -1.0};
  round_to_float(h);
  h.stochastic_rounding = at_random;
  h.rounding_seed = seed;
  const int64_t first_element[] = {0, run.n};
  cpu::step<Sgd>({{&entry, first_element, 1}, &h, 0, number}, 1);
}

}  // namespace

extern "C" {

// The names, one a line.
void names_of_isas(char* names) {
  std::string all;
  for (const std::string& isa : cpu::isas()) all += isa + "\n";
  std::memcpy(names, all.c_str(), all.size() + 1);
}

void encode(const char* isa, int64_t n, const float* values, float* param, uint8_t* codes,
            uint16_t* scales, bool at_random, uint64_t seed, uint32_t number) {
  cpu::set_isa(isa);
  step({n, values, param, codes, scales}, true, at_random, seed, number);
}

// Adds what the codes stand for to `param`, and encodes it again.
void decode(const char* isa, int64_t n, const float* zeros, float* param, uint8_t* codes,
            uint16_t* scales, bool at_random, uint64_t seed, uint32_t number) {
  cpu::set_isa(isa);
  step({n, zeros, param, codes, scales}, false, at_random, seed, number);
}
}
