// The execution model of CUDA on a CPU: what fibers.cpp offers to kernels and to the runner.
//
// Nothing of NVIDIA's is included here, so that what is not a kernel compiles fast.
#ifndef MODEL_HPP
#define MODEL_HPP
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace shim {

struct Index {
  unsigned x, y, z;
};

extern Index thread, block, block_size, grid_size;

[[noreturn]] void stop(const char* what);
void sync_block();
void sync_warp(unsigned mask);

// Post 8 bytes, and read what lane `from` of the warp posted.
uint64_t exchange(unsigned mask, uint64_t bits, int from);
unsigned ballot(unsigned mask, bool vote);
int lane();

// A kernel, callable as the driver calls it: by a pointer to each argument.
struct Kernel {
  std::vector<size_t> widths;
  std::function<void(void** arguments)> run;
};

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P> Kernel describe(void (*kernel)(P...)) {
  return {{sizeof(P)...}, [kernel](void** arguments) {
            call(kernel, arguments, std::index_sequence_for<P...>{});
          }};
}

void launch(const Kernel& kernel, unsigned grid, unsigned threads, unsigned seed,
            void** arguments);

// A lane outside one's own segment of `width` lanes gives back one's own value.
template <class T> T shuffle(unsigned mask, T value, int from, int width) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const bool inside = from >= 0 && from / width == lane() / width;
  bits = exchange(mask, bits, inside ? from : lane());
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace shim

using Registry = std::map<std::string, shim::Kernel>;
Registry registry();  // generated from the table of kernels

#endif
