// Blockwise quantization to a codebook of 2, 4, 8 or 16 values, and back.
//
//   quantize    a = max |W_i| over a block, c_i = the k of the q_k nearest to W_i * (1 / a)
//   dequantize  W_i = float32(q[c_i]) * a, rounded once to the output's dtype
//
// Codes are packed one after another, the first in the HIGH bits.
//
// Bytes moved a value (s = bytes of its dtype, b = bits of a code, N = block size):
//   quantize    s read, b/8 + 4/N written; its second read comes from L1 or L2
//   dequantize  b/8 + 4/N read, s written
// Operations a value: quantize 1 maximum, 1 product, 4 comparisons; dequantize 1 product.
//
// Roofline: under 3 operations a byte. A GPU computes 10 and more while it moves a byte, so
// by operations memory bounds both. NF4, N = 64, float16 moves 2.5625 bytes a value: at
// 1.5 TB/s at most 585 billion values a second, or 1.7 microseconds for a million.
//
// Launch: 256 threads.
//   quantize    a CUDA block takes max(N, 2048) values, a thread 8 neighbours at a time
//   dequantize  a CUDA block takes 8192 values
#include "scale.cuh"
#include "unpack.cuh"

constexpr int THREADS = 256;

// quantize ------------------------------------------------------------------------------

constexpr int GROUP = 8;  // neighbouring values of one thread: eight codes always end on a byte
constexpr int TILE = THREADS * GROUP;

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
  __shared__ float part[THREADS / WARP];
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
      if (!is_finite(w[i])) atomicMin(bad, u64(first + i));
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
  if (lane == 0) part[warp] = m[0];
  if (threadIdx.x < 16) boundary[threadIdx.x] = midpoints[threadIdx.x];
  __syncthreads();
  if (log2_blocksize > 8) {
    const int warps = log2_blocksize < 11 ? 1 << (log2_blocksize - 8) : THREADS / WARP;
    for (int k = 0; k < warps; ++k) m[0] = fmaxf(m[0], part[warp / warps * warps + k]);
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
      word = word << bits | unsigned(order >> 4 * nearest<16>(scale(w[i]), boundary) & 15);
      if (((first + i) & (blocksize - 1)) == 0 && first + i < n)
        absmax[(first + i) >> log2_blocksize] = m[i];
    }
    store_codes(packed, first, n, bits, word);
  }
}

// dequantize ----------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(THREADS)
dequantize(const byte* __restrict__ packed, const float* __restrict__ absmax,
           const float* __restrict__ codebook, T* __restrict__ out, i64 n,
           int log2_blocksize, int bits) {
  unpack<THREADS>(packed, codebook, out, n, log2_blocksize, bits,
                  [absmax](i64 block) { return absmax[block]; });
}
