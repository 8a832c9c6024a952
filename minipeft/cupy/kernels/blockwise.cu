// Blockwise quantization to a codebook of 2, 4, 8 or 16 values, and back.
//
//   quantize    a_b = max |W_i| over block b, q_i = the code nearest to W_i * (1 / a_b)
//   dequantize  W_i = float32(c[q_i]) * a_b, rounded once to the output's dtype
//
// Codes are packed one after another, the first in the HIGH bits.
//
// Bytes moved a value (s = bytes of its dtype, b = bits of a code, B = block size):
//   quantize    s read, b/8 + 4/B written; its second read comes from L1 or L2
//   dequantize  b/8 + 4/B read, s written
// Operations a value: quantize 1 maximum, 1 product, 4 comparisons; dequantize 1 product.
//
// Roofline: under 3 operations a byte, where a GPU has room for 10 and more, so memory
// bounds both. NF4, B = 64, float16 moves 2.5625 bytes a value: at 1.5 TB/s no kernel can
// pass 585 billion values a second, that is 1.7 microseconds for a million.
//
// Launch: 256 threads.
//   quantize    a CUDA block takes max(B, 2048) values, a thread 8 neighbours at a time
//   dequantize  a CUDA block takes 8192 values
#include "common.cuh"

constexpr int THREADS = 256;

// quantize ------------------------------------------------------------------------------

constexpr int GROUP = 8;  // neighbours of one thread: eight codes always end on a byte
constexpr int TILE = THREADS * GROUP;

// Position among the sorted values: how many of the ascending midpoints lie below x.
// `>` sends a tie to the lower value. Unused midpoints are +inf.
__device__ __forceinline__ int nearest(float x, const float* midpoints) {
  int position = 0;
#pragma unroll
  for (int step = 8; step > 0; step >>= 1)
    position += x > midpoints[position + step - 1] ? step : 0;
  return position;
}

// The reciprocal of a subnormal overflows; lifting value and absmax by 2^64 is exact.
struct Scale {
  float lift, inverse;
  __device__ __forceinline__ explicit Scale(float absmax) {
    lift = absmax < 0x1p-126f ? 0x1p64f : 1.0f;
    inverse = absmax == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fmul_rn(absmax, lift));
  }
  __device__ __forceinline__ float operator()(float w) const {
    return __fmul_rn(__fmul_rn(w, lift), inverse);
  }
};

// Eight codes of `bits` bits, the first in the high bits of `word`.
__device__ __forceinline__ void store_codes(byte* packed, i64 first, i64 n, int bits,
                                            unsigned word) {
  const i64 to = first / 8 * bits;
  if (bits == 4 && first + GROUP <= n) {
    *reinterpret_cast<unsigned*>(packed + to) = __byte_perm(word, 0, 0x0123);
    return;
  }
  const i64 end = (n * bits + 7) / 8;
  for (int j = 0; j < bits && to + j < end; ++j)
    packed[to + j] = static_cast<byte>(word >> 8 * (bits - 1 - j));
}

// order: 16 nibbles, the code that stands at each position of the sorted codebook.
// bad: holds n at the start; at the end, the first index whose value is not finite.
template <class T>
__global__ void __launch_bounds__(THREADS)
quantize(const T* __restrict__ W, const float* __restrict__ midpoints, u64 order,
         byte* __restrict__ packed, float* __restrict__ absmax, u64* __restrict__ bad, i64 n,
         int log2_blocksize, int bits) {
  __shared__ float boundary[16];
  __shared__ float warp_max[THREADS / WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const i64 blocksize = i64(1) << log2_blocksize;
  const i64 span = blocksize > TILE ? blocksize : TILE;
  const i64 start = blockIdx.x * span;
  const i64 end = start + span < n ? start + span : n;

  // 1. Every thread's own maxima. A block longer than a tile is read tile by tile.
  float m[GROUP] = {};
  for (i64 tile = start; tile < end; tile += TILE) {
    const i64 first = tile + threadIdx.x * GROUP;
    float w[GROUP];
    load_padded<GROUP>(W, first, n, w);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (!(fabsf(w[i]) <= 0x1.fffffep127f)) atomicMin(bad, u64(first + i));
      m[i] = fmaxf(m[i], fabsf(w[i]));
    }
  }

  // 2. A butterfly over the bits of the index: bits 0 to 2 are within the thread, 3 to 7
  //    within the warp, 8 and above go through shared memory.
#pragma unroll
  for (int bit = 0; bit < 3; ++bit)
    if (bit < log2_blocksize)
#pragma unroll
      for (int i = 0; i < GROUP; ++i)
        if (!(i >> bit & 1)) m[i] = m[i | 1 << bit] = fmaxf(m[i], m[i | 1 << bit]);
#pragma unroll
  for (int bit = 3; bit < 8; ++bit)
    if (bit < log2_blocksize)
      m[0] = fmaxf(m[0], __shfl_xor_sync(ALL_LANES, m[0], 1 << (bit - 3)));
  if (lane == 0) warp_max[warp] = m[0];
  if (threadIdx.x < 16) boundary[threadIdx.x] = midpoints[threadIdx.x];
  __syncthreads();
  if (log2_blocksize > 8) {
    const int warps = log2_blocksize < 11 ? 1 << (log2_blocksize - 8) : THREADS / WARP;
    for (int k = 0; k < warps; ++k) m[0] = fmaxf(m[0], warp_max[warp / warps * warps + k]);
  }
  if (log2_blocksize >= 3)
#pragma unroll
    for (int i = 1; i < GROUP; ++i) m[i] = m[0];

  // 3. Codes.
  for (i64 tile = start; tile < end; tile += TILE) {
    const i64 first = tile + threadIdx.x * GROUP;
    if (first >= n) break;
    float w[GROUP];
    load_padded<GROUP>(W, first, n, w);
    Scale scale(m[0]);
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (log2_blocksize < 3) scale = Scale(m[i]);
      word = word << bits | unsigned(order >> 4 * nearest(scale(w[i]), boundary) & 15);
      if (((first + i) & (blocksize - 1)) == 0 && first + i < n)
        absmax[(first + i) >> log2_blocksize] = m[i];
    }
    store_codes(packed, first, n, bits, word);
  }
}

// dequantize ----------------------------------------------------------------------------

constexpr int LOG2_VALUES = 13;  // of a CUDA block: 16 packed bytes a thread at 4 bits
constexpr int VALUES = 1 << LOG2_VALUES;
constexpr int STAGED = VALUES / 8 * 4;

// Neighbouring threads load neighbouring 16 bytes, and store neighbouring 16 bytes. One
// load holds 32 codes and one store 4 or 8 values, so the codes change hands in shared
// memory between the two.
template <class T>
__global__ void __launch_bounds__(THREADS)
dequantize(const byte* __restrict__ packed, const float* __restrict__ absmax,
           const float* __restrict__ codebook, T* __restrict__ out, i64 n,
           int log2_blocksize, int bits) {
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
  absmax += start >> log2_blocksize;
  out += start;
  for (int first = threadIdx.x * SIZE; first < left; first += THREADS * SIZE) {
    unsigned word = 0;  // the eight codes among which ours are
    for (int j = 0; j < bits; ++j) word = word << 8 | staged[first / 8 * bits + j];
    Vector<T> y;
    float scale = 0.0f;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const int at = first + i;
      if ((i == 0 || (at & in_block) == 0) && at < left) scale = absmax[at >> shift];
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
