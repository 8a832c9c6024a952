// The product of a warp on tensor cores: D (16 x 8) += A (16 x 16) B (16 x 8), values of 16
// bits, sums in float32.
//
// With g = lane / 4 and t = lane % 4 a lane holds, two values a register, the first in the
// low half:
//   a[0], a[1]   rows g and g + 8 of A, columns 2 t and 2 t + 1;   a[2], a[3]  8 columns on
//   b[0]         rows 2 t and 2 t + 1 of column g of B;            b[1]        8 rows on
//   d[0], d[1]   row g of D, columns 2 t and 2 t + 1;              d[2], d[3]  row g + 8
//
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16". Products are exact; how sums are
// rounded is not specified, no better than to float32 toward zero.
#include "common.cuh"

// Two neighbours as one register.
template <class T> __device__ __forceinline__ unsigned paired(T first, T second) {
  Vector<T, 2> pair{first, second};
  return *reinterpret_cast<const unsigned*>(&pair);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define MMA(TYPE)                                                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                       \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const unsigned (&a)[4],
                                            const unsigned (&b)[2]) {
  MMA("f16");
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                                   const unsigned (&b)[2]) {
  MMA("bf16");
}
#undef MMA
#else
template <class T>
__device__ __forceinline__ float add_products(unsigned a, unsigned b, float sum) {
  const T *u = reinterpret_cast<const T*>(&a), *v = reinterpret_cast<const T*>(&b);
  sum = __fmaf_rn(to_float(u[0]), to_float(v[0]), sum);
  return __fmaf_rn(to_float(u[1]), to_float(v[1]), sum);
}

// For devices without these tensor cores: each lane reads the other lanes' registers.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      unsigned u[2], v[2];
      for (int i = 0; i < 2; ++i) {
        u[i] = __shfl_sync(ALL_LANES, a[2 * half + i], 4 * g + q);
        v[i] = __shfl_sync(ALL_LANES, b[half], 4 * (2 * t + i) + q);
      }
      for (int i = 0; i < 4; ++i) d[i] = add_products<T>(u[i / 2], v[i % 2], d[i]);
    }
}
#endif
