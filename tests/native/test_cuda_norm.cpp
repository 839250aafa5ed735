// The norm's CUDA kernels without a GPU: csrc/cuda/norm.cu as it stands, compiled as C++ with
// cuda_on_host/cuda_runtime.h in place of CUDA's header, against sums in long double.
// Built and run by tests/test_native.py, with AddressSanitizer and UndefinedBehaviorSanitizer.
// Arrays are allocated to the byte, so that a kernel that reads one more is caught. Exits 0 when
// everything holds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/norm.cu"
#include "checks.h"

using namespace momentum_ext;

namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
constexpr Norm kNorms[] = {Norm::kSumOfSquares, Norm::kSumOfAbs, Norm::kMax};
constexpr double kInf = std::numeric_limits<double>::infinity();

// Memory to the byte, its first element `offset` elements behind a boundary of 16 bytes.
class Grad {
 public:
  Grad(Dtype dtype, int64_t size, int64_t offset, double scale = 1)
      : dtype_(dtype), size_(size), skipped_(static_cast<size_t>(offset * itemsize(dtype))) {
    block_.reset(
        static_cast<char*>(std::malloc(skipped_ + static_cast<size_t>(size * itemsize(dtype)))));
    for (int64_t i = 0; i < size; ++i) {
      put(i, scale * normal());
    }
  }

  void put(int64_t i, double value) { ::put(dtype_, at(i), value); }
  double get(int64_t i) const { return ::get(dtype_, at(i)); }

  TensorEntry entry(int16_t device) const {
    TensorEntry made{};
    made.grad = block_.get() + skipped_;
    made.grad_dtype = dtype_;
    made.numel = size_;
    made.device = device;
    return made;
  }
  int64_t size() const { return size_; }

 private:
  char* at(int64_t i) const { return block_.get() + skipped_ + i * itemsize(dtype_); }

  struct Free {
    void operator()(char* block) const { std::free(block); }
  };
  Dtype dtype_;
  int64_t size_;
  size_t skipped_;
  std::unique_ptr<char, Free> block_;
};

struct Result {
  double norm = -1;
  double factor = -1;
  float found_inf = -1;
  size_t launches = 0;
};

std::unique_ptr<cuda::NormWorkspace> workspace(new cuda::NormWorkspace());

Result run(Norm kind, const std::vector<Grad>& list, int16_t device = 0,
           int max_blocks = cuda::kMaxNormBlocks) {
  std::vector<TensorEntry> entries;
  for (const Grad& each : list) entries.push_back(each.entry(device));
  Result result;
  cuda::Conclusion conclusion;
  conclusion.new_factor = &result.factor;
  conclusion.found_inf = &result.found_inf;
  conclusion.norm = &result.norm;
  conclusion.norm_dtype = Dtype::kFloat64;
  conclusion.clips = true;
  conclusion.max_norm = 1;
  emulated::launches.clear();
  const TensorTable table = {entries.data(), nullptr, static_cast<int64_t>(entries.size())};
  expect(cuda::norm(kind, table, device, workspace.get(), conclusion, nullptr, max_blocks) ==
             cudaSuccess,
         "launched");
  result.launches = emulated::launches.size();
  expect(workspace->num_finished == 0, "the next pass can count its blocks");
  return result;
}

double exact(Norm kind, const std::vector<Grad>& list) {
  long double sum = 0;
  for (const Grad& each : list) {
    for (int64_t i = 0; i < each.size(); ++i) {
      const long double x = std::fabs(static_cast<long double>(each.get(i)));
      sum = kind == Norm::kMax        ? (x <= sum || std::isnan(sum) ? sum : x)
            : kind == Norm::kSumOfAbs ? sum + x
                                      : sum + x * x;
    }
  }
  return static_cast<double>(kind == Norm::kSumOfSquares ? std::sqrt(sum) : sum);
}

void compare(Norm kind, const std::vector<Grad>& list, const std::string& name) {
  const double expected = exact(kind, list);
  const Result result = run(kind, list);
  expect(std::fabs(result.norm - expected) <= 1e-14 * expected,
         name + ": " + std::to_string(result.norm) + ", expected " + std::to_string(expected));
  const bool clips = expected + 1e-6 > 1;
  expect(clips ? std::fabs(result.factor * (expected + 1e-6) - 1) < 1e-13 : result.factor == 1,
         name + ": the coefficient");
  expect(result.found_inf == 0, name + ": no overflow");
}

// Sizes around every vector and chunk edge, aligned and not, of one dtype and of all mixed.
void test_sizes() {
  for (const Norm kind : kNorms) {
    std::vector<Grad> mixed;
    for (const Dtype dtype : kDtypes) {
      const int64_t chunk = 16384 / itemsize(dtype);
      std::vector<Grad> list;
      for (const int64_t offset : {0, 1, 3}) {
        for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{7}, int64_t{8},
                                    int64_t{9}, int64_t{31}, int64_t{1023}, int64_t{1024},
                                    int64_t{1025}, chunk - 1, chunk, chunk + 1, 3 * chunk + 5}) {
          std::vector<Grad> alone;
          alone.emplace_back(dtype, numel, offset);
          compare(kind, alone, "one of " + std::to_string(numel));
          list.emplace_back(dtype, numel, offset);
          mixed.emplace_back(dtype, numel, offset);
        }
      }
      compare(kind, list, "sizes");
      expect(emulated::launches.size() == 1, "one launch for all sizes");
    }
    compare(kind, mixed, "mixed dtypes");
    expect(emulated::launches.size() == 1, "one launch for all dtypes");
  }
  expect(run(Norm::kSumOfSquares, {}).norm == 0, "no gradients");
}

// The same bits in whatever order blocks run and wherever the gradients lie.
void test_bits() {
  for (const Norm kind : kNorms) {
    for (const Dtype dtype : kDtypes) {
      std::vector<Grad> list, moved;
      for (const int64_t numel : {int64_t{100000}, int64_t{5}, int64_t{70001}}) {
        list.emplace_back(dtype, numel, 0);
        moved.emplace_back(dtype, numel, 1);
        for (int64_t i = 0; i < numel; ++i) moved.back().put(i, list.back().get(i));
      }
      const double norm = run(kind, list).norm;
      expect(run(kind, list).norm == norm, "again");
      expect(run(kind, moved).norm == norm, "elsewhere in memory");
      emulated::last_block_first = true;
      expect(run(kind, list).norm == norm, "the blocks in another order");
      emulated::last_block_first = false;
    }
  }
}

// As many tensors as a launch takes, and more; several launches add to each other's sums.
void test_long_lists() {
  struct Case {
    int64_t count;
    int16_t device;
    size_t launches;
  };
  for (const Case& c : {Case{250, 0, 1},
                        {251, 0, 1},
                        {2042, 0, 1},
                        {2043, 0, 2},
                        {250, 1, 1},
                        {251, 1, 2},
                        {1000, 1, 4}}) {
    std::vector<Grad> list;
    for (int64_t k = 0; k < c.count; ++k) {
      list.emplace_back(kDtypes[k % 4], 1 + k % 50 + (k == c.count - 1 ? 9000 : 0), k % 3);
      if (k % 20 == 0) list.emplace_back(Dtype::kFloat32, 0, 0);
    }
    for (const Norm kind : kNorms) {
      const Result result = run(kind, list, c.device, 30);
      const double expected = exact(kind, list);
      expect(std::fabs(result.norm - expected) <= 1e-14 * expected, "a long list");
      expect(result.launches == c.launches, "a list of " + std::to_string(c.count) + ": " +
                                                std::to_string(result.launches) + " launches");
    }
  }
}

// More chunks than blocks: each block has several.
void test_many_chunks() {
  std::vector<Grad> list;
  for (int k = 0; k < 5; ++k) list.emplace_back(kDtypes[k % 4], 50000 + 77 * k, 0);
  for (const Norm kind : kNorms) {
    const double expected = exact(kind, list);
    for (const int max_blocks : {1, 2, 7}) {
      const Result result = run(kind, list, 0, max_blocks);
      expect(std::fabs(result.norm - expected) <= 1e-14 * expected, "more chunks than blocks");
      expect(emulated::launches[0].blocks == static_cast<unsigned>(max_blocks), "so many blocks");
    }
  }
}

void test_range() {
  for (const double value : {1e30, 1e-40, 1e-3}) {
    std::vector<Grad> list;
    list.emplace_back(Dtype::kFloat32, 10000, 0);
    for (int64_t i = 0; i < 10000; ++i) list[0].put(i, value);
    const double expected = 100 * list[0].get(0);
    expect(std::fabs(run(Norm::kSumOfSquares, list).norm / expected - 1) < 1e-14, "range of fp32");
  }
  for (const double value : {1e300, 1e-300, 1e-200, 1e200, 1.0, 5e-324}) {
    std::vector<Grad> list;
    list.emplace_back(Dtype::kFloat64, 10000, 0);
    list.emplace_back(Dtype::kFloat16, 10, 0, 0.0);
    for (int64_t i = 0; i < 10000; ++i) list[0].put(i, value);
    const Result result = run(Norm::kSumOfSquares, list);
    expect(std::fabs(result.norm / 100 / value - 1) < 1e-13, "range of fp64");
    expect(result.found_inf == 0, "a root in range is no overflow");
  }
  // In fp32, adding 2^-26 to 1 changes nothing, however often.
  std::vector<Grad> list;
  list.emplace_back(Dtype::kFloat32, 1 << 20, 0);
  for (int64_t i = 0; i < 1 << 20; ++i) list[0].put(i, i == 0 ? 1 : 0x1p-13);
  const double norm = run(Norm::kSumOfSquares, list).norm;
  expect(norm == std::sqrt(1 + ((1 << 20) - 1) * 0x1p-26), "many small ones beside a large one");
}

void test_not_finite() {
  for (const Norm kind : kNorms) {
    for (const Dtype dtype : kDtypes) {
      for (const double bad : {kInf, -kInf, std::nan("")}) {
        for (const int64_t at : {0, 7777, 29999}) {
          std::vector<Grad> list;
          list.emplace_back(dtype, 30000, 1);
          list.emplace_back(Dtype::kFloat32, 30, 0);
          list[0].put(at, bad);
          const Result result = run(kind, list);
          expect(std::isnan(bad) ? std::isnan(result.norm) : result.norm == kInf, "not finite");
          expect(std::isnan(bad) ? std::isnan(result.factor) : result.factor == 0,
                 "the coefficient of what is not finite");
          expect(result.found_inf == 1, "an overflow");
        }
      }
    }
  }
}

// Conclusions drawn one after the other, with and without a pass.
void test_conclusions() {
  std::vector<Grad> list;
  list.emplace_back(Dtype::kFloat32, 4, 0);
  for (int64_t i = 0; i < 4; ++i) list[0].put(i, 512);  // scaled by 1024: a norm of 1
  const float inv_scale = 1.0f / 1024;
  const float grad_scale = 1024;
  float found_inf = -1;
  double factors[2] = {-1, -1};
  cuda::Conclusion unscale;
  unscale.inv_scale = &inv_scale;
  unscale.found_inf = &found_inf;
  unscale.new_factor = &factors[0];
  const TensorEntry entry = list[0].entry(0);
  const TensorTable table = {&entry, nullptr, 1};
  cuda::norm(Norm::kSumOfSquares, table, 0, workspace.get(), unscale, nullptr);
  expect(workspace->norm == 1024 && found_inf == 0 && factors[0] == 1.0 / 1024, "unscaled");

  for (const Dtype dtype : kDtypes) {
    alignas(8) char norm[8] = {};
    cuda::Conclusion clip;
    clip.factor = &factors[0];
    clip.new_factor = &factors[1];
    clip.norm = norm;
    clip.norm_dtype = dtype;
    clip.clips = true;
    clip.max_norm = 0.25;
    expect(cuda::conclude(workspace.get(), clip, nullptr) == cudaSuccess, "concluded");
    const float single = 0.25f * (1 / (1 + 1e-6f));
    const double coefficient = dtype == Dtype::kFloat64 ? 0.25 * (1 / (1 + 1e-6)) : single;
    expect(factors[1] == coefficient / 1024, "unscaled and clipped");
    float as_float = 0;
    double as_double = 0;
    std::memcpy(&as_float, norm, 4);
    std::memcpy(&as_double, norm, 8);
    expect(dtype == Dtype::kFloat64    ? as_double == 1
           : dtype == Dtype::kFloat32  ? as_float == 1
           : dtype == Dtype::kBFloat16 ? norm[0] == static_cast<char>(0x80) && norm[1] == 0x3f
                                       : norm[0] == 0 && norm[1] == 0x3c,
           "the norm in its dtype");

    // The same by a scale that the step would divide by.
    double together = -1;
    clip.factor = nullptr;
    clip.grad_scale = &grad_scale;
    clip.new_factor = &together;
    cuda::conclude(workspace.get(), clip, nullptr);
    expect(together == factors[1], "with the scale of the step");
  }
  emulated::launch_error = cudaErrorLaunchFailure;
  expect(cuda::conclude(workspace.get(), unscale, nullptr) == cudaErrorLaunchFailure, "reported");
  expect(
      cuda::norm(Norm::kMax, table, 0, workspace.get(), unscale, nullptr) == cudaErrorLaunchFailure,
      "a failed launch is reported");
  emulated::launch_error = cudaSuccess;
}

}  // namespace

int main() {
  test_sizes();
  test_bits();
  test_long_lists();
  test_many_chunks();
  test_range();
  test_not_finite();
  test_conclusions();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
