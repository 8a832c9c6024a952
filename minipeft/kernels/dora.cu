// DoRA's norms: the length of every row of V = W + s B A, without forming V.
//
//   norm_o = sqrt(sum_j (W_oj + s sum_k B_ok A_kj)^2)
//
// An element of V lives in a register until it is squared, so no memory of the size of W is
// needed, and nothing cancels as in the expanded |W|^2 + 2 s W.BA + s^2 |BA|^2. Sums are kept
// in float32.
//
// Bytes moved an element of W (s = bytes of its dtype, r = rank): s read from DRAM; s r / 16
// of A from L2, as the 16 rows of a CUDA block share it. Flops: 2 r + 3.
//
// Roofline: an element of A is converted once for the 8 rows of a warp, so at r = 16 about 30
// instructions are issued a weight, 16 of them the products themselves. Calculated from an
// H100's issue slots, not timed, they take 1.5 times as long as its memory needs for the
// weight in 16 bits. The matrix product B A written to memory and read again would move 4 s
// more bytes an element.
//
// Launch: 256 threads, 16 rows. A warp takes 8 rows and every fourth stretch of columns; a
// lane 16 bytes of W and of each row of A at a time.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 8;    // of a warp
constexpr int SPLITS = 4;  // of the columns, among the warps of the same rows
constexpr int BLOCK_ROWS = WARPS / SPLITS * ROWS;
constexpr int KEPT = 64;  // columns of B in shared memory; of a higher rank, the first

// A lane's columns of 16 bytes of one row; WHOLE: rows are whole vectors.
template <bool WHOLE, int SIZE, class T>
__device__ __forceinline__ void load_columns(const T* row, int j, int in_features, float* to) {
  load_padded<SIZE>(row, j, WHOLE ? i64(j) + SIZE : in_features, to, WHOLE);
}

template <int SIZE>
__device__ __forceinline__ void add_row(float (&update)[ROWS][SIZE], const float* b,
                                        const float* column) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
#pragma unroll
    for (int i = 0; i < SIZE; ++i) update[row][i] = __fmaf_rn(b[row], column[i], update[row][i]);
}

// Adds the squares of a lane's columns to `sum`, of the rows from `first` on.
template <bool WHOLE, class T>
__device__ __forceinline__ void add_squares(const T* __restrict__ W, const T* __restrict__ A,
                                            const T* __restrict__ B,
                                            const float (*factor)[BLOCK_ROWS], float* sum,
                                            int first, int j, int in_features,
                                            int out_features, int r, float scaling) {
  constexpr int SIZE = Vector<T>::size;
  float update[ROWS][SIZE] = {}, column[SIZE], b[ROWS];
  const int kept = r < KEPT ? r : KEPT;
#pragma unroll 2
  for (int k = 0; k < kept; ++k, A += in_features) {
    load_columns<WHOLE, SIZE>(A, j, in_features, column);
#pragma unroll
    for (int row = 0; row < ROWS; row += 4) load_padded<4>(factor[k], row, ROWS, b + row);
    add_row<SIZE>(update, b, column);
  }
#pragma unroll 1
  for (int k = kept; k < r; ++k, A += in_features) {
    load_columns<WHOLE, SIZE>(A, j, in_features, column);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int o = first + row;
      b[row] = o < out_features ? to_float(B[i64(o) * r + k]) : 0.0f;
    }
    add_row<SIZE>(update, b, column);
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int o = first + row;
    if (o >= out_features) break;
    load_columns<WHOLE, SIZE>(W + i64(o) * in_features, j, in_features, column);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float v = __fmaf_rn(scaling, update[row][i], column[i]);
      sum[row] = __fmaf_rn(v, v, sum[row]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
row_norm(const T* __restrict__ W, const T* __restrict__ A, const T* __restrict__ B,
         float* __restrict__ norm, int in_features, int out_features, int r, float scaling) {
  constexpr int SIZE = Vector<T>::size, STRIDE = SPLITS * WARP * SIZE;
  alignas(16) __shared__ float factor[KEPT][BLOCK_ROWS];
  __shared__ float part[SPLITS][BLOCK_ROWS];
  const int first = blockIdx.x * BLOCK_ROWS;
  for (int i = threadIdx.x; i < KEPT * BLOCK_ROWS; i += THREADS) {
    const int o = first + i % BLOCK_ROWS, k = i / BLOCK_ROWS;
    factor[k][i % BLOCK_ROWS] =
        o < out_features && k < r ? to_float(B[i64(o) * r + k]) : 0.0f;
  }
  __syncthreads();

  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int split = warp % SPLITS, own = warp / SPLITS * ROWS;
  const auto here = reinterpret_cast<const float(*)[BLOCK_ROWS]>(&factor[0][own]);
  float sum[ROWS] = {};
  if (in_features % SIZE == 0) {
#pragma unroll 1
    for (int j = (split * WARP + lane) * SIZE; j < in_features; j += STRIDE)
      add_squares<true>(W, A, B, here, sum, first + own, j, in_features, out_features, r,
                        scaling);
  } else {
#pragma unroll 1
    for (int j = (split * WARP + lane) * SIZE; j < in_features; j += STRIDE)
      add_squares<false>(W, A, B, here, sum, first + own, j, in_features, out_features, r,
                         scaling);
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const float total = warp_sum(sum[row]);
    if (lane == 0) part[split][own + row] = total;
  }
  __syncthreads();
  const int o = first + threadIdx.x;
  if (threadIdx.x >= BLOCK_ROWS || o >= out_features) return;
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < SPLITS; ++k) total = __fadd_rn(total, part[k][threadIdx.x]);
  norm[o] = __fsqrt_rn(total);
}
