// The norm of all gradients in one launch: one read of each.
//
// Tensors are cut into chunks. A grid of at most kMaxNormBlocks blocks goes through them, block b
// through the chunks b, b + grid, and so on; a thread adds up what it has read, a block its threads
// by a tree, and the block that is the last to finish adds up the blocks. Which number meets which,
// and in which order, depends on the list alone: not on how many blocks run at once, nor on where
// in memory a gradient lies.
//
// Sums are kept in double, as on the CPU: the square of a float is exact in it and cannot leave its
// range, and a billion small ones lose nothing beside a large one. That takes an addition in double
// for each element, which a GPU for training does faster than it reads them. Squares of doubles can
// leave the range, where their root does not: they are added up at three scales.
//
// Compile with --fmad=false, as all kernels.
#include <algorithm>

#include "backend.h"
#include "launch_table.h"

namespace momentum_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerThread = 4;  // in a chunk; their loads are on the way together
constexpr int kChunkBytes = kThreads * kVectorBytes * kVectorsPerThread;

// ---- what a launch must know --------------------------------------------------------------------

struct NormHeader {
  NormWorkspace* workspace;
  uint32_t num_chunks;
  uint32_t num_written;  // blocks whose sums an earlier launch has begun
  uint32_t num_sums;     // blocks that have sums after this launch
  uint16_t num_tensors;
  uint16_t is_last;
  Conclusion conclusion;
};

//   word 0   grad
//   word 1   its chunks, as in a step's record; in place of the group, its dtype
constexpr int kRecord = 2;

template <int kBytes>
struct NormTable {
  static constexpr int kNumWords = (kBytes - static_cast<int>(sizeof(NormHeader))) / 8;
  NormHeader header;
  uint64_t words[kNumWords];
};
static_assert(sizeof(NormTable<kSmallTable>) <= 4096);
static_assert(sizeof(NormTable<kLargeTable>) <= 32764);

constexpr int64_t chunk_size(Dtype dtype) { return kChunkBytes / itemsize(dtype); }
static_assert(chunk_size(Dtype::kFloat16) <= kMaxChunk);

// ---- sums ---------------------------------------------------------------------------------------

template <Norm kNorm>
struct Sums {
  static constexpr int kCount = 1;
  double sums[kCount] = {};

  __device__ __forceinline__ void add(double x) {
    if constexpr (kNorm == Norm::kSumOfSquares) {
      sums[0] = add_square(sums[0], x);
    } else {
      join(0, x < 0 ? -x : x);
    }
  }
  __device__ __forceinline__ void join(int, double other) {
    sums[0] = kNorm == Norm::kMax ? larger(sums[0], other) : sums[0] + other;
  }
  __device__ __forceinline__ double norm() const {
    return kNorm == Norm::kSumOfSquares ? sqrt(sums[0]) : sums[0];
  }
};

// Sums of squares of doubles: as they are, times 2^-600, and times 2^600.
struct WideSums {
  static constexpr int kCount = kNormSums;
  double sums[kCount] = {};

  __device__ __forceinline__ void add(double x) {
    sums[0] = add_square(sums[0], x);
    sums[1] = add_square(sums[1], x * 0x1p-600);
    sums[2] = add_square(sums[2], x * 0x1p600);
  }
  __device__ __forceinline__ void join(int i, double other) { sums[i] += other; }
  __device__ __forceinline__ double norm() const {
    if (sums[0] > 1e300) return sqrt(sums[1]) * 0x1p600;
    if (sums[0] < 1e-280) return sqrt(sums[2]) * 0x1p-600;
    return sqrt(sums[0]);
  }
};

// ---- reading ------------------------------------------------------------------------------------

template <typename grad_t, int kVector, typename S>
__device__ __forceinline__ void add_vector(uint4 word, S& sums) {
  grad_t g[kVector];
  memcpy(g, &word, sizeof(g));
#pragma unroll
  for (int k = 0; k < kVector; ++k) sums.add(load(g[k]));
}

// Adds elements [0, count) of a chunk: thread t has vectors t, t + kThreads, ... of kVector
// elements each, whether they can be loaded as such or not.
template <typename grad_t, typename S>
__device__ __forceinline__ void add_chunk(const grad_t* grad, int count, S& sums) {
  constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(grad_t));
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_aligned = reinterpret_cast<uintptr_t>(grad) % kVectorBytes == 0;
  const auto* const vectors = reinterpret_cast<const uint4*>(grad);
  if (is_aligned && count == kThreads * kVector * kVectorsPerThread) {
    uint4 words[kVectorsPerThread];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) words[v] = vectors[v * kThreads + thread];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) add_vector<grad_t, kVector>(words[v], sums);
    return;
  }
  for (int i = thread * kVector; i < count; i += kThreads * kVector) {
    if (is_aligned && i + kVector <= count) {
      const uint4 word = vectors[i / kVector];
      add_vector<grad_t, kVector>(word, sums);
    } else {
      for (int k = i; k < count && k < i + kVector; ++k) sums.add(load(grad[k]));
    }
  }
}

// ---- the block's sums, and then all blocks' ------------------------------------------------------

// The threads' sums, added up in thread 0.
template <typename S>
__device__ __forceinline__ void add_up_block(S& sums) {
  __shared__ double of_warps[S::kCount * kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto add_up_warp = [&sums](int i, int first_distance) {
    for (int distance = first_distance; distance > 0; distance /= 2) {
      sums.join(i, __shfl_down_sync(~0u, sums.sums[i], static_cast<unsigned>(distance)));
    }
  };
#pragma unroll
  for (int i = 0; i < S::kCount; ++i) {
    add_up_warp(i, 16);
    if (lane == 0) of_warps[i * kWarps + warp] = sums.sums[i];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < S::kCount; ++i) {
      sums.sums[i] = lane < kWarps ? of_warps[i * kWarps + lane] : 0.0;
      add_up_warp(i, kWarps / 2);
    }
  }
  __syncthreads();  // of_warps is used again
}

// True in the threads of the block that is the last to come here. What all blocks have written
// before can be read then.
__device__ __forceinline__ bool is_last_block(NormWorkspace* workspace) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&workspace->num_finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  __threadfence();
  return is_last;
}

// Writes the norm, rounded to its dtype, and returns what gradients are to be clipped by.
template <typename norm_t>
__device__ __forceinline__ double write_norm(double norm, const Conclusion& c) {
  const auto rounded = static_cast<norm_t>(norm);
  visit_dtype<norm_t>(c.norm_dtype,
                      [&](auto type) { store(*static_cast<decltype(type)*>(c.norm), rounded); });
  return clip_coefficient(static_cast<norm_t>(c.max_norm), rounded);
}

// One thread's work.
__device__ __forceinline__ void draw(const Conclusion& c, double norm) {
  double factor = c.factor != nullptr ? *c.factor : 1.0;
  if (c.inv_scale != nullptr) factor *= *c.inv_scale;
  if (c.grad_scale != nullptr) factor *= inverse_of_scale(*c.grad_scale);
  if (c.found_inf != nullptr) *c.found_inf = is_finite(norm) ? 0.0f : 1.0f;
  if (c.clips) {
    const double total = norm * (factor < 0 ? -factor : factor);
    factor *= c.norm_dtype == Dtype::kFloat64 ? write_norm<double>(total, c)
                                              : write_norm<float>(total, c);
  }
  if (c.new_factor != nullptr) *c.new_factor = factor;
}

template <typename S, int kBytes>
__global__ void __launch_bounds__(kThreads)
    norm_of_all(const NormTable<kBytes> __grid_constant__ table) {
  const NormHeader& header = table.header;
  NormWorkspace* const workspace = header.workspace;
  S sums;
  for (uint32_t chunk = blockIdx.x; chunk < header.num_chunks; chunk += gridDim.x) {
    const int tensor = locate_tensor<kRecord, 1>(table, chunk);
    const uint64_t word = table.words[tensor * kRecord + 1];
    const uint32_t end = tensor + 1 < header.num_tensors
                             ? first_chunk_of(table.words[(tensor + 1) * kRecord + 1])
                             : header.num_chunks;
    const int64_t byte = int64_t{chunk - first_chunk_of(word)} * kChunkBytes;
    const auto* const grad = reinterpret_cast<const char*>(table.words[tensor * kRecord]) + byte;
    const bool is_tail = chunk + 1 == end;
    visit_dtype<double>(static_cast<Dtype>(group_of(word)), [&](auto type) {
      constexpr int kWhole = kChunkBytes / static_cast<int>(sizeof(type));
      const auto* const first = reinterpret_cast<const decltype(type)*>(grad);
      add_chunk(first, is_tail ? last_count_of(word) : kWhole, sums);
    });
  }
  add_up_block(sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < S::kCount; ++i) {
      double& mine = workspace->sums[i * kMaxNormBlocks + blockIdx.x];
      if (blockIdx.x < header.num_written) sums.join(i, mine);
      mine = sums.sums[i];
    }
  }
  if (header.is_last == 0 || !is_last_block(workspace)) return;

  S total;
  for (uint32_t b = threadIdx.x; b < header.num_sums; b += kThreads) {
#pragma unroll
    for (int i = 0; i < S::kCount; ++i) {
      // Not what this multiprocessor may have in its cache from before.
      const volatile double& theirs = workspace->sums[i * kMaxNormBlocks + b];
      total.join(i, theirs);
    }
  }
  add_up_block(total);
  if (threadIdx.x != 0) return;
  workspace->num_finished = 0;
  workspace->norm = total.norm();
  draw(header.conclusion, workspace->norm);
}

__global__ void conclude_alone(const NormWorkspace* workspace, Conclusion conclusion) {
  draw(conclusion, workspace->norm);
}

// ---- launching ----------------------------------------------------------------------------------

struct Pass {
  const TensorTable& table;
  int device;
  NormWorkspace* workspace;
  const Conclusion& conclusion;
  cudaStream_t stream;
  int max_blocks;
};

// Fills a table tensor by tensor, and launches it when it is full.
template <typename S, int kBytes>
cudaError_t launch_all(const Pass& pass) {
  NormTable<kBytes> packed;  // its words are written before they are read
  packed.header = {pass.workspace, 0, 0, 0, 0, 0, pass.conclusion};
  NormHeader& header = packed.header;
  const auto launch = [&]() -> cudaError_t {
    const unsigned blocks = std::clamp<unsigned>(header.num_chunks, 1, pass.max_blocks);
    header.num_sums = std::max<uint32_t>(header.num_written, blocks);
    void* arguments[] = {&packed};
    const cudaError_t error = cudaLaunchKernel(norm_of_all<S, kBytes>, dim3(blocks), dim3(kThreads),
                                               arguments, 0, pass.stream);
    header.num_written = header.num_sums;
    header.num_tensors = 0;
    header.num_chunks = 0;
    return error;
  };
  for (int64_t i = 0; i < pass.table.num_entries; ++i) {
    const TensorEntry& entry = pass.table.entries[i];
    if (!lies_on(entry, pass.device)) continue;
    const int64_t size = chunk_size(entry.grad_dtype);
    const int64_t chunks = (entry.numel - 1) / size + 1;
    if (chunks > INT32_MAX) return cudaErrorInvalidValue;  // more than any memory holds
    if ((header.num_tensors + 1) * kRecord > packed.kNumWords ||
        header.num_chunks + chunks > INT32_MAX) {
      if (const cudaError_t error = launch(); error != cudaSuccess) return error;
    }
    uint64_t* const record = packed.words + header.num_tensors * kRecord;
    record[0] = reinterpret_cast<uint64_t>(entry.grad);
    record[1] =
        pack_chunks(header.num_chunks, static_cast<uint32_t>(entry.numel - (chunks - 1) * size),
                    static_cast<uint32_t>(entry.grad_dtype));
    header.num_chunks += static_cast<uint32_t>(chunks);
    ++header.num_tensors;
  }
  header.is_last = 1;
  return launch();
}

template <typename S>
cudaError_t launch_sums(const Pass& pass, int64_t num_tensors) {
  const bool is_long = num_tensors * kRecord > NormTable<kSmallTable>::kNumWords;
  return is_long && has_large_parameters(pass.device) ? launch_all<S, kLargeTable>(pass)
                                                      : launch_all<S, kSmallTable>(pass);
}

}  // namespace

cudaError_t norm(Norm kind, const TensorTable& table, int device, NormWorkspace* workspace,
                 const Conclusion& conclusion, cudaStream_t stream, int max_blocks) {
  const Pass pass = {table, device, workspace, conclusion, stream, max_blocks};
  int64_t num_tensors = 0;
  bool has_doubles = false;
  for (int64_t i = 0; i < table.num_entries; ++i) {
    if (!lies_on(table.entries[i], device)) continue;
    ++num_tensors;
    has_doubles = has_doubles || table.entries[i].grad_dtype == Dtype::kFloat64;
  }
  if (kind == Norm::kSumOfAbs) return launch_sums<Sums<Norm::kSumOfAbs>>(pass, num_tensors);
  if (kind == Norm::kMax) return launch_sums<Sums<Norm::kMax>>(pass, num_tensors);
  if (has_doubles) return launch_sums<WideSums>(pass, num_tensors);
  return launch_sums<Sums<Norm::kSumOfSquares>>(pass, num_tensors);
}

cudaError_t conclude(const NormWorkspace* workspace, const Conclusion& conclusion,
                     cudaStream_t stream) {
  Conclusion copy = conclusion;
  void* arguments[] = {&workspace, &copy};
  return cudaLaunchKernel(conclude_alone, dim3(1), dim3(1), arguments, 0, stream);
}

}  // namespace momentum_ext::cuda
