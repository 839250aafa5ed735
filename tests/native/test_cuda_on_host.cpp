// The stand-in for CUDA's header, by kernels whose threads meet: cuda_on_host/block_of_threads.h.
// Built and run by tests/test_native.py. Exits 0 when everything holds.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <vector>

#include "checks.h"

namespace {

template <typename... Args>
void launch(void (*kernel)(Args...), unsigned blocks, unsigned threads,
            std::type_identity_t<Args>... args) {
  void* arguments[] = {&args...};
  expect(
      cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, nullptr) == cudaSuccess,
      "launched");
}

// Each thread reads what its neighbour has written before the barrier, several times.
__global__ void rotate(int* out, int rounds) {
  __shared__ int values[256];
  const unsigned me = threadIdx.x;
  values[me] = static_cast<int>(me);
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const int next = values[(me + 1) % blockDim.x];
    __syncthreads();
    values[me] = next;
  }
  out[blockIdx.x * blockDim.x + me] = values[me];
}

// The largest magnitude of 8 x 32 elements, in every lane: as a block of a quantization finds it.
__global__ void largest_of_256(const float* in, float* out) {
  float largest = 0;
  const float* const mine = in + (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(mine[i]));
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = largest;
}

// Doubles down a tree; threads that end before the others meet again; a ballot; a part of a warp.
__global__ void mixed(double* sums, unsigned* votes, int* shuffled) {
  if (threadIdx.x >= 48) return;
  const unsigned mask = threadIdx.x < 32 ? ~0u : 0xffffu;
  double sum = threadIdx.x;
  if (threadIdx.x < 32) {
    for (unsigned distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(mask, sum, distance);
    }
  }
  if (threadIdx.x == 0) *sums = sum;
  const unsigned ballot = __ballot_sync(mask, threadIdx.x % 3 == 0);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = ballot;
  __syncwarp(mask);
  shuffled[threadIdx.x] = 10000 * __shfl_sync(mask, static_cast<int>(threadIdx.x), 3, 8) +
                          100 * __shfl_up_sync(mask, static_cast<int>(threadIdx.x), 1, 8) +
                          (__all_sync(mask, threadIdx.x < 48) ? 1 : 0);
  __syncthreads();
}

// The last block to finish adds up what all have written.
__global__ void add_up(double* partials, unsigned* finished, double* total) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = 1.0 + blockIdx.x;
    __threadfence();
    is_last = atomicAdd(finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *total += partials[i];
}

}  // namespace

int main() {
  std::vector<int> rotated(3 * 256);
  launch(rotate, 3, 256, rotated.data(), 5);
  for (unsigned i = 0; i < rotated.size(); ++i) {
    expect(rotated[i] == static_cast<int>((i % 256 + 5) % 256), "nobody passes a barrier alone");
  }

  std::vector<float> values(4 * 256), largest(4 * 32);
  for (unsigned i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
  values[256 + 77] = -5;
  values[512 + 255] = 7;
  launch(largest_of_256, 4, 32, values.data(), largest.data());
  for (unsigned i = 0; i < largest.size(); ++i) {
    float expected = 0;
    for (unsigned k = 0; k < 256; ++k) {
      expected = std::fmax(expected, std::fabs(values[i / 32 * 256 + k]));
    }
    expect(largest[i] == expected, "a maximum reaches every lane");
  }

  double sum = 0;
  unsigned votes[2] = {};
  std::vector<int> shuffled(48);
  launch(mixed, 1, 64, &sum, votes, shuffled.data());
  expect(sum == 31 * 16, "a sum down the tree");
  expect(votes[0] == 0x49249249u && votes[1] == 0x00002492u, "a ballot");
  for (int i = 0; i < 48; ++i) {
    const int above = i % 8 == 0 ? i : i - 1;
    expect(shuffled[static_cast<size_t>(i)] == 10000 * (i / 8 * 8 + 3) + 100 * above + 1,
           "shuffles within a part of a warp");
  }

  for (const bool backwards : {false, true}) {
    emulated::last_block_first = backwards;
    std::vector<double> partials(100);
    unsigned finished = 0;
    double total = 0;
    launch(add_up, 100, 64, partials.data(), &finished, &total);
    expect(total == 5050 && finished == 100, "the last block adds up");
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
