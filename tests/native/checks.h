// What the native tests share: counting checks, and values in any floating-point dtype.
#pragma once

#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "../../csrc/dtype.h"

namespace {

int failures = 0;
int checks = 0;

void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

std::mt19937_64 generator(20261123);

[[maybe_unused]] double normal() {
  static std::normal_distribution<double> distribution;
  return distribution(generator);
}

// `value` in this dtype, which is none of 8 bits, to or from memory of any alignment.
[[maybe_unused]] void put(momentum_ext::Dtype dtype, void* to, double value) {
  using momentum_ext::Dtype;
  const auto single = static_cast<float>(value);
  momentum_ext::BFloat16 b;
  momentum_ext::Float16 h;
  switch (dtype) {
    case Dtype::kFloat64:
      std::memcpy(to, &value, 8);
      break;
    case Dtype::kFloat32:
      std::memcpy(to, &single, 4);
      break;
    case Dtype::kBFloat16:
      store(b, single);
      std::memcpy(to, &b, 2);
      break;
    default:
      store(h, single);
      std::memcpy(to, &h, 2);
      break;
  }
}

template <typename scalar_t>
scalar_t read_as(const void* from) {
  scalar_t value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

[[maybe_unused]] double get(momentum_ext::Dtype dtype, const void* from) {
  using momentum_ext::Dtype;
  switch (dtype) {
    case Dtype::kFloat64:
      return read_as<double>(from);
    case Dtype::kFloat32:
      return read_as<float>(from);
    case Dtype::kBFloat16:
      return load(read_as<momentum_ext::BFloat16>(from));
    default:
      return load(read_as<momentum_ext::Float16>(from));
  }
}

}  // namespace
