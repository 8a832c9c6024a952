// How a block is scaled before its codes are looked up.
#include "common.cuh"

// Multiplies by 1 / absmax. The reciprocal of a subnormal may overflow; lifting value and
// absmax by 2^64 first is exact. A zero block is scaled to zeros.
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

// Position among the sorted values: how many of COUNT - 1 ascending midpoints lie below x,
// COUNT a power of two. `>` sends a tie to the lower value. Unused midpoints are +inf.
template <int COUNT>
__device__ __forceinline__ int nearest(float x, const float* midpoints) {
  int position = 0;
#pragma unroll
  for (int step = COUNT / 2; step > 0; step >>= 1)
    position += x > midpoints[position + step - 1] ? step : 0;
  return position;
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 0x1.fffffep127f; }
