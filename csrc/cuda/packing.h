// Filling launch tables and launching them.
#pragma once

#include <cstddef>

#include "kinds.h"
#include "work.h"

namespace momentum_ext::cuda {
namespace {

template <typename Rule>
void pack_dim(const StridedDim& dim, uint64_t* words) {
  words[0] = static_cast<uint64_t>(dim.size);
  for (int k = 0; k < Record<Rule>::kOperands; ++k) {
    words[1 + k] = static_cast<uint64_t>(dim.strides[k]);
  }
}

// Calls visit(layout): of a flat tensor, one dimension.
template <typename Visit>
void with_layout(const TensorEntry& entry, const Visit& visit) {
  if (entry.layout != nullptr) return visit(*entry.layout);
  StridedDim flat = {entry.numel, {}};
  for (int64_t& stride : flat.strides) stride = 1;
  visit(StridedLayout(&flat, 1));
}

// Fills a table tensor by tensor. A kind of tensors tells what its records and groups have, packs
// the rest of a record, and has its kernel in kernel_of(Kind, table).
template <typename Kind, int kBytes>
class Packer {
 public:
  using Rule = typename Kind::Rule;
  using opmath_t = typename Kind::opmath_t;
  using Group = PackedGroup<Rule, opmath_t>;
  using OnDevice = typename Rule::OnDevice;
  using Fields = Record<Rule>;
  using Table = LaunchTable<kBytes>;

  explicit Packer(const Launching<Rule>& launching) {
    const StepScalars& scalars = launching.scalars;
    const bool has_device_numbers = launching.has_device_numbers;
    TableHeader& header = table_.header;
    header = {
        scalars.found_inf,
        scalars.grad_scale,
        scalars.settled,
        0,
        static_cast<uint16_t>(kWordsOf<Group> + (has_device_numbers ? kWordsOf<OnDevice> : 0) +
                              Kind::kRoundingWords),
        has_device_numbers,
        scalars.grad_scale != nullptr ? GradNumber::kScale : GradNumber::kNone};
    if (scalars.grad_factor != nullptr) {
      header.grad_number = scalars.grad_factor;
      header.grad_number_is = GradNumber::kFactor;
    }
    if constexpr (Kind::kReserved != 0) {
      const AverageWeight weight = {launching.table.average_weight, scalars.average_weight};
      memcpy(table_.words + Table::kNumWords - kWordsOf<AverageWeight>, &weight, sizeof(weight));
    }
    if constexpr (Kind::kRoundingWords != 0) {
      table_.words[Table::kNumWords - Kind::kReserved] =
          reinterpret_cast<uint64_t>(scalars.rounding_step);
    }
  }

  // False when there is no room left: launch() first.
  bool add(const TensorEntry& entry, const Hyperparams<Rule>& h) {
    int64_t chunks = (entry.numel - 1) / Kind::kChunk + 1;
    int64_t last_count = entry.numel - (chunks - 1) * Kind::kChunk;
    if constexpr (requires { Kind::num_chunks(entry); }) {
      chunks = Kind::num_chunks(entry);
      last_count = Kind::kChunk;  // a block tells by its sizes what it has
    }
    const int group = find_or_add_group(entry, h);
    const int at = table_.header.num_tensors * Kind::kRecord;
    if (group < 0 || at + Kind::kRecord > first_group_word(num_groups_) ||
        num_chunks_ + chunks > INT32_MAX) {
      return false;
    }
    uint64_t* const record = table_.words + at;
    record[kParam] = reinterpret_cast<uint64_t>(entry.param);
    record[kGrad] = reinterpret_cast<uint64_t>(entry.grad);
    for (int k = 0; k < Rule::kMaxStates; ++k) {
      const bool is_there = k < Rule::num_states(h);
      record[kState + k] = is_there ? reinterpret_cast<uint64_t>(entry.state[k]) : 0;
    }
    record[Fields::kChunks] =
        pack_chunks(static_cast<uint32_t>(num_chunks_), static_cast<uint32_t>(last_count),
                    static_cast<uint32_t>(group));
    if constexpr (Kind::kRecord != Fields::kFlat) {
      record[Fields::kAverage] = reinterpret_cast<uint64_t>(entry.average);
    }
    if constexpr (Kind::kRecord > Fields::kAveraged) Kind::pack_rest(entry, record);
    num_chunks_ += chunks;
    ++table_.header.num_tensors;
    return true;
  }

  bool empty() const { return table_.header.num_tensors == 0; }

  cudaError_t launch(cudaStream_t stream) {
    void* arguments[] = {&table_};
    const cudaError_t error =
        cudaLaunchKernel(kernel_of(Kind(), table_), dim3(static_cast<unsigned>(num_chunks_)),
                         dim3(kThreads), arguments, 0, stream);
    table_.header.num_tensors = 0;
    num_groups_ = 0;
    num_chunks_ = 0;
    return error;
  }

 private:
  static constexpr int kGroupsToCompare = 8;

  int first_group_word(int num_groups) const {
    return Table::kNumWords - Kind::kReserved - num_groups * table_.header.words_per_group;
  }

  // Neighbouring tensors are mostly of one group: the last answer is mostly the next. -1: no room.
  int find_or_add_group(const TensorEntry& entry, const Hyperparams<Rule>& h) {
    const uint32_t cohort = entry.cohort != 0     ? entry.cohort
                            : entry.is_first_step ? kFirstStep<Rule>
                                                  : kNoCohort;
    if (num_groups_ == 0 || entry.group != last_group_ || cohort != last_cohort_) {
      last_answer_ = compare_or_add_group(cohort, h);
      last_group_ = entry.group;
      last_cohort_ = cohort;
    }
    return last_answer_;
  }

  // Groups are mostly of few kinds: those that were added last are compared, and one that was
  // missed is only written twice.
  int compare_or_add_group(uint32_t cohort, const Hyperparams<Rule>& h) {
    const uint32_t flags = h.bits() | (Rule::num_states(h) != 0 ? cohort << kCohortShift<Rule> : 0);
    // Part by part, so that no byte between them is left unset: they are compared as words.
    static_assert(std::has_unique_object_representations_v<OnDevice>);
    uint64_t words[kWordsOf<Group> + kWordsOf<OnDevice> + Kind::kRoundingWords] = {};
    auto* const bytes = reinterpret_cast<char*>(words);
    const auto& numbers = coefficients<opmath_t>(h);
    memcpy(bytes, &numbers, sizeof(numbers));
    memcpy(bytes + offsetof(Group, flags), &flags, sizeof(flags));
    if (table_.header.has_device_numbers != 0) {
      memcpy(words + kWordsOf<Group>, &h.on_device, sizeof(OnDevice));
    }
    if constexpr (Kind::kRoundingWords != 0) {
      const GroupRounding rounding = {h.rounding_seed,
                                      (h.stochastic_rounding ? GroupRounding::kStored : 0) |
                                          (h.rounds_masters ? GroupRounding::kMasters : 0)};
      memcpy(words + table_.header.words_per_group - Kind::kRoundingWords, &rounding,
             sizeof(rounding));
    }
    const size_t num_bytes = 8 * static_cast<size_t>(table_.header.words_per_group);
    const int oldest = num_groups_ > kGroupsToCompare ? num_groups_ - kGroupsToCompare : 0;
    for (int g = num_groups_ - 1; g >= oldest; --g) {
      if (memcmp(table_.words + first_group_word(g + 1), words, num_bytes) == 0) return g;
    }
    const int used = (table_.header.num_tensors + 1) * Kind::kRecord;
    if (num_groups_ == kMaxGroups || first_group_word(num_groups_ + 1) < used) return -1;
    memcpy(table_.words + first_group_word(num_groups_ + 1), words, num_bytes);
    return num_groups_++;
  }

  Table table_;  // its words are written before they are read
  int num_groups_ = 0;
  int64_t num_chunks_ = 0;
  uint32_t last_group_ = 0;
  uint32_t last_cohort_ = 0;
  int last_answer_ = -1;
};

template <typename Kind, int kBytes>
cudaError_t launch_all(const Launching<typename Kind::Rule>& launching) {
  const auto& table = launching.table;
  Packer<Kind, kBytes> packer(launching);
  for (int64_t i = 0; i < table.num_entries; ++i) {
    const TensorEntry& entry = table.entries[i];
    const auto& h = table.groups[entry.group];
    if (!lies_on(entry, launching.device) || kind_of(entry, h) != launching.kind) continue;
    if (packer.add(entry, h)) continue;
    if (packer.empty()) return cudaErrorInvalidValue;  // 2^31 chunks: more than any memory holds
    if (const cudaError_t error = packer.launch(launching.stream); error != cudaSuccess) {
      return error;
    }
    if (!packer.add(entry, h)) return cudaErrorInvalidValue;
  }
  return packer.empty() ? cudaSuccess : packer.launch(launching.stream);
}

// A short list goes into the small parameter, which costs less to hand over.
template <typename Kind>
cudaError_t launch_kind(const Launching<typename Kind::Rule>& launching) {
  using Group = PackedGroup<typename Kind::Rule, typename Kind::opmath_t>;
  constexpr int64_t kLikelyGroups = 2;
  constexpr int64_t kGroupWords = kWordsOf<Group> + Kind::kRoundingWords;
  const int64_t words =
      launching.count * Kind::kRecord + Kind::kReserved + kLikelyGroups * kGroupWords;
  if (words > LaunchTable<kSmallTable>::kNumWords && has_large_parameters(launching.device)) {
    return launch_all<Kind, kLargeTable>(launching);
  }
  return launch_all<Kind, kSmallTable>(launching);
}

}  // namespace
}  // namespace momentum_ext::cuda
