// A frozen base of 4 bits times a few rows of x, plus LoRA: the step of decoding.
//
//   y_t = W x_t + bias + s B h_t,   W_oj = c[q] * a rounded to the dtype of x,   h = A x
//
// The weight is decoded in registers and never written. h comes from `shrink` of
// lora_batched. All terms are summed in float32 and rounded once. `product_nested` decodes
// the scales too, where they are codes of eight bits.
//
// Bytes moved a weight: 1/2 + 4/B of its code and scale (1/2 + 1/B when nested), read once
// for up to 4 rows of x; x comes from L1 or L2. Flops: 2 a weight and row, and the decoding:
// a shift, a mask, a product.
//
// Roofline: 9 operations a byte for one row, so memory bounds it, and the 0.5625 bytes a
// weight (B = 64) are 3.6 times fewer than in float16. A 4096 x 4096 layer: 9.4 MB, 6.3
// microseconds at 1.5 TB/s. From about 16 rows on, dequantizing once and a matrix product
// on tensor cores are faster; this kernel is for decoding.
//
// Launch: 256 threads, a warp an output, a CUDA block 8 outputs of 4 rows of x. A warp reads
// 128 neighbouring bytes of codes, 8 codes a lane, and the x of them 16 bytes at a time.
#include "dot.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 4;   // of x that share one decoding
constexpr int GROUP = 8;  // codes of a lane: 4 bytes, within one block

template <class T, class ScaleOf>
__device__ __forceinline__ void product_of(const byte* __restrict__ packed, ScaleOf scale_of,
                                           const float* __restrict__ codebook,
                                           const T* __restrict__ x, const T* __restrict__ bias,
                                           const float* __restrict__ h,
                                           const T* __restrict__ B, T* __restrict__ y,
                                           int tokens, int in_features, int out_features,
                                           int r, const float* __restrict__ scaling,
                                           int log2_blocksize) {
  __shared__ float value[16];
  if (threadIdx.x < 16) value[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % WARP, tiles = (out_features + WARPS - 1) / WARPS;
  const int o = blockIdx.x % tiles * WARPS + threadIdx.x / WARP;
  const int token = blockIdx.x / tiles * ROWS;
  const int rows = tokens - token < ROWS ? tokens - token : ROWS;
  if (o >= out_features) return;

  const float factor = r ? scaling[0] : 0.0f;
  float sum[ROWS] = {};
  for (int j = lane * GROUP; j < in_features; j += WARP * GROUP) {
    const i64 at = i64(o) * in_features + j;
    const unsigned word = __byte_perm(*reinterpret_cast<const unsigned*>(packed + at / 2), 0,
                                      0x0123);  // the first code in the high bits
    const float scale = scale_of(at >> log2_blocksize);
    float w[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      w[i] = round_to<T>(__fmul_rn(value[word >> (28 - 4 * i) & 15], scale));
#pragma unroll
    for (int t = 0; t < ROWS; ++t) {
      if (t >= rows) break;
      float u[GROUP];
      load_padded<GROUP>(x + i64(token + t) * in_features, j, in_features, u);
#pragma unroll
      for (int i = 0; i < GROUP; ++i) sum[t] = __fmaf_rn(w[i], u[i], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < ROWS; ++t) {
    if (t >= rows) break;
    float update = 0.0f;
    for (int k = lane; k < r; k += WARP)
      update = __fmaf_rn(to_float(B[i64(o) * r + k]), h[i64(token + t) * r + k], update);
    const float total = warp_sum(__fmaf_rn(factor, update, sum[t]));
    const float offset = bias ? to_float(bias[o]) : 0.0f;
    if (lane == 0)
      y[i64(token + t) * out_features + o] = from_float<T>(__fadd_rn(total, offset));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
product(const byte* __restrict__ packed, const float* __restrict__ absmax,
        const float* __restrict__ codebook, const T* __restrict__ x, const T* __restrict__ bias,
        const float* __restrict__ h, const T* __restrict__ B, T* __restrict__ y, int tokens,
        int in_features, int out_features, int r, const float* __restrict__ scaling,
        int log2_blocksize) {
  product_of(packed, [absmax](i64 block) { return absmax[block]; }, codebook, x, bias, h, B, y,
             tokens, in_features, out_features, r, scaling, log2_blocksize);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
product_nested(const byte* __restrict__ packed, const byte* __restrict__ absmax_codes,
               const float* __restrict__ nested_absmax, const float* __restrict__ map,
               const float* __restrict__ offset, int log2_nested_blocksize,
               const float* __restrict__ codebook,
               const T* __restrict__ x, const T* __restrict__ bias, const float* __restrict__ h,
               const T* __restrict__ B, T* __restrict__ y, int tokens, int in_features,
               int out_features, int r, const float* __restrict__ scaling,
               int log2_blocksize) {
  const auto scale_of = [=](i64 block) {
    const float nested = nested_absmax[block >> log2_nested_blocksize];
    return __fadd_rn(__fmul_rn(map[absmax_codes[block]], nested), *offset);
  };
  product_of(packed, scale_of, codebook, x, bias, h, B, y, tokens, in_features, out_features,
             r, scaling, log2_blocksize);
}
