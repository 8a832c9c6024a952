// The execution model of CUDA on a CPU: one fiber a CUDA thread.
//
// A missing __syncthreads shows in two ways. Under a shuffled order a thread reads what
// another has not written yet, and the values are wrong. And under ThreadSanitizer, which
// knows fibers, the race itself is reported whatever the order was: a switch between
// fibers orders nothing (`no_sync` below), only barriers, shuffles and atomics do. This
// file is compiled without that sanitizer, so that it sees the kernel's accesses and not
// the scheduler's. Blocks are ordered one after another, because they share one copy of
// __shared__ memory; a race between blocks shows as wrong values only.
#include "model.hpp"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#ifdef SHIM_RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace shim {

Index thread, block, block_size, grid_size;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr unsigned kNoSync = 1;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

// What a shuffle posts, and what a barrier orders, has two places taken turn about:
// whoever comes to a place again has met all who used it at the barrier in between.
struct Fiber {
  ucontext_t context;
  State state;
  std::unique_ptr<char[]> stack;
  void* tsan;
  uint64_t slot[2];
  unsigned block_turn, warp_turn;
};

std::vector<Fiber> fibers;
int me;
ucontext_t scheduler;
void* scheduler_tsan;
const void* scheduler_stack;
size_t scheduler_size;
std::function<void()> body;
std::mt19937 rng;

// Addresses that stand for an order in ThreadSanitizer's eyes: all that is released
// before it is acquired happened before.
struct Order {
  char place[2];
};
char block_starts, block_ends;
Order block_order;
std::vector<Order> warp_order;

void leave() {
  __tsan_switch_to_fiber(scheduler_tsan, kNoSync);
  if (fibers[me].state == State::kDone) {
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
    setcontext(&scheduler);
  }
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
  swapcontext(&fibers[me].context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  __tsan_acquire(&block_starts);
  body();
  __tsan_release(&block_ends);
  fibers[me].state = State::kDone;
  leave();
}

void resume(int id) {
  me = id;
  thread = {unsigned(id), 0, 0};
  void* fake = nullptr;
  __tsan_switch_to_fiber(fibers[id].tsan, kNoSync);
  __sanitizer_start_switch_fiber(&fake, fibers[id].stack.get(), kStack);
  swapcontext(&scheduler, &fibers[id].context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void wait_as(State state, char* place) {
  __tsan_release(place);
  fibers[me].state = state;
  leave();
  __tsan_acquire(place);
}

int count(int first, int end, State state) {
  return int(std::count_if(fibers.begin() + first, fibers.begin() + end,
                           [state](const Fiber& f) { return f.state == state; }));
}

void release(int first, int end) {
  for (int i = first; i < end; ++i) fibers[i].state = State::kReady;
}

// Nobody can run: open the warps that are complete, else the block's barrier.
void open_barriers(int n) {
  bool moved = false;
  for (int first = 0; first < n; first += kWarp) {
    const int end = std::min(first + kWarp, n);
    const int waiting = count(first, end, State::kAtWarp);
    if (waiting && waiting < end - first)
      stop("a *_sync that some lanes of its warp do not reach");
    if (waiting) release(first, end);
    moved |= waiting > 0;
  }
  if (moved) return;
  if (count(0, n, State::kAtBlock) != n)
    stop("__syncthreads not reached by every thread of the block");
  release(0, n);
}

void start(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack = std::make_unique<char[]>(kStack);
    fiber.tsan = __tsan_create_fiber(0);
  }
  fiber.state = State::kReady;
  fiber.block_turn = fiber.warp_turn = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  makecontext(&fiber.context, fiber_main, 0);
}

#ifdef SHIM_POISON
// The main program comes first; its thread-local variables are those of the kernels.
int poison(dl_phdr_info* program, size_t, void*) {
  for (int i = 0; i < program->dlpi_phnum; ++i)
    if (program->dlpi_phdr[i].p_type == PT_TLS)
      std::memset(program->dlpi_tls_data, 0xCD, program->dlpi_phdr[i].p_memsz);
  return 1;
}
void poison_shared() { dl_iterate_phdr(poison, nullptr); }
#else
void poison_shared() {}
#endif

void run_block(int n) {
  poison_shared();
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  for (Fiber& fiber : fibers) start(fiber);
  __tsan_release(&block_starts);
  for (;;) {
    std::shuffle(order.begin(), order.end(), rng);
    for (int i : order)
      if (fibers[i].state == State::kReady) resume(i);
    if (count(0, n, State::kDone) == n) break;
    open_barriers(n);
  }
  __tsan_acquire(&block_ends);
}

}  // namespace

void stop(const char* what) {
  std::fprintf(stderr, "shim: %s (block %u)\n", what, block.x);
  std::fflush(stderr);
  std::_Exit(3);
}

int lane() { return me % kWarp; }

void sync_block() {
  wait_as(State::kAtBlock, &block_order.place[fibers[me].block_turn++ % 2]);
}

void sync_warp(unsigned mask) {
  if (mask != 0xffffffffu) stop("a *_sync whose mask is not the full warp");
  wait_as(State::kAtWarp, &warp_order[me / kWarp].place[fibers[me].warp_turn++ % 2]);
}

uint64_t exchange(unsigned mask, uint64_t bits, int from) {
  const int place = fibers[me].warp_turn % 2;
  fibers[me].slot[place] = bits;
  sync_warp(mask);
  const int source = me / kWarp * kWarp + from;
  if (source >= int(fibers.size())) stop("a shuffle reads a lane that does not exist");
  return fibers[source].slot[place];
}

unsigned ballot(unsigned mask, bool vote) {
  const int place = fibers[me].warp_turn % 2;
  exchange(mask, vote, lane());
  const int first = me / kWarp * kWarp;
  const int end = std::min(first + kWarp, int(fibers.size()));
  unsigned votes = 0;
  for (int i = first; i < end; ++i)
    votes |= unsigned(fibers[i].slot[place]) << (i - first);
  return votes;
}

void launch(const Kernel& kernel, unsigned grid, unsigned threads, unsigned seed,
            void** arguments) {
  grid_size = {grid, 1, 1};
  block_size = {threads, 1, 1};
  rng.seed(seed);
  fibers.resize(threads);
  warp_order.resize((threads + kWarp - 1) / kWarp);
  scheduler_tsan = __tsan_get_current_fiber();
  body = [&] { kernel.run(arguments); };
  std::vector<unsigned> order(grid);
  for (unsigned b = 0; b < grid; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), rng);
  for (unsigned b : order) {
    block = {b, 0, 0};
    run_block(int(threads));
  }
}

}  // namespace shim
