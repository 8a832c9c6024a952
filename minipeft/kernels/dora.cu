// DoRA's norms: the length of every row of V = W + s B A, without forming V.
//
//   norm_o = sqrt(sum_j (W_oj + s sum_k B_ok A_kj)^2)
//
// An element of V lives in a register until it is squared, so no memory of the size of W is
// needed, and nothing cancels as in the expanded |W|^2 + 2 s W.BA + s^2 |BA|^2. Sums are kept
// in float32.
//
// Bytes moved an element of W (s = bytes of its dtype, r = rank): s read from DRAM; s r / 8 of
// A from L2, as the 8 rows of a CUDA block share it in L1. Flops: 2 r + 3.
//
// Roofline: r = 16 in float16 has 17 operations a byte, just above the 13 or so that a GPU of
// 19.5 Tflop/s and 1.5 TB/s has room for: arithmetic and memory end at about the same time,
// 30 microseconds for 4096 x 4096. Above that rank arithmetic bounds it. The matrix product
// B A written to memory and read again would move 4 s more bytes an element.
//
// Launch: 256 threads, a warp a row. A lane takes 16 bytes of W and of each row of A at a time.
#include "common.cuh"

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
row_norm(const T* __restrict__ W, const T* __restrict__ A, const T* __restrict__ B,
         float* __restrict__ norm, int in_features, int out_features, int r, float scaling) {
  constexpr int SIZE = Vector<T>::size;
  const int lane = threadIdx.x % WARP;
  const int o = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (o >= out_features) return;
  const T* row = W + i64(o) * in_features;
  const T* b = B + i64(o) * r;
  const bool whole = in_features % SIZE == 0;  // then every row starts at a vector
  float sum = 0.0f;
  for (int j = lane * SIZE; j < in_features; j += WARP * SIZE) {
    float update[SIZE] = {}, part[SIZE];
    for (int k = 0; k < r; ++k) {
      const float factor = to_float(b[k]);
      load_padded<SIZE>(A + i64(k) * in_features, j, in_features, part, whole);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) update[i] = __fmaf_rn(factor, part[i], update[i]);
    }
    load_padded<SIZE>(row, j, in_features, part, whole);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float v = __fmaf_rn(scaling, update[i], part[i]);
      sum = __fmaf_rn(v, v, sum);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) norm[o] = __fsqrt_rn(sum);
}
