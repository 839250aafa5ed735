// What the native tests share: counting checks, values in any floating-point dtype, and layouts.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/rules/sgd.h"
#include "../../csrc/table.h"

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

// Sizes from the parameter's outermost dimension to its innermost, each tensor's memory in an order
// of its own: of the dimensions, outermost first. The parameter's elements lie `gap` apart.
struct Orders {
  std::vector<int64_t> sizes;
  std::vector<size_t> grad, buffer;
  int64_t gap = 1;
  bool is_expanded = false;  // the gradient, along its outermost dimension

  std::vector<momentum_ext::StridedDim> dims() const {
    using namespace momentum_ext;
    std::vector<StridedDim> made;
    std::vector<size_t> param;
    for (const int64_t size : sizes) {
      param.push_back(made.size());
      made.push_back({size, {}});
    }
    const std::vector<size_t>* const memory[] = {&param, &grad, &buffer};
    for (int t = 0; t <= kState; ++t) {
      int64_t stride = t == kParam ? gap : 1;
      for (size_t k = sizes.size(); k-- > 0;) {
        StridedDim& dim = made[(*memory[t])[k]];
        dim.strides[t] = stride;
        stride *= dim.size;
      }
    }
    if (is_expanded) made[grad[0]].strides[kGrad] = 0;
    return made;
  }
};

// Every order of two and of three dimensions, with sizes around the edges of blocks and of what is
// transposed at once; some of five.
[[maybe_unused]] std::vector<Orders> all_orders() {
  std::vector<Orders> all;
  for (const int64_t rows : {2, 7, 8, 9, 15, 16, 17, 33, 65}) {
    for (const int64_t columns : {5, 8, 15, 16, 17, 33}) {
      all.push_back({{rows, columns}, {1, 0}, {0, 1}});
      all.push_back({{rows, columns}, {0, 1}, {1, 0}, 1 + rows % 2});
      all.push_back({{rows, columns}, {1, 0}, {1, 0}, 1, rows % 2 == 0});
    }
  }
  all.push_back({{140, 129}, {1, 0}, {0, 1}});  // more than a strip of blocks
  for (const auto& sizes : {std::vector<int64_t>{7, 3, 5}, {9, 16, 5}, {2, 33, 9}, {33, 17, 2}}) {
    std::vector<size_t> grad = {0, 1, 2};
    do {
      std::vector<size_t> buffer = {0, 1, 2};
      do {
        all.push_back({sizes, grad, buffer});
      } while (std::next_permutation(buffer.begin(), buffer.end()));
    } while (std::next_permutation(grad.begin(), grad.end()));
  }
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<size_t> grad = {0, 1, 2, 3, 4}, buffer = grad;
    std::shuffle(grad.begin(), grad.end(), generator);
    std::shuffle(buffer.begin(), buffer.end(), generator);
    all.push_back({{3, 5, 4, 7, 2}, grad, buffer, 1 + trial % 2, trial % 3 == 0});
  }
  return all;
}

}  // namespace
