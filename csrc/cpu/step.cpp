// The CPU backend: which instruction set runs, and how a step is divided among threads.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "backend.h"
#include "isa.h"
#include "thread_team.h"

namespace momentum_ext::cpu {
namespace {

// A thread that sleeps, or whose core is busy, is worth waiting for only where it saves more than
// the waiting may cost: from this many elements for each thread on, 5 MB of an fp32 step. (torch's
// own threshold, 32768, is for a tensor; its steps over lists of small tensors enter no region
// either.)
std::atomic<int64_t> elements_per_thread{1 << 18};

struct Implementation {
  const char* name;
  const Loops* loops;
};

#if defined(__x86_64__)
// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Best first.
const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> list = [] {
    std::vector<Implementation> usable;
    if (kAvx512 != nullptr && has_avx512()) usable.push_back({"avx512", kAvx512});
    if (kAvx2 != nullptr && has_avx2()) usable.push_back({"avx2", kAvx2});
    if (kNeon != nullptr) usable.push_back({"neon", kNeon});
    if (kBaseline != nullptr) usable.push_back({"baseline", kBaseline});
    return usable;
  }();
  return list;
}

std::atomic<const Implementation*>& current() {
  static std::atomic<const Implementation*> chosen{&implementations().front()};
  return chosen;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Implementation& each : implementations()) names.emplace_back(each.name);
  return names;
}

std::string isa() { return current().load()->name; }

void set_isa(const std::string& name) {
  std::string choices;
  for (const Implementation& each : implementations()) {
    if (name == each.name) {
      current().store(&each);
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(each.name);
  }
  throw std::invalid_argument("unknown or unsupported instruction set '" + name +
                              "'; this machine can run: " + choices);
}

bool has_threads() { return has_thread_team(); }

void set_elements_per_thread(int64_t count) { elements_per_thread = std::max<int64_t>(count, 1); }

namespace {

struct Tasks {
  int count;
  int team_size;
};

Tasks num_tasks(int64_t num_elements, int max_threads) {
  const int64_t most = num_elements / elements_per_thread.load(std::memory_order_relaxed);
  return {static_cast<int>(std::min<int64_t>(max_threads, most)), max_threads};
}

// Calls body(begin, end) for consecutive parts of [0, n), each on a thread of its own.
template <typename Body>
void parallel_for(int64_t n, Tasks tasks, const Body& body) {
  if (tasks.count <= 1 || !has_thread_team() || is_forked_child.load(std::memory_order_relaxed)) {
    body(0, n);
    return;
  }
  run_on_team(tasks.count, tasks.team_size,
              [&](int64_t i) { body(n * i / tasks.count, n * (i + 1) / tasks.count); });
}

template <typename Rule>
void run_loop(RunFn<Rule> run, const StepTable<Rule>& table, int max_threads) {
  const int64_t first = table.first_element[0];
  const int64_t numel = table.first_element[table.num_entries] - first;
  parallel_for(numel, num_tasks(numel, max_threads),
               [&](int64_t begin, int64_t end) { run(table, first + begin, first + end); });
}

const Loops& loops() { return *current().load(std::memory_order_relaxed)->loops; }

}  // namespace

template <typename Rule>
void step(const StepTable<Rule>& table, int max_threads) {
  run_loop(static_cast<const StepLoop<Rule>&>(loops()).step, table, max_threads);
}
#define MOMENTUM_EXT_STEP(Rule) template void step(const StepTable<Rule>& table, int max_threads);
MOMENTUM_EXT_FOR_EACH_RULE(MOMENTUM_EXT_STEP)

void move_to_iterate(const StepTable<Sgd>& table, int max_threads) {
  run_loop(loops().to_iterate, table, max_threads);
}

void move_to_lookahead(const StepTable<Sgd>& table, int max_threads) {
  run_loop(loops().to_lookahead, table, max_threads);
}

void count_updates(const StepTable<Sgd>& table, int max_threads) {
  run_loop(loops().count, table, max_threads);
}

double norm(Norm kind, const TensorTable& table, double scale, double* block_norms,
            int max_threads) {
  const NormFn run = loops().norm[static_cast<int>(kind)];
  const int64_t num_blocks = table.first_element[table.num_entries];
  int64_t num_elements = 0;
  for (int64_t i = 0; i < table.num_entries; ++i) num_elements += table.entries[i].numel;
  parallel_for(num_blocks, num_tasks(num_elements, max_threads),
               [&](int64_t begin, int64_t end) { run(table, begin, end, scale, block_norms); });
  double result = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    result = kind == Norm::kMax ? larger(result, block_norms[i]) : result + block_norms[i];
  }
  return result;
}

}  // namespace momentum_ext::cpu
