// DoRA's norms: the length of every row of V = W + s B A, without forming V.
//
//   norm_o = sqrt(sum_j (W_oj + s sum_k B_ok A_kj)^2)
//
// An element of V lives in a register until it is squared, so no memory of the size of W is
// needed, and nothing cancels as in the expanded |W|^2 + 2 s W.BA + s^2 |BA|^2. Sums are kept
// in float32.
//
// A and B have the dtype of W (`row_norm`), or are float32 beside W of 16 bits
// (`row_norm_mixed`), as in training.
//
// Bytes moved an element of W (s = bytes of its dtype, f of theirs, r = rank): s read from
// DRAM; of A, from L2, f r / 16 where W is float32 and f r / 32 where it has 16 bits, as the
// rows of a CUDA block share it. Flops: 2 r + 3.
//
// Roofline: at r = 16, ordinary units need 16 instructions a weight for the products alone.
// In float32, the memory of an H100 needs more time than these instructions. In 16 bits it
// needs half as much, and the instructions would bound the kernel. So in 16 bits tensor cores
// compute B A: 16 ranks are a quarter of an instruction a weight, and the kernel issues about
// 11. They take half of the time of the memory, as calculated from the issue slots of an
// H100, not timed. To write B A to memory and read it again would move 4 s more bytes an
// element. Of float32 A and B tensor cores take six products instead of one (see below):
// 16 instructions at r = 16, still less time than the memory; with 32 ranks 25, with 64 44,
// which take longer than the memory, and half as long as by ordinary units.
//
// Launch: 256 threads.
//   float32   16 rows. A warp takes 8 rows and every fourth stretch of columns; a lane 16
//             bytes of W and of each row of A at a time
//   16 bits   32 rows. A warp takes 16 rows and every fourth stretch of 64 columns
//   mixed     32 rows. A warp takes all of them and every eighth stretch of 32 columns
#include "split.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 8;    // of a warp
constexpr int SPLITS = 4;  // of the columns, among the warps of the same rows
constexpr int BLOCK_ROWS = WARPS / SPLITS * ROWS;
constexpr int KEPT = 64;  // columns of B in shared memory; of a higher rank, the first

// The columns of one row that a lane loads: 16 bytes. WHOLE: rows are whole vectors.
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
__device__ __forceinline__ void row_norm_of(const T* __restrict__ W, const T* __restrict__ A,
                                            const T* __restrict__ B,
                                            float* __restrict__ norm, int in_features,
                                            int out_features, int r, float scaling) {
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

// Sixteen bits, on tensor cores -----------------------------------------------------------

constexpr int TILE_ROWS = 16;    // of a warp: those of one product
constexpr int TILE_COLUMNS = 64;  // of a warp at a time: eight products side by side
constexpr int HIGH = WARPS / SPLITS * TILE_ROWS;
constexpr int DEEP = 16;  // ranks of one product
constexpr int PITCH = KEPT + 8;  // of a row in shared memory: lanes read different banks

// Eight columns of a row; zeros where there are none.
template <class T>
__device__ __forceinline__ Vector<T> columns_of(const T* row, bool there, int j,
                                                int in_features) {
  constexpr int SIZE = Vector<T>::size;
  if (there && in_features % SIZE == 0 && j < in_features) return load_vector(row + j);
  Vector<T> to;
#pragma unroll
  for (int i = 0; i < SIZE; ++i)
    to.at[i] = there && j + i < in_features ? row[j + i] : from_float<T>(0.0f);
  return to;
}

// Two neighbours of a row of B.
template <class T>
__device__ __forceinline__ unsigned ranks_of(const T* kept, const T* row, bool there, int k,
                                             int r) {
  if (k < KEPT) return *reinterpret_cast<const unsigned*>(kept + k);
  const T zero = from_float<T>(0.0f);
  return paired(there && k < r ? row[k] : zero, there && k + 1 < r ? row[k + 1] : zero);
}

// The columns of a product may stand in any order, for their squares are summed. So a lane
// loads eight neighbours of a row of A at once and gives one of them to each product: of
// product i, column c is the column 8 c + i of the 64.
template <class T>
__device__ __forceinline__ void add_tile(const T* __restrict__ W, const T* __restrict__ A,
                                         const T* __restrict__ B, const T (*kept)[PITCH],
                                         float (&sum)[2], int first, int j, int in_features,
                                         int out_features, int r, float scaling) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  Vector<T> w[2][2];
  bool there[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int o = first + g + 8 * h;
    there[h] = o < out_features;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      w[h][s] = columns_of(W + i64(o) * in_features, there[h], j + 16 * t + 8 * s,
                           in_features);
  }
  float update[8][4] = {};
#pragma unroll 1
  for (int k = 2 * t; k - 2 * t < r; k += DEEP) {
    unsigned b[4];
    Vector<T> a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), deep = k + 8 * (i / 2);
      b[i] = ranks_of(kept[row], B + i64(first + row) * r, there[i % 2], deep, r);
      const int at = k + i % 2 + 8 * (i / 2);
      a[i] = columns_of(A + i64(at) * in_features, at < r, j + 8 * g, in_features);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned of_A[2] = {paired(a[0].at[i], a[1].at[i]),
                                paired(a[2].at[i], a[3].at[i])};
      mma<T>(update[i], b, of_A);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float v = __fmaf_rn(scaling, update[i][2 * h + s], to_float(w[h][s].at[i]));
        sum[h] = __fmaf_rn(v, v, sum[h]);
      }
}

// Adds what four lanes of a row and all warps of the row have; a lane's rows are 8 apart.
template <int COUNT>
__device__ __forceinline__ void write_norms(const float (&sum)[COUNT],
                                            float (*piece)[HIGH], int split, int own,
                                            float* __restrict__ norm, int first,
                                            int out_features) {
  constexpr int PARTS = SPLITS * COUNT / 2;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int h = 0; h < COUNT; ++h) {
    float total = __fadd_rn(sum[h], __shfl_xor_sync(ALL_LANES, sum[h], 1));
    total = __fadd_rn(total, __shfl_xor_sync(ALL_LANES, total, 2));
    if (lane % 4 == 0) piece[split][own + lane / 4 + 8 * h] = total;
  }
  __syncthreads();
  const int o = first + threadIdx.x;
  if (threadIdx.x >= HIGH || o >= out_features) return;
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < PARTS; ++k) total = __fadd_rn(total, piece[k][threadIdx.x]);
  norm[o] = __fsqrt_rn(total);
}

template <class T>
__device__ __forceinline__ void row_norm_16(const T* __restrict__ W, const T* __restrict__ A,
                                            const T* __restrict__ B,
                                            float* __restrict__ norm, int in_features,
                                            int out_features, int r, float scaling) {
  alignas(16) __shared__ T kept[HIGH][PITCH];
  __shared__ float piece[SPLITS][HIGH];
  const int first = blockIdx.x * HIGH;
  for (int i = threadIdx.x; i < HIGH * KEPT; i += THREADS) {
    const int o = first + i / KEPT, k = i % KEPT;
    kept[i / KEPT][k] =
        o < out_features && k < r ? B[i64(o) * r + k] : from_float<T>(0.0f);
  }
  __syncthreads();

  const int warp = threadIdx.x / WARP;
  const int split = warp % SPLITS, own = warp / SPLITS * TILE_ROWS;
  const auto here = reinterpret_cast<const T(*)[PITCH]>(&kept[own][0]);
  float sum[2] = {};
#pragma unroll 1
  for (int j = split * TILE_COLUMNS; j < in_features; j += SPLITS * TILE_COLUMNS)
    add_tile(W, A, B, here, sum, first + own, j, in_features, out_features, r, scaling);
  write_norms(sum, piece, split, own, norm, first, out_features);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
row_norm(const T* __restrict__ W, const T* __restrict__ A, const T* __restrict__ B,
         float* __restrict__ norm, int in_features, int out_features, int r, float scaling) {
  if constexpr (sizeof(T) == 2)
    row_norm_16(W, A, B, norm, in_features, out_features, r, scaling);
  else
    row_norm_of(W, A, B, norm, in_features, out_features, r, scaling);
}

// Sixteen bits, A and B in float32 ---------------------------------------------------------
//
// A warp has 32 rows, so that two products share the splitting of A.

constexpr int NARROW = 32;  // columns of a warp at a time: four products side by side

typedef __nv_bfloat16 Kept[HIGH][PITCH];

// Two neighbours of a row of B, split.
__device__ __forceinline__ void split_ranks(const float* row, bool there, int k, int r,
                                            unsigned (&to)[PIECES]) {
  split_pair(there && k < r ? row[k] : 0.0f, there && k + 1 < r ? row[k + 1] : 0.0f, to);
}

// b[p][i]: part p of register i of the rows of B that start at `row` of the block.
__device__ __forceinline__ void load_ranks(const float* __restrict__ B, const Kept* kept,
                                           int first, int row, int k, int out_features,
                                           int r, unsigned (&b)[PIECES][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = row + 8 * (i % 2), deep = k + 8 * (i / 2), o = first + at;
    if (deep < KEPT) {
#pragma unroll
      for (int p = 0; p < PIECES; ++p)
        b[p][i] = *reinterpret_cast<const unsigned*>(&kept[p][at][deep]);
    } else {
      unsigned parts[PIECES];
      split_ranks(B + i64(o) * r, o < out_features, deep, r, parts);
#pragma unroll
      for (int p = 0; p < PIECES; ++p) b[p][i] = parts[p];
    }
  }
}

// As `add_tile`: of product i, column c is the column 4 c + i of the 32.
template <class T>
__device__ __forceinline__ void add_tile_mixed(const T* __restrict__ W,
                                               const float* __restrict__ A,
                                               const float* __restrict__ B,
                                               const Kept* kept, float (&sum)[4], int first,
                                               int j, int in_features, int out_features,
                                               int r, float scaling) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  Vector<T> w[4];
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    const int o = first + g + 8 * h;
    w[h] = columns_of(W + i64(o) * in_features, o < out_features, j + 8 * t, in_features);
  }
  float update[2][4][4] = {};
#pragma unroll 1
  for (int k = 2 * t; k - 2 * t < r; k += DEEP) {
    Vector<float> a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = k + i % 2 + 8 * (i / 2);
      a[i] = columns_of(A + i64(at) * in_features, at < r, j + 4 * g, in_features);
    }
    unsigned of_A[4][PIECES][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned parts[PIECES];
        split_pair(a[2 * half].at[i], a[2 * half + 1].at[i], parts);
#pragma unroll
        for (int p = 0; p < PIECES; ++p) of_A[i][p][half] = parts[p];
      }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned b[PIECES][4];
      load_ranks(B, kept, first, TILE_ROWS * m + g, k, out_features, r, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_split(update[m][i], b, of_A[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 4; ++h)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float u = update[h / 2][i][2 * (h % 2) + s];
        const float v = __fmaf_rn(scaling, u, to_float(w[h].at[4 * s + i]));
        sum[h] = __fmaf_rn(v, v, sum[h]);
      }
}

// Without these tensor cores a product needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int RESIDENT = 1;
#else
constexpr int RESIDENT = 2;
#endif

template <class T>
__global__ void __launch_bounds__(THREADS, RESIDENT)
row_norm_mixed(const T* __restrict__ W, const float* __restrict__ A,
               const float* __restrict__ B, float* __restrict__ norm, int in_features,
               int out_features, int r, float scaling) {
  alignas(16) __shared__ Kept kept[PIECES];
  __shared__ float piece[WARPS][HIGH];
  const int first = blockIdx.x * HIGH, split = threadIdx.x / WARP;
  for (int i = 2 * threadIdx.x; i < HIGH * KEPT; i += 2 * THREADS) {
    const int row = i / KEPT, k = i % KEPT, o = first + row;
    unsigned parts[PIECES];
    split_ranks(B + i64(o) * r, o < out_features, k, r, parts);
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      *reinterpret_cast<unsigned*>(&kept[p][row][k]) = parts[p];
  }
  __syncthreads();

  float sum[4] = {};
#pragma unroll 1
  for (int j = split * NARROW; j < in_features; j += WARPS * NARROW)
    add_tile_mixed(W, A, B, kept, sum, first, j, in_features, out_features, r, scaling);
  write_norms(sum, piece, split, 0, norm, first, out_features);
}
