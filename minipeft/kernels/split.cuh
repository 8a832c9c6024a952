// Products of float32 numbers on tensor cores for bfloat16.
//
// A float32 number is the sum of three of bfloat16: a = a_0 + a_1 + a_2, |a_i| <= 2^(-8 i) |a|.
// Of the nine products of a b, the six with i + j <= 2 are computed; the others add up to no
// more than 2^-23 |a b| and a little. So a product is as exact as in float32, at six
// instructions of tensor cores for each 16 ranks. Of |a| >= (2 - 2^-8) 2^127, the last 0.2 %
// of what float32 holds, a_0 is infinite and a_1 NaN.
#include "mma.cuh"

constexpr int PIECES = 3;

// Two neighbours as registers of bfloat16, the largest parts first.
__device__ __forceinline__ void split_pair(float first, float second,
                                           unsigned (&to)[PIECES]) {
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const __nv_bfloat162 high = __floats2bfloat162_rn(first, second);
    to[p] = *reinterpret_cast<const unsigned*>(&high);
    first = __fsub_rn(first, __low2float(high));
    second = __fsub_rn(second, __high2float(high));
  }
}

// D += B A of the parts, the smallest products first.
__device__ __forceinline__ void mma_split(float (&d)[4], const unsigned (&b)[PIECES][4],
                                          const unsigned (&a)[PIECES][2]) {
#pragma unroll
  for (int least = PIECES - 1; least >= 0; --least)
#pragma unroll
    for (int p = 0; p <= least; ++p) mma<__nv_bfloat16>(d, b[p], a[least - p]);
}
