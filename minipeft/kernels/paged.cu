// Paged optimizer states: the pages move, the step is that of adamw.cu, a page at a time.
//
//   first_bad  the first index at which |x| is above a limit, or NaN
//
// A step that goes page by page changes the states in place, in managed memory, and cannot
// be taken back. So the whole gradient is looked at before the first page is touched.
//
// Bytes moved a value (s = bytes of its dtype): s read. Operations: one comparison.
// Roofline: memory bounds it; float32 at 1.5 TB/s: 2.7 microseconds for a million values,
// a seventh of the step that follows.
//
// Launch: 256 threads, 8 values a thread, 2048 a CUDA block.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int GROUP = 8;

// bad: holds n at the start.
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
