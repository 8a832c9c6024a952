// Packed codes to values; `scale_of(block)` returns the scale of a block.
#include "common.cuh"

constexpr int LOG2_VALUES = 13;  // of a CUDA block
constexpr int VALUES = 1 << LOG2_VALUES;
constexpr int STAGED = VALUES / 8 * 4;

template <int BYTES> struct Codes;
template <> struct Codes<2> { typedef unsigned short type; };
template <> struct Codes<4> { typedef unsigned type; };

// A whole tile of 4-bit codes whose vectors lie within blocks. Neighbouring threads load
// neighbouring codes, as many as make 16 bytes of output, and all loads are under way at
// once. The loop has only the instructions that every value needs.
template <int THREADS, class T, class ScaleOf>
__device__ __forceinline__ void unpack_whole(const byte* __restrict__ packed,
                                             const float* value, T* __restrict__ out,
                                             i64 block, int shift, ScaleOf scale_of) {
  constexpr int SIZE = Vector<T>::size, PASSES = VALUES / (THREADS * SIZE);
  typedef typename Codes<SIZE / 2>::type Word;
  unsigned word[PASSES];
  float scale[PASSES];
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const unsigned at = (pass * THREADS + threadIdx.x) * SIZE;
    word[pass] = *reinterpret_cast<const Word*>(packed + at / 2);
    scale[pass] = scale_of(block + (at >> shift));
  }
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    Vector<T> y;
#pragma unroll
    for (int i = 0; i < SIZE; i += 2) {  // a byte: its first code in the high bits
      const unsigned high = word[pass] >> (4 * i + 4) & 15, low = word[pass] >> 4 * i & 15;
      store_pair(y.at + i, __fmul_rn(value[high], scale[pass]),
                 __fmul_rn(value[low], scale[pass]));
    }
    store_vector(out + (pass * THREADS + threadIdx.x) * SIZE, y);
  }
}

// Any other tile. Neighbouring threads load neighbouring 16 bytes, and store neighbouring
// 16 bytes. One load holds 128 bits of codes and one store 4 or 8 values, so threads
// exchange the codes through shared memory.
template <int THREADS, class T, class ScaleOf>
__device__ __forceinline__ void unpack_any(const byte* staged, const float* value,
                                           T* __restrict__ out, int left, i64 block,
                                           int shift, int bits, ScaleOf scale_of) {
  constexpr int SIZE = Vector<T>::size;
  const int in_block = (1 << shift) - 1;
#pragma unroll 1
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

template <int THREADS, class T, class ScaleOf>
__device__ __forceinline__ void unpack(const byte* __restrict__ packed,
                                       const float* __restrict__ codebook,
                                       T* __restrict__ out, i64 n, int log2_blocksize,
                                       int bits, ScaleOf scale_of) {
  alignas(16) __shared__ byte staged[STAGED];
  __shared__ float value[16];
  const i64 start = blockIdx.x * i64(VALUES);
  // From here on 32 bits are enough: a tile starts at a multiple of the block size, or
  // lies within one block.
  const int left = n - start < VALUES ? int(n - start) : VALUES;
  const int shift = log2_blocksize < LOG2_VALUES ? log2_blocksize : LOG2_VALUES;
  const i64 block = start >> log2_blocksize;
  const bool whole = bits == 4 && left == VALUES && Vector<T>::size <= 1 << shift;
  const int offset = threadIdx.x * 16;
  if (!whole && offset < VALUES / 8 * bits) {
    const i64 from = start / 8 * bits + offset, end = (n * bits + 7) / 8;
    if (from + 16 <= end)
      store_vector(staged + offset, load_vector(packed + from));
    else
#pragma unroll 1
      for (int j = 0; j < 16; ++j) staged[offset + j] = from + j < end ? packed[from + j] : 0;
  }
  if (threadIdx.x < 1u << bits) value[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  if (whole)
    unpack_whole<THREADS>(packed + start / 2, value, out + start, block, shift, scale_of);
  else
    unpack_any<THREADS>(staged, value, out + start, left, block, shift, bits, scale_of);
}
