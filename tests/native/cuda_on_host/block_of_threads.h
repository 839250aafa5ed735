// One block's threads on the host, for kernels whose threads meet: at __syncthreads(), __syncwarp()
// and in warp shuffles.
//
// Threads run one after the other on a fiber. One that has to wait for others leaves its fiber as
// it is, and the threads behind it go on upon another; so a kernel whose threads never meet runs as
// a plain loop. Which thread runs first is not what a GPU does, but all that a kernel may rely on
// holds: nobody passes a barrier before everybody has reached it. Threads that wait for one that
// never comes, or that meet with different masks, end the program.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATED_WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATED_WITH_ASAN 1
#endif
#endif
#if defined(EMULATED_WITH_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

constexpr unsigned kWarp = 32;

class Block {
 public:
  // Calls enter(thread) whenever a thread begins or goes on, and body() to run it.
  void run(unsigned num_threads, const std::function<void(unsigned)>& enter,
           const std::function<void()>& body) {
    num_threads_ = num_threads;
    enter_ = &enter;
    body_ = &body;
    next_ = num_finished_ = num_at_barrier_ = 0;
    warps_.assign((num_threads + kWarp - 1) / kWarp, Warp());
    while (num_finished_ < num_threads) {
      if (!runnable_.empty()) {
        Fiber* const fiber = runnable_.back();
        runnable_.pop_back();
        resume(*fiber);
      } else if (next_ < num_threads) {
        resume(idle_fiber());
      } else {
        die("threads wait for others that have ended, or that wait elsewhere");
      }
    }
  }

  // __syncthreads(): all threads that have not ended.
  void meet() {
    ++num_at_barrier_;
    current_->waits_for_all = true;
    release_all_if_complete();
    if (current_->waits_for_all) suspend();
  }

  // __syncwarp(mask): those threads of the caller's warp.
  void meet_in_warp(uint32_t mask) {
    Warp& warp = warps_[current_->thread / kWarp];
    const uint32_t me = uint32_t{1} << current_->thread % kWarp;
    if ((mask & me) == 0) die("a thread meets others without being in its own mask");
    if (warp.arrived == 0) warp.mask = mask;
    if (warp.mask != mask) die("threads of a warp meet with different masks");
    warp.arrived |= me;
    if ((warp.arrived & warp.ended) != 0 || (mask & warp.ended & ~me) != 0) {
      die("a mask names a thread that has ended");
    }
    if (warp.arrived == mask) {
      for (Fiber* const each : warp.waiting) runnable_.push_back(each);
      warp.waiting.clear();
      warp.arrived = 0;
      return;
    }
    warp.waiting.push_back(current_);
    suspend();
  }

  // What the thread in lane `from` of the same warp gives; the thread's own value where that lane
  // is not in the mask.
  template <typename T>
  T exchange(uint32_t mask, T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned thread = current_->thread;
    Warp& warp = warps_[thread / kWarp];
    // Two sets that take turns: nobody gives again in this one before everybody has taken from it.
    auto& given = warp.given[warp.turn[thread % kWarp]++ & 1];
    std::memcpy(&given[thread % kWarp], &value, sizeof(T));
    meet_in_warp(mask);
    T taken = value;
    if ((mask >> from & 1) != 0) std::memcpy(&taken, &given[from], sizeof(T));
    return taken;
  }

  unsigned lane() const { return current_->thread % kWarp; }

 private:
  static constexpr size_t kStack = 256 * 1024;

  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;
    unsigned thread = 0;
    bool waits_for_all = false;
    bool is_idle = true;
    Block* block = nullptr;
  };
  struct Warp {
    uint32_t mask = 0;
    uint32_t arrived = 0;
    uint32_t ended = 0;
    std::vector<Fiber*> waiting;
    uint64_t given[2][kWarp] = {};
    uint8_t turn[kWarp] = {};
  };

  [[noreturn]] static void die(const char* why) {
    std::fprintf(stderr, "emulated block: %s\n", why);
    std::abort();
  }

  void release_all_if_complete() {
    if (num_at_barrier_ == 0 || num_at_barrier_ + num_finished_ != num_threads_) return;
    for (const auto& each : fibers_) {
      if (!each->waits_for_all) continue;
      each->waits_for_all = false;
      if (each.get() != current_) runnable_.push_back(each.get());
    }
    num_at_barrier_ = 0;
  }

  // Runs threads from next_ on, until one has to wait and another fiber takes over.
  void run_threads() {
    while (next_ < num_threads_) {
      current_->thread = next_++;
      (*enter_)(current_->thread);
      (*body_)();
      ++num_finished_;
      warps_[current_->thread / kWarp].ended |= uint32_t{1} << current_->thread % kWarp;
      Fiber* const me = current_;
      current_ = nullptr;  // it waits for nobody
      release_all_if_complete();
      current_ = me;
    }
  }

  Fiber& idle_fiber() {
    for (const auto& each : fibers_) {
      if (each->is_idle) return *each;
    }
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->block = this;
    return *fibers_.back();
  }

  static void fiber_main(unsigned low, unsigned high) {
    auto* const fiber = reinterpret_cast<Fiber*>(uint64_t{high} << 32 | low);
    fiber->block->finish_switch(nullptr);
    fiber->block->run_threads();
    fiber->is_idle = true;
    fiber->block->leave(nullptr);  // its fake stack goes
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    if (fiber.is_idle) {
      fiber.is_idle = false;
      fiber.fake_stack = nullptr;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      const auto address = reinterpret_cast<uint64_t>(&fiber);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(fiber_main), 2,
                  static_cast<unsigned>(address), static_cast<unsigned>(address >> 32));
    } else {
      (*enter_)(fiber.thread);
    }
    void* fake_stack = nullptr;
    start_switch(&fake_stack, fiber.stack.get(), kStack);
    swapcontext(&scheduler_, &fiber.context);
    finish_switch(fake_stack);
    current_ = nullptr;
  }

  void suspend() {
    Fiber& me = *current_;
    leave(&me.fake_stack);
    finish_switch(me.fake_stack);
  }

  void leave(void** fake_stack) {
    Fiber& me = *current_;
    start_switch(fake_stack, scheduler_stack_, scheduler_stack_size_);
    swapcontext(&me.context, &scheduler_);
  }

  // AddressSanitizer wants to know on which stack it is.
#if defined(EMULATED_WITH_ASAN)
  static void start_switch(void** save, const void* bottom, size_t size) {
    __sanitizer_start_switch_fiber(save, bottom, size);
  }
  void finish_switch(void* saved) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(saved, &bottom, &size);
    if (current_ != nullptr && !has_scheduler_stack_) {
      scheduler_stack_ = bottom;
      scheduler_stack_size_ = size;
      has_scheduler_stack_ = true;
    }
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  void finish_switch(void*) {}
#endif

  unsigned num_threads_ = 0;
  unsigned next_ = 0;
  unsigned num_finished_ = 0;
  unsigned num_at_barrier_ = 0;
  const std::function<void(unsigned)>* enter_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> runnable_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_{};
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  [[maybe_unused]] bool has_scheduler_stack_ = false;
};

inline thread_local Block block;

}  // namespace emulated
