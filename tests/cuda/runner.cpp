// A program that runs launches of the kernels compiled into it, one after another.
//
//   runner             reads launches from stdin until it ends
//   runner --widths    prints the bytes of every argument, as g++ sees them
//
// A launch: five int64 (length of the name, blocks, threads of a block, seed, number of
// arguments), the name, and for each argument an int64 length and its bytes. A length
// below zero is a scalar of -length bytes, another one is a buffer. The answer is the
// bytes of all buffers after the launch, in order.
//
// It is a process of its own so that a kernel that runs wild cannot take the tests with
// it, and so that sanitizers need no preloading.
#include <cstdio>
#include <cstdlib>

#include "shim.hpp"

struct Argument {
  int64_t length;
  unsigned char* bytes;
  bool scalar() const { return length < 0; }
  size_t size() const { return size_t(scalar() ? -length : length); }
};

static void read(void* to, size_t size) {
  if (std::fread(to, 1, size, stdin) != size) shim::stop("the launch ends early");
}

static Argument read_argument() {
  Argument argument;
  read(&argument.length, sizeof argument.length);
  // Exactly as long as the array, at an address like the device allocator's.
  void* bytes = nullptr;
  if (posix_memalign(&bytes, 256, argument.size())) shim::stop("out of memory");
  argument.bytes = static_cast<unsigned char*>(bytes);
  read(bytes, argument.size());
  return argument;
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
  std::vector<Argument> arguments(count);
  std::vector<void*> pointers(count);
  for (size_t i = 0; i < count; ++i) {
    arguments[i] = read_argument();
    const bool scalar = arguments[i].scalar();
    pointers[i] = scalar ? static_cast<void*>(arguments[i].bytes) : &arguments[i].bytes;
    if (kernel.widths[i] != (scalar ? arguments[i].size() : sizeof(void*)))
      shim::stop("an argument has another width than the kernel's parameter");
  }
  shim::launch(kernel, unsigned(header[1]), unsigned(header[2]), unsigned(header[3]),
               pointers.data());
  for (const Argument& argument : arguments)
    if (!argument.scalar()) std::fwrite(argument.bytes, 1, argument.size(), stdout);
  std::fflush(stdout);
  for (const Argument& argument : arguments) std::free(argument.bytes);
}

int main(int argc, char**) {
  if (argc > 1) return print_widths();
  const Registry kernels = registry();
  int64_t header[5];
  while (std::fread(header, 1, sizeof header, stdin) == sizeof header)
    run_launch(kernels, header);
}
