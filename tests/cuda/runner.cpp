// A program that runs launches of the kernels compiled into it, one after another.
//
//   runner             reads launches from stdin until it ends
//   runner --widths    prints the bytes of every argument, as g++ sees them
//
// A launch: five int64 (length of the name, blocks, threads of a block, seed, number of
// arguments), the name, and for each argument an int64 length and its bytes. A length
// below zero is a scalar of -length bytes, another one is a buffer; -2^62 + k, without
// bytes, is the buffer k once more. The answer is the bytes of all buffers after the
// launch, in order.
//
// It is a process of its own so that a kernel that runs wild cannot take the tests with
// it, and so that sanitizers need no preloading.
#include <cstdio>
#include <cstdlib>

#include "model.hpp"

constexpr int64_t kSameAs = -(int64_t(1) << 62);

struct Buffer {
  unsigned char* bytes;
  size_t size;
};

static void read(void* to, size_t size) {
  if (std::fread(to, 1, size, stdin) != size) shim::stop("the launch ends early");
}

// Exactly as long as the array, at an address like the device allocator's.
static Buffer read_buffer(size_t size) {
  void* bytes = nullptr;
  if (posix_memalign(&bytes, 256, size)) shim::stop("out of memory");
  read(bytes, size);
  return {static_cast<unsigned char*>(bytes), size};
}

static int print_widths() {
  for (const auto& [name, kernel] : registry()) {
    std::printf("%s", name.c_str());
    for (size_t width : kernel.widths) std::printf(" %zu", width);
    std::printf("\n");
  }
  return 0;
}

static void run_launch(const Registry& kernels, const int64_t (&header)[5]) {
  std::string name(size_t(header[0]), ' ');
  read(name.data(), name.size());
  const auto found = kernels.find(name);
  if (found == kernels.end()) shim::stop("no such kernel");
  const shim::Kernel& kernel = found->second;
  const size_t count = size_t(header[4]);
  if (count != kernel.widths.size()) shim::stop("the kernel has other arguments");
  std::vector<Buffer> buffers, scalars;
  std::vector<unsigned char*> addresses(count);  // what pointer arguments hold
  std::vector<void*> arguments(count);
  for (size_t i = 0; i < count; ++i) {
    int64_t length;
    read(&length, sizeof length);
    const bool scalar = length < 0 && length > kSameAs / 2;
    if (scalar) {
      scalars.push_back(read_buffer(size_t(-length)));
      arguments[i] = scalars.back().bytes;
    } else {
      if (length >= 0) buffers.push_back(read_buffer(size_t(length)));
      addresses[i] = (length >= 0 ? buffers.back() : buffers.at(length - kSameAs)).bytes;
      arguments[i] = &addresses[i];
    }
    if (kernel.widths[i] != (scalar ? scalars.back().size : sizeof(void*)))
      shim::stop("an argument has another width than the kernel's parameter");
  }
  shim::launch(kernel, unsigned(header[1]), unsigned(header[2]), unsigned(header[3]),
               arguments.data());
  for (const Buffer& buffer : buffers) std::fwrite(buffer.bytes, 1, buffer.size, stdout);
  std::fflush(stdout);
  for (const Buffer& buffer : buffers) std::free(buffer.bytes);
  for (const Buffer& scalar : scalars) std::free(scalar.bytes);
}

int main(int argc, char**) {
  if (argc > 1) return print_widths();
  const Registry kernels = registry();
  int64_t header[5];
  while (std::fread(header, 1, sizeof header, stdin) == sizeof header)
    run_launch(kernels, header);
}
