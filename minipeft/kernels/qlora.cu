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
// Roofline: 9 operations a byte for one row, and the 0.5625 bytes a weight (B = 64) are 3.6
// times fewer than in float16. A 4096 x 4096 layer: 9.4 MB, 6.3 microseconds at 1.5 TB/s. But
// a weight of 4 bits costs more instructions than bytes: extracting, looking up, scaling,
// rounding and widening it again are five, before anything is multiplied. With the rest, the
// machine code issues ten a weight. Calculated from an H100's issue slots, not timed, they
// take 1.9 times as long as its memory needs for the bytes. By the rooflines of an A100,
// dequantizing once and a matrix product on tensor cores are faster from 9 rows on; this
// kernel is for decoding.
//
// Launch: 256 threads, a warp 2 outputs, a CUDA block 16 outputs of 4 rows of x. A warp reads
// 128 neighbouring bytes of codes, 8 codes a lane, and the x of them 16 bytes at a time, which
// both outputs use. Two such stretches are in flight.
#include "dot.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 4;     // of x that share one decoding
constexpr int OUTPUTS = 2;  // of a warp, which share the x that it loads
constexpr int GROUP = 8;    // codes of a lane: 4 bytes, within one block
constexpr int STRETCH = WARP * GROUP;
constexpr int FLIGHT = 2;  // stretches whose loads are under way at once

__device__ __forceinline__ float at_byte(const float* table, unsigned offset) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset);
}

// Eight weights of the dtype of x. A byte's first code is in its high bits, and both are
// found at once as byte offsets into the table, in four bytes at a time.
template <class T>
__device__ __forceinline__ void decode(unsigned word, float scale, const float* value,
                                       float* w) {
  const unsigned first = word >> 2 & 0x3c3c3c3c, second = word << 2 & 0x3c3c3c3c;
#pragma unroll
  for (int i = 0; i < GROUP; i += 2) {
    T pair[2];
    const unsigned byte_of = 0x4440 + i / 2;  // that byte, below three zeros
    store_pair(pair, __fmul_rn(at_byte(value, __byte_perm(first, 0, byte_of)), scale),
               __fmul_rn(at_byte(value, __byte_perm(second, 0, byte_of)), scale));
    w[i] = to_float(pair[0]);
    w[i + 1] = to_float(pair[1]);
  }
}

// A row of the weight: its codes, and the block in which it starts, `rest` weights before it.
struct Row {
  const byte* packed;
  i64 block;
  unsigned rest;
  __device__ __forceinline__ Row(const byte* codes, i64 at, int log2_blocksize)
      : packed(codes + at / 2),
        block(at >> log2_blocksize),
        rest(unsigned(at & ((i64(1) << log2_blocksize) - 1))) {}
};

// Adds `COUNT` stretches, from column j on, to the sums of a lane.
template <int COUNT, class T, class ScaleOf>
__device__ __forceinline__ void add_stretches(const Row (&row)[OUTPUTS], ScaleOf scale_of,
                                              const float* value, const T* __restrict__ x,
                                              float (&sum)[OUTPUTS][ROWS], int j, int rows,
                                              int in_features, int log2_blocksize) {
  unsigned word[COUNT][OUTPUTS];
  float scale[COUNT][OUTPUTS];
#pragma unroll
  for (int p = 0; p < OUTPUTS; ++p) {
    const byte* codes = row[p].packed + unsigned(j) / 2;
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
      word[s][p] = *reinterpret_cast<const unsigned*>(codes + s * STRETCH / 2);
      scale[s][p] = scale_of(row[p].block, (row[p].rest + j + s * STRETCH) >> log2_blocksize);
    }
  }
  const T* from = x + unsigned(j);
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
    float w[OUTPUTS][GROUP];
#pragma unroll
    for (int p = 0; p < OUTPUTS; ++p) decode<T>(word[s][p], scale[s][p], value, w[p]);
#pragma unroll
    for (int t = 0; t < ROWS; ++t) {
      if (t >= rows) break;
      float u[GROUP];
      load_padded<GROUP>(from + i64(t) * in_features + s * STRETCH, 0, GROUP, u);
#pragma unroll
      for (int p = 0; p < OUTPUTS; ++p)
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sum[p][t] = __fmaf_rn(w[p][i], u[i], sum[p][t]);
    }
  }
}

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
  constexpr int TILE = WARPS * OUTPUTS;
  const int lane = threadIdx.x % WARP, tiles = (out_features + TILE - 1) / TILE;
  const int first = (blockIdx.x % tiles * WARPS + threadIdx.x / WARP) * OUTPUTS;
  const int token = blockIdx.x / tiles * ROWS;
  const int rows = tokens - token < ROWS ? tokens - token : ROWS;
  if (first >= out_features) return;
  const int second = first + 1 < out_features ? first + 1 : first;  // or once more the first
  const Row row[OUTPUTS] = {{packed, i64(first) * in_features, log2_blocksize},
                            {packed, i64(second) * in_features, log2_blocksize}};

  const float factor = r ? scaling[0] : 0.0f;
  float sum[OUTPUTS][ROWS] = {};
  x += i64(token) * in_features;
  int j = lane * GROUP;
#pragma unroll 1
  for (; j + (FLIGHT - 1) * STRETCH < in_features; j += FLIGHT * STRETCH)
    add_stretches<FLIGHT>(row, scale_of, value, x, sum, j, rows, in_features, log2_blocksize);
#pragma unroll 1
  for (; j < in_features; j += STRETCH)
    add_stretches<1>(row, scale_of, value, x, sum, j, rows, in_features, log2_blocksize);
#pragma unroll
  for (int p = 0; p < OUTPUTS; ++p) {
    const int o = first + p;
    if (o >= out_features) break;
#pragma unroll
    for (int t = 0; t < ROWS; ++t) {
      if (t >= rows) break;
      float update = 0.0f;
      for (int k = lane; k < r; k += WARP)
        update = __fmaf_rn(to_float(B[i64(o) * r + k]), h[i64(token + t) * r + k], update);
      const float total = warp_sum(__fmaf_rn(factor, update, sum[p][t]));
      const float offset = bias ? to_float(bias[o]) : 0.0f;
      if (lane == 0)
        y[i64(token + t) * out_features + o] = from_float<T>(__fadd_rn(total, offset));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
product(const byte* __restrict__ packed, const float* __restrict__ absmax,
        const float* __restrict__ codebook, const T* __restrict__ x, const T* __restrict__ bias,
        const float* __restrict__ h, const T* __restrict__ B, T* __restrict__ y, int tokens,
        int in_features, int out_features, int r, const float* __restrict__ scaling,
        int log2_blocksize) {
  product_of(packed, [absmax](i64 block, unsigned next) { return absmax[block + next]; }, codebook, x, bias, h, B, y,
             tokens, in_features, out_features, r, scaling, log2_blocksize);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
product_nested(const byte* __restrict__ packed, const byte* __restrict__ absmax_codes,
               const float* __restrict__ nested_absmax, const float* __restrict__ map,
               const float* __restrict__ offset, int log2_nested_blocksize,
               const float* __restrict__ codebook,
               const T* __restrict__ x, const T* __restrict__ bias, const float* __restrict__ h,
               const T* __restrict__ B, T* __restrict__ y, int tokens, int in_features,
               int out_features, int r, const float* __restrict__ scaling,
               int log2_blocksize) {
  const auto scale_of = [=](i64 first, unsigned next) {
    const i64 block = first + next;
    const float nested = nested_absmax[block >> log2_nested_blocksize];
    return __fadd_rn(__fmul_rn(map[absmax_codes[block]], nested), *offset);
  };
  product_of(packed, scale_of, codebook, x, bias, h, B, y, tokens, in_features, out_features,
             r, scaling, log2_blocksize);
}
