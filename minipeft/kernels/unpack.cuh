// Packed codes to values, the scale of a block being whatever `scale_of(block)` says.
#include "common.cuh"

constexpr int LOG2_VALUES = 13;  // of a CUDA block: 16 packed bytes a thread at 4 bits
constexpr int VALUES = 1 << LOG2_VALUES;
constexpr int STAGED = VALUES / 8 * 4;

// Neighbouring threads load neighbouring 16 bytes, and store neighbouring 16 bytes. One
// load holds 32 codes and one store 4 or 8 values, so the codes change hands in shared
// memory between the two.
template <int THREADS, class T, class ScaleOf>
__device__ __forceinline__ void unpack(const byte* __restrict__ packed,
                                       const float* __restrict__ codebook,
                                       T* __restrict__ out, i64 n, int log2_blocksize,
                                       int bits, ScaleOf scale_of) {
  constexpr int SIZE = Vector<T>::size;
  alignas(16) __shared__ byte staged[STAGED];
  __shared__ float value[16];
  const i64 start = blockIdx.x * i64(VALUES);
  const int offset = threadIdx.x * 16;
  const i64 from = start / 8 * bits + offset, end = (n * bits + 7) / 8;
  if (offset < VALUES / 8 * bits) {
    if (from + 16 <= end)
      store_vector(staged + offset, load_vector(packed + from));
    else
#pragma unroll 1
      for (int j = 0; j < 16; ++j) staged[offset + j] = from + j < end ? packed[from + j] : 0;
  }
  if (threadIdx.x < 1u << bits) value[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();

  // From here on 32 bits are enough: a tile starts at a multiple of the block size, or
  // lies within one block.
  const int left = n - start < VALUES ? int(n - start) : VALUES;
  const int shift = log2_blocksize < LOG2_VALUES ? log2_blocksize : LOG2_VALUES;
  const int in_block = (1 << shift) - 1;
  const i64 block = start >> log2_blocksize;
  out += start;
  for (int first = threadIdx.x * SIZE; first < left; first += THREADS * SIZE) {
    unsigned word = 0;  // the eight codes among which ours are
    for (int j = 0; j < bits; ++j) word = word << 8 | staged[first / 8 * bits + j];
    Vector<T> y;
    float scale = 0.0f;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const int at = first + i;
      if ((i == 0 || (at & in_block) == 0) && at < left)
        scale = scale_of(block + (at >> shift));
      const unsigned code = word >> bits * (7 - at % 8) & ((1u << bits) - 1);
      y.at[i] = from_float<T>(__fmul_rn(value[code], scale));
    }
    if (first + SIZE <= left)
      store_vector(out + first, y);
    else
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (first + i < left) out[first + i] = y.at[i];
  }
}
