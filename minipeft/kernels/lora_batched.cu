// LoRA for a batch whose rows use different adapters: gather, shrink, expand.
//
//   shrink  h_t = A_i x_t            i = indices[t], the adapter of row t; below 0: none
//   expand  out_t = y_t + s_i B_i h_t
//
// Sums are kept in float32 and rounded once, to the dtype of y. A row without an adapter
// costs a copy of y. (Punica and S-LoRA name the pair SGMV.)
//
// Bytes moved a row of the batch (s = bytes of the dtype, r = rank):
//   shrink  s r in_features of A, s in_features of x r/8 times from L1, 4 r written
//   expand  s r out_features of B, 4 r of h, 2 s out_features of y and out
// Flops: 2 r (in_features + out_features).
//
// Roofline: with one row an adapter, 2/s operations a byte: memory bounds it. Rows that
// share an adapter find its matrices in L2, and the DRAM bytes fall with their number.
// r = 16, 4096 x 4096, float16, one row: 0.28 MB, 0.19 microseconds at 1.5 TB/s; launching
// costs more, which is why a batch goes in two launches and not in two for each adapter.
//
// Launch: 256 threads.
//   shrink  a warp takes one element of h, a CUDA block 8 of one row
//   expand  a thread takes one output, a CUDA block 256 of one row
#include "dot.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int MAX_RANK = 256;

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
shrink(const T* __restrict__ x, const T* __restrict__ A, const int* __restrict__ indices,
       float* __restrict__ h, i64 tokens, int in_features, int r) {
  const int groups = (r + WARPS - 1) / WARPS;
  const i64 token = blockIdx.x / groups;
  const int k = blockIdx.x % groups * WARPS + threadIdx.x / WARP;
  if (token >= tokens || k >= r) return;
  const int adapter = indices[token];
  float sum = 0.0f;
  if (adapter >= 0)
    sum = warp_dot(x + token * in_features, A + (i64(adapter) * r + k) * in_features,
                   in_features);
  if (threadIdx.x % WARP == 0) h[token * r + k] = sum;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
expand(const float* __restrict__ h, const T* __restrict__ B,
       const float* __restrict__ scaling, const int* __restrict__ indices,
       const T* __restrict__ y, T* __restrict__ out, i64 tokens, int out_features, int r) {
  __shared__ float hidden[MAX_RANK];
  constexpr int SIZE = Vector<T>::size;
  const int tiles = (out_features + THREADS - 1) / THREADS;
  const i64 token = blockIdx.x / tiles;
  if (token >= tokens) return;
  for (int k = threadIdx.x; k < r; k += THREADS) hidden[k] = h[token * r + k];
  __syncthreads();
  const int o = blockIdx.x % tiles * THREADS + threadIdx.x;
  if (o >= out_features) return;
  const i64 at = token * out_features + o;
  const int adapter = indices[token];
  if (adapter < 0) {
    out[at] = y[at];
    return;
  }
  const T* row = B + (i64(adapter) * out_features + o) * r;
  float sum = 0.0f;
  if (r % SIZE == 0) {
#pragma unroll 4
    for (int k = 0; k < r; k += SIZE) {
      const Vector<T> part = load_vector(row + k);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) sum = __fmaf_rn(to_float(part.at[j]), hidden[k + j], sum);
    }
  } else {
#pragma unroll 4
    for (int k = 0; k < r; ++k) sum = __fmaf_rn(to_float(row[k]), hidden[k], sum);
  }
  out[at] = from_float<T>(__fmaf_rn(scaling[adapter], sum, to_float(y[at])));
}
