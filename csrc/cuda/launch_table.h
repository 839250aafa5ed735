// What one launch must know, packed into the kernel's own parameter, so that nothing is uploaded:
//
//   header | tensors from the front, one record each ...        ... groups from the back | end
//
// A parameter may have 32,764 bytes on sm_70 and newer with a driver for CUDA 12.1, else 4,096. A
// tensor takes 32 bytes and a group in fp32 as many: one fp32 group and 1,021 tensors fit, or 465
// groups with a tensor each. More groups leave room for fewer tensors; what does not fit goes into
// further launches. Tensors whose average is kept take 40 bytes: 817 of them fit; those with
// low-precision state 64: 510.
#pragma once

#include <type_traits>

#include "../rules/sgd.h"
#include "../table.h"

namespace momentum_ext::cuda {

constexpr int kSmallTable = 4096;
constexpr int kLargeTable = 32760;  // 32,764 in whole words

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

//   word 0 to 2   param, grad, momentum buffer
//   word 3        its first chunk's number (32 bits), its last chunk's elements less one (16),
//                 its group (16)
//
// where averages are kept, and in every strided record
//
//   word 4        average, in the parameter's dtype and layout
//
// and in a strided record
//
//   word 5        dtypes of param, grad and buffer, number of dimensions, binary logarithms of a
//                 chunk's sizes in the first three (8 bits each)
//   then          size, param stride, grad stride and buffer stride of each dimension, those of a
//                 chunk first
constexpr int kDimWords = 1 + kState + Sgd::kMaxStates;
constexpr int kFlatRecord = 4;
constexpr int kAveragedRecord = 5;
constexpr int kFirstDim = 6;
constexpr int kStridedRecord = kFirstDim + kDimWords * kMaxStridedDimsCuda;

// Tensors with low-precision state have in place of what follows word 4
//
//   word 5        dtypes of param, grad and buffer (8 bits each), number of dimensions (4), kind of
//                 master (3), whether it may round at random (1); its place among the optimizer's
//                 parameters (32)
//   word 6, 7     master, scale
//   then          the dimensions, where they are strided
constexpr int kFirstLowPrecisionDim = 8;
constexpr int kLowPrecisionRecord = kFirstLowPrecisionDim;
constexpr int kStridedLowPrecisionRecord = kFirstLowPrecisionDim + kDimWords * kMaxStridedDimsCuda;

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
template <typename opmath_t>
struct PackedGroup {
  Sgd::Coefficients<opmath_t> coefficients;
  uint32_t flags;  // what follows, a bit each; then the cohort
};
constexpr uint32_t kHasWeightDecay = 1;  // in the gradient (L2)
constexpr uint32_t kHasMomentum = 2;
constexpr uint32_t kHasNesterov = 4;
constexpr uint32_t kIsDecoupled = 8;  // the weight decay
constexpr int kCohortShift = 4;
constexpr uint32_t kNoCohort = 0;                              // has had its first step
constexpr uint32_t kFirstStep = ~uint32_t{0} >> kCohortShift;  // has it now, as the host knows

// The last words of a group of tensors that may round at random.
struct GroupRounding {
  uint64_t seed;
  uint32_t step;
  uint32_t at_random;
};

template <typename T>
constexpr int kWordsOf = (static_cast<int>(sizeof(T)) + 7) / 8;

// T from words `at` onwards.
template <typename T, int kBytes>
MOMENTUM_EXT_INLINE T unpack(const LaunchTable<kBytes>& table, int at) {
  static_assert(std::is_trivially_copyable_v<T>);
  uint64_t words[kWordsOf<T>];
  for (int i = 0; i < kWordsOf<T>; ++i) words[i] = table.words[at + i];
  T value;
  memcpy(&value, words, sizeof(value));
  return value;
}

// The average's weight, behind the groups of a launch that may keep averages.
struct AverageWeight {
  double number;
  const double* on_device;  // nullptr: it is the number
};

// Where group g begins, with words reserved behind the groups. Groups that read numbers from the
// device's memory have an Sgd::OnDevice behind their PackedGroup; if one has, all of the launch
// have room for it.
template <int kReserved, int kBytes>
MOMENTUM_EXT_INLINE int group_at(const LaunchTable<kBytes>& table, int group) {
  return LaunchTable<kBytes>::kNumWords - kReserved - (group + 1) * table.header.words_per_group;
}

}  // namespace momentum_ext::cuda
