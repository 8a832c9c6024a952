// A frozen base of 4 bits times a few rows of x, plus LoRA: the step of decoding.
//
//   y_t = W x_t + bias + s B h_t,   W_oj = q[c] * a rounded to the dtype of x,   h = A x
//
// The weight is decoded in registers and never written. h comes from `shrink` of
// lora_batched. All terms are summed in float32 and rounded once. `product_nested` decodes
// the scales too, where they are codes of eight bits.
//
// Bytes moved a weight (s = bytes of the dtype of x, N = block size): 1/2 + 4/N of its code
// and scale (1/2 + 1/N when nested), read once for up to 4 rows of x in float32, up to 64 in
// 16 bits. For each 16 outputs a CUDA block reads its rows of x anew, from L2: s/16 a weight
// and row. Flops: 2 a weight and row, and the decoding: a shift, a mask, a product.
//
// Roofline: 9 operations a byte for one row, and the 0.5625 bytes a weight (N = 64) are 3.6
// times fewer than in float16. A 4096 x 4096 layer: 9.4 MB, 6.3 microseconds at 1.5 TB/s. But
// the instructions of a weight of 4 bits take longer than its bytes: they extract the code,
// look it up, scale it, and round two weights at once. Ordinary units need two more, to widen
// the weight and to multiply. So in 16 bits tensor cores multiply: one row then costs as much
// as 8, and the kernel issues 6.6 instructions a weight. They take 1.2 times as long as the
// memory needs for the bytes, as calculated from the issue slots of an H100, not timed. At 64
// rows x is 8 bytes a weight. The L2 of an A100 gives 5120 bytes a cycle and needs 3 times as
// long for them as the memory for the weight; to write the weight and to read it again takes
// 8 times as long. With more rows the launcher does that, and calls a matrix product. On GPUs
// before 8.0 lanes exchange the numbers instead, and the launcher does so from 17 rows on.
//
// Launch: 256 threads.
//   float32   a warp takes 2 outputs, a CUDA block 16 outputs of 4 rows of x. A warp reads 128
//             neighbouring bytes of codes, 8 codes a lane, and the x of them 16 bytes at a
//             time, which both outputs use. Two such stretches are in flight
//   16 bits   a CUDA block takes 16 outputs of 64 rows of x, a warp every eighth stretch of 128
//             columns; a lane 16 bytes of codes of two outputs at a time
#include "dot.cuh"
#include "mma.cuh"

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

// Eight weights, not yet rounded to the dtype of x. The first code of a byte is in its high
// bits. The codes of four bytes become byte offsets into the table at once.
__device__ __forceinline__ void decode_scaled(unsigned word, float scale, const float* value,
                                              float* w) {
  const unsigned first = word >> 2 & 0x3c3c3c3c, second = word << 2 & 0x3c3c3c3c;
#pragma unroll
  for (int i = 0; i < GROUP; i += 2) {
    const unsigned byte_of = 0x4440 + i / 2;  // that byte, below three zeros
    w[i] = __fmul_rn(at_byte(value, __byte_perm(first, 0, byte_of)), scale);
    w[i + 1] = __fmul_rn(at_byte(value, __byte_perm(second, 0, byte_of)), scale);
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
    for (int p = 0; p < OUTPUTS; ++p) decode_scaled(word[s][p], scale[s][p], value, w[p]);
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
  // Where the second output is beyond the last, the first is computed twice.
  const int second = first + 1 < out_features ? first + 1 : first;
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

// Sixteen bits, on tensor cores -----------------------------------------------------------

constexpr int TILE_OUTPUTS = 16;   // outputs of one matrix product
constexpr int TILE_TOKENS = 8;     // rows of x of one matrix product
constexpr int MOST = 64;           // rows of x that share one decoding
constexpr int LANE_COLUMNS = 32;   // 16 bytes of codes
constexpr int TILE_COLUMNS = 4 * LANE_COLUMNS;

// A lane's codes of one output, and their scales; zeros where there are no columns.
struct Codes {
  unsigned word[4];
  float scale[4];

  template <class ScaleOf>
  __device__ __forceinline__ Codes(const Row& row, ScaleOf scale_of, int c, int in_features,
                                   int log2_blocksize)
      : word{}, scale{} {
    const byte* from = row.packed + unsigned(c) / 2;
    if (in_features % LANE_COLUMNS == 0 && 1 << log2_blocksize >= LANE_COLUMNS) {
      if (c >= in_features) return;
      copy_vector(reinterpret_cast<Vector<unsigned>*>(word),
                  reinterpret_cast<const Vector<unsigned>*>(from));
      const float common = scale_of(row.block, (row.rest + c) >> log2_blocksize);
#pragma unroll
      for (int q = 0; q < 4; ++q) scale[q] = common;
      return;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (c + GROUP * q >= in_features) return;
      word[q] = *reinterpret_cast<const unsigned*>(from + GROUP / 2 * q);
      scale[q] = scale_of(row.block, (row.rest + c + GROUP * q) >> log2_blocksize);
    }
  }
};

// The columns of a product may be summed in any order. So a lane loads neighbours, 32 codes
// and 8 values of x at a time, and gives four of them to each product.
template <int TILES, class T>
__device__ __forceinline__ void add_columns(const Codes (&codes)[2], const float* value,
                                            const T* __restrict__ x, float (&sum)[TILES][4],
                                            int c, int rows, int in_features) {
  const int g = threadIdx.x % WARP / 4;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    unsigned a[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float w[GROUP];
      decode_scaled(codes[h].word[q], codes[h].scale[q], value, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vector<T, 2> pair;
        store_pair(pair.at, w[2 * i], w[2 * i + 1]);
        a[i / 2][i % 2 * 2 + h] = *reinterpret_cast<const unsigned*>(&pair);
      }
    }
    const int from = c + GROUP * q;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const int token = n * TILE_TOKENS + g;
      if (n * TILE_TOKENS >= rows) break;
      uint4 u = {0, 0, 0, 0};
      if (token < rows && from < in_features)
        u = *reinterpret_cast<const uint4*>(x + i64(token) * in_features + from);
      const unsigned first[2] = {u.x, u.y}, second[2] = {u.z, u.w};
      mma<T>(sum[n], a[0], first);
      mma<T>(sum[n], a[1], second);
    }
  }
}

template <int TILES, class T, class ScaleOf>
__device__ __forceinline__ void product_16(const byte* __restrict__ packed, ScaleOf scale_of,
                                           const float* value, const T* __restrict__ x,
                                           const T* __restrict__ bias,
                                           const float* __restrict__ h,
                                           const T* __restrict__ B, T* __restrict__ y,
                                           int first, int rows, int in_features,
                                           int out_features, int r, float factor,
                                           int log2_blocksize) {
  __shared__ float part[WARPS][TILE_TOKENS][TILE_OUTPUTS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int last = out_features - 1;  // read in place of an output beyond the last
  const int low = first + g < last ? first + g : last;
  const int high = first + g + 8 < last ? first + g + 8 : last;
  const Row row[2] = {{packed, i64(low) * in_features, log2_blocksize},
                      {packed, i64(high) * in_features, log2_blocksize}};
  float sum[TILES][4] = {};
#pragma unroll 1
  for (int j = warp * TILE_COLUMNS; j < in_features; j += WARPS * TILE_COLUMNS) {
    const int c = j + LANE_COLUMNS * t;
    const Codes codes[2] = {{row[0], scale_of, c, in_features, log2_blocksize},
                            {row[1], scale_of, c, in_features, log2_blocksize}};
    add_columns<TILES>(codes, value, x, sum, c, rows, in_features);
  }
  const int o = first + threadIdx.x % TILE_OUTPUTS, own = threadIdx.x / TILE_OUTPUTS;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    if (n * TILE_TOKENS >= rows) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) part[warp][2 * t + i % 2][g + i / 2 * 8] = sum[n][i];
    __syncthreads();
    const int token = n * TILE_TOKENS + own;
    if (own < TILE_TOKENS && token < rows && o < out_features) {
      float total = 0.0f, update = 0.0f;
#pragma unroll
      for (int k = 0; k < WARPS; ++k)
        total = __fadd_rn(total, part[k][own][threadIdx.x % TILE_OUTPUTS]);
      for (int k = 0; k < r; ++k)
        update = __fmaf_rn(to_float(B[i64(o) * r + k]), h[i64(token) * r + k], update);
      total = __fmaf_rn(factor, update, total);
      const float offset = bias ? to_float(bias[o]) : 0.0f;
      y[i64(token) * out_features + o] = from_float<T>(__fadd_rn(total, offset));
    }
    __syncthreads();  // before the next rows are written
  }
}

// The body of both kernels. Up to 8 rows of x take one tile of sums, which needs fewer
// registers.
template <class T, class ScaleOf>
__device__ __forceinline__ void multiply(const byte* __restrict__ packed, ScaleOf scale_of,
                                         const float* __restrict__ codebook,
                                         const T* __restrict__ x, const T* __restrict__ bias,
                                         const float* __restrict__ h, const T* __restrict__ B,
                                         T* __restrict__ y, int tokens, int in_features,
                                         int out_features, int r,
                                         const float* __restrict__ scaling,
                                         int log2_blocksize) {
  if constexpr (sizeof(T) == 4) {
    product_of(packed, scale_of, codebook, x, bias, h, B, y, tokens, in_features,
               out_features, r, scaling, log2_blocksize);
  } else {
    __shared__ float value[16];
    if (threadIdx.x < 16) value[threadIdx.x] = codebook[threadIdx.x];
    __syncthreads();
    const int tiles = (out_features + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int first = blockIdx.x % tiles * TILE_OUTPUTS, token = blockIdx.x / tiles * MOST;
    const int rows = tokens - token < MOST ? tokens - token : MOST;
    const float factor = r ? scaling[0] : 0.0f;
    const T* own_x = x + i64(token) * in_features;
    const float* own_h = h + i64(token) * r;
    T* own_y = y + i64(token) * out_features;
// Without these tensor cores, one tile at a time keeps the code small.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (int done = 0; done < rows; done += TILE_TOKENS)
      product_16<1>(packed, scale_of, value, own_x + i64(done) * in_features, bias,
                    own_h + i64(done) * r, B, own_y + i64(done) * out_features, first,
                    rows - done < TILE_TOKENS ? rows - done : TILE_TOKENS, in_features,
                    out_features, r, factor, log2_blocksize);
#else
    if (rows <= TILE_TOKENS)
      product_16<1>(packed, scale_of, value, own_x, bias, own_h, B, own_y, first, rows,
                    in_features, out_features, r, factor, log2_blocksize);
    else
      product_16<MOST / TILE_TOKENS>(packed, scale_of, value, own_x, bias, own_h, B, own_y,
                                     first, rows, in_features, out_features, r, factor,
                                     log2_blocksize);
#endif
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
product(const byte* __restrict__ packed, const float* __restrict__ absmax,
        const float* __restrict__ codebook, const T* __restrict__ x, const T* __restrict__ bias,
        const float* __restrict__ h, const T* __restrict__ B, T* __restrict__ y, int tokens,
        int in_features, int out_features, int r, const float* __restrict__ scaling,
        int log2_blocksize) {
  multiply(packed, [absmax](i64 block, unsigned next) { return absmax[block + next]; }, codebook, x, bias, h, B, y,
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
  multiply(packed, scale_of, codebook, x, bias, h, B, y, tokens, in_features, out_features,
             r, scaling, log2_blocksize);
}
