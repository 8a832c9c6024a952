// Double quantization: the scales of the blocks are stored in eight bits.
//
//   nest               c'_j = the k of the q'_k, values of the dynamic map, nearest to
//                      (a_j - mean a) * (1 / a'), a' = max |a_j - mean a| over N' scales
//   dequantize_nested  W_i = q[c_i] * (q'[c'_j] * a' + mean a), scales decoded on the way
//
// Bytes moved a value (s = bytes of its dtype, b = bits of a code, N and N' = block sizes):
//   nest               a scale: 4 read, 1 + 4/N' written; an N-th of that for each weight
//   dequantize_nested  b/8 + 1/N + 4/(N N') read, s written; separate kernels for the
//                      scales and the weights would write and read 8/N more
// Operations:
//   nest               a scale: 2 differences, 1 maximum, 1 product, 8 comparisons
//   dequantize_nested  a value: 1 product; its scale: a product and a sum for every thread
//                      that uses it, 1/8 each
//
// Roofline: under one operation a byte, so memory bounds it. NF4, N = 64, N' = 256, float16
// moves 2.516 bytes a value: 2 % less than with plain scales, in time too.
//
// Launch: 256 threads.
//   nest               a CUDA block takes the N' scales of one nested block
//   dequantize_nested  a CUDA block takes 8192 values
#include "scale.cuh"
#include "unpack.cuh"

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
nest(const float* __restrict__ absmax, const float* __restrict__ midpoints,
     byte* __restrict__ codes, float* __restrict__ nested_absmax, i64 n, float offset,
     int log2_blocksize) {
  __shared__ float boundary[256];
  __shared__ float part[THREADS / WARP];
  const i64 start = i64(blockIdx.x) << log2_blocksize;
  const i64 full = start + (i64(1) << log2_blocksize), end = full < n ? full : n;
  float m = 0.0f;
  for (i64 i = start + threadIdx.x; i < end; i += THREADS)
    m = fmaxf(m, fabsf(__fsub_rn(absmax[i], offset)));
  m = warp_max(m);
  if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = m;
  boundary[threadIdx.x] = midpoints[threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < THREADS / WARP; ++k) m = fmaxf(m, part[k]);
  const Scale scale(m);
  for (i64 i = start + threadIdx.x; i < end; i += THREADS)
    codes[i] = byte(nearest<256>(scale(__fsub_rn(absmax[i], offset)), boundary));
  if (threadIdx.x == 0) nested_absmax[blockIdx.x] = m;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
dequantize_nested(const byte* __restrict__ packed, const byte* __restrict__ absmax_codes,
                  const float* __restrict__ nested_absmax, const float* __restrict__ map,
                  const float* __restrict__ offset, int log2_nested_blocksize,
                  const float* __restrict__ codebook,
                  T* __restrict__ out, i64 n, int log2_blocksize, int bits) {
  unpack<THREADS>(packed, codebook, out, n, log2_blocksize, bits, [=](i64 block) {
    const float nested = nested_absmax[block >> log2_nested_blocksize];
    return __fadd_rn(__fmul_rn(map[absmax_codes[block]], nested), *offset);
  });
}
