// Paged optimizer states: pages move between host and device; the step of each page is that
// of adamw.cu.
//
//   first_bad  the first index at which |x| is above a limit, or NaN
//
// A step changes the states page by page, in place, in managed memory, and cannot be undone.
// So the whole gradient is checked before the first page is changed.
//
// Bytes moved a value (s = bytes of its dtype): s read. Operations: one comparison.
// Roofline: memory bounds it; float32 at 1.5 TB/s: 2.7 microseconds for a million values,
// a seventh of the step that follows.
//
// Launch: 256 threads, 8 values a thread, 2048 a CUDA block.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int GROUP = 8;

// bad: holds n at the start; at the end, the first index found.
template <class T>
__global__ void __launch_bounds__(THREADS)
first_bad(const T* __restrict__ x, u64* __restrict__ bad, i64 n, float limit) {
  const i64 first = (i64(blockIdx.x) * THREADS + threadIdx.x) * GROUP;
  float value[GROUP];
  load_padded<GROUP>(x, first, n, value);
#pragma unroll
  for (int i = 0; i < GROUP; ++i)
    if (!(fabsf(value[i]) <= limit)) atomicMin(bad, u64(first + i));
}
