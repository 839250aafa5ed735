// What one launch must know, packed into the kernel's own parameter, so that nothing is uploaded:
//
//   header | tensors from the front, one record each ...        ... groups from the back | end
//
// A parameter may have 32,764 bytes on sm_70 and newer with a driver for CUDA 12.1, else 4,096. A
// tensor of SGD takes 32 bytes and a group in fp32 as many: one fp32 group and 1,021 tensors fit, or 465
// groups with a tensor each. More groups leave room for fewer tensors; what does not fit goes into
// further launches. Tensors whose average is kept take 40 bytes: 817 of them fit; those with
// low-precision state 80: 408.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "../table.h"

namespace momentum_ext::cuda {

constexpr int kSmallTable = 4096;
constexpr int kLargeTable = 32760;  // 32,764 in whole words

// Whether a kernel's parameter may have 32,764 bytes: a question to driver and device.
inline bool has_large_parameters(int device) {
  constexpr int kMaxDevices = 64;
  constexpr int kDriverForCuda121 = 12010;
  static std::atomic<int8_t> known[kMaxDevices];  // 0: not asked yet
  if (device < kMaxDevices && known[device] != 0) return known[device] > 0;
  int driver = 0;
  int major = 0;
  const bool large =
      cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kDriverForCuda121 &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      major >= 7;
  if (device < kMaxDevices) known[device] = large ? 1 : -1;
  return large;
}

inline bool lies_on(const TensorEntry& entry, int device) {
  return entry.device == device && entry.numel != 0;
}

enum class GradNumber : uint16_t { kNone, kScale, kFactor };

struct TableHeader {
  const float* found_inf;
  const void* grad_number;  // a float to divide gradients by, or a double to multiply them with
  const uint32_t* settled;
  uint16_t num_tensors;
  uint16_t words_per_group;
  uint16_t has_device_numbers;
  GradNumber grad_number_is;
};

template <int kBytes>
struct LaunchTable {
  static constexpr int kNumWords = (kBytes - static_cast<int>(sizeof(TableHeader))) / 8;
  TableHeader header;
  uint64_t words[kNumWords];
};
static_assert(sizeof(LaunchTable<kSmallTable>) <= 4096);
static_assert(sizeof(LaunchTable<kLargeTable>) <= 32764);

// ---- a tensor -----------------------------------------------------------------------------------

// Where a tensor's record has what, in words. A rule with n states has
//
//   param, grad, n states
//   kChunks       its first chunk's number (32 bits), its last chunk's elements less one (16),
//                 its group (16)
//
// where averages are kept, and in every strided record
//
//   kAverage      in the parameter's dtype and layout
//
// in a strided record
//
//   kKind         see TensorKind
//   kFirstDim ..  size and strides of param, grad and states, of each dimension
//
// and with low-precision state
//
//   kKind         see TensorKind
//   kMaster, kScale ..   a master; a scale for each state
//   kPlace ..     of its elements in a whole tensor
//   kFirstDimBehindPlace ..   the dimensions, where they are strided
template <typename Rule>
struct Record {
  static constexpr int kOperands = kState + Rule::kMaxStates;
  static constexpr int kChunks = kOperands;
  static constexpr int kAverage = kChunks + 1;
  static constexpr int kKind = kAverage + 1;
  static constexpr int kFirstDim = kKind + 1;
  static constexpr int kDimWords = 1 + kOperands;
  static constexpr int kMaster = kKind + 1;
  static constexpr int kScale = kMaster + 1;
  static constexpr int kPlace = kScale + Rule::kMaxStates;
  static constexpr int kFirstDimBehindPlace = kPlace + sizeof(PlaceInWhole) / sizeof(uint64_t);
  // Their sizes.
  static constexpr int kFlat = kChunks + 1;
  static constexpr int kAveraged = kAverage + 1;
  static constexpr int kStrided = kFirstDim + kDimWords * kMaxStridedDimsCuda;
  static constexpr int kLowPrecision = kFirstDimBehindPlace;
  static constexpr int kStridedLowPrecision =
      kFirstDimBehindPlace + kDimWords * kMaxStridedDimsCuda;
};

// What a block must know of a tensor whose dtypes its kernel learns when it runs.
struct TensorKind {
  uint32_t bits = 0;    // dtypes of param, grad and states (4 bits each), number of dimensions (4),
                        // kind of master (3), whether it may round at random (1)
  uint32_t number = 0;  // strided: binary logarithms of a chunk's sizes in the first three
                        // dimensions (8 bits each); low precision: the tensor's random numbers

  explicit TensorKind(const TensorEntry& entry, int ndim) {
    bits = static_cast<uint32_t>(entry.param_dtype) | static_cast<uint32_t>(entry.grad_dtype) << 4 |
           static_cast<uint32_t>(ndim) << 20;
    for (int k = 0; k < kMaxStates; ++k) {
      bits |= static_cast<uint32_t>(entry.state_dtype[k]) << (8 + 4 * k);
    }
    if (const LowPrecision* const low = entry.low_precision; low != nullptr) {
      bits |= static_cast<uint32_t>(low->master_kind) << 24 | 1u << 27;
      number = low->param_index;
    }
  }
  MOMENTUM_EXT_INLINE explicit TensorKind(uint64_t word)
      : bits(static_cast<uint32_t>(word)), number(static_cast<uint32_t>(word >> 32)) {}

  uint64_t word() const { return bits | uint64_t{number} << 32; }

  MOMENTUM_EXT_INLINE Dtype dtype(int operand) const {
    return static_cast<Dtype>(bits >> 4 * operand & 15u);
  }
  MOMENTUM_EXT_INLINE int ndim() const { return static_cast<int>(bits >> 20 & 15u); }
  MOMENTUM_EXT_INLINE Master master() const { return static_cast<Master>(bits >> 24 & 7u); }
  MOMENTUM_EXT_INLINE bool may_round_at_random() const { return (bits >> 27 & 1u) != 0; }
  MOMENTUM_EXT_INLINE int log_size(int dim) const {
    return static_cast<int>(number >> 8 * dim & 255u);
  }
};

constexpr int kMaxChunk = 1 << 16;  // elements
constexpr int kMaxGroups = 1 << 16;

MOMENTUM_EXT_INLINE uint64_t pack_chunks(uint32_t first_chunk, uint32_t last_count,
                                         uint32_t group) {
  return first_chunk | uint64_t{last_count - 1} << 32 | uint64_t{group} << 48;
}
MOMENTUM_EXT_INLINE uint32_t first_chunk_of(uint64_t word) { return static_cast<uint32_t>(word); }
MOMENTUM_EXT_INLINE int last_count_of(uint64_t word) {
  return static_cast<int>(word >> 32 & 0xffffu) + 1;
}
MOMENTUM_EXT_INLINE int group_of(uint64_t word) { return static_cast<int>(word >> 48); }

// The tensor that a chunk belongs to, by binary search: ten steps for the longest list. In its
// record, word kChunks tells its chunks.
template <int kRecord, int kChunks, typename Table>
MOMENTUM_EXT_INLINE int locate_tensor(const Table& table, uint32_t chunk) {
  int low = 0;
  int high = table.header.num_tensors;  // first_chunk(low) <= chunk < first_chunk(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk_of(table.words[middle * kRecord + kChunks]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// ---- a group ------------------------------------------------------------------------------------

// Those tensors of a parameter group that are treated alike.
template <typename Rule, typename opmath_t>
struct PackedGroup {
  typename Rule::template Coefficients<opmath_t> coefficients;
  uint32_t flags;  // the rule's options; then the cohort
};
template <typename Rule>
constexpr int kCohortShift = Rule::Options::kBits;
constexpr uint32_t kNoCohort = 0;  // has had its first step
template <typename Rule>
constexpr uint32_t kFirstStep =
    ~uint32_t{0} >> kCohortShift<Rule>;  // has it now, as the host knows

// The last words of a group of tensors that may round at random.
struct GroupRounding {
  uint64_t seed;
  uint32_t at_random;  // kStored, kMasters
  uint32_t zeros = 0;  // launch tables compare groups as words

  static constexpr uint32_t kStored = 1;   // what is stored in 16 or 8 bits
  static constexpr uint32_t kMasters = 2;  // of 24 bits
};

template <typename T>
constexpr int kWordsOf = (static_cast<int>(sizeof(T)) + 7) / 8;

// T from these words onwards.
template <typename T>
MOMENTUM_EXT_INLINE T unpack(const uint64_t* from) {
  static_assert(std::is_trivially_copyable_v<T>);
  uint64_t words[kWordsOf<T>];
  for (int i = 0; i < kWordsOf<T>; ++i) words[i] = from[i];
  T value;
  memcpy(&value, words, sizeof(value));
  return value;
}

// The average's weight, behind the groups of a launch that may keep averages.
struct AverageWeight {
  double number;
  const double* on_device;  // nullptr: it is the number
};

// How many steps there have been, in the device's memory, before that weight in a launch that may round
// at random. nullptr: 0.
template <int kReserved, int kBytes>
MOMENTUM_EXT_INLINE uint32_t read_rounding_step(const LaunchTable<kBytes>& table) {
  const auto* const step =
      reinterpret_cast<const uint32_t*>(table.words[LaunchTable<kBytes>::kNumWords - kReserved]);
  return step != nullptr ? *step : 0;
}

// Where group g begins, with words reserved behind the groups. Groups that read numbers from the
// device's memory have the rule's OnDevice behind their PackedGroup; if one has, all of the launch
// have room for it.
template <int kReserved, int kBytes>
MOMENTUM_EXT_INLINE int group_at(const LaunchTable<kBytes>& table, int group) {
  return LaunchTable<kBytes>::kNumWords - kReserved - (group + 1) * table.header.words_per_group;
}

}  // namespace momentum_ext::cuda
