// The dot product of two rows by one warp.
#include "common.cuh"

// Sums in float32 by fused multiply-adds; every lane gets the whole sum. Rows whose length is a
// multiple of a vector are read 16 bytes at a time.
template <class T>
__device__ __forceinline__ float warp_dot(const T* __restrict__ a, const T* __restrict__ b,
                                          int n) {
  constexpr int SIZE = Vector<T>::size;
  const int lane = threadIdx.x % WARP;
  float sum = 0.0f;
  if (n % SIZE == 0) {
#pragma unroll 4  // four loads at a time; more would spill registers
    for (int i = lane * SIZE; i < n; i += WARP * SIZE) {
      const Vector<T> u = load_vector(a + i), v = load_vector(b + i);
#pragma unroll
      for (int j = 0; j < SIZE; ++j)
        sum = __fmaf_rn(to_float(u.at[j]), to_float(v.at[j]), sum);
    }
  } else {
#pragma unroll 4
    for (int i = lane; i < n; i += WARP) sum = __fmaf_rn(to_float(a[i]), to_float(b[i]), sum);
  }
  return warp_sum(sum);
}
