// Run CUDA C++ on a CPU: the same kernel source, compiled by g++ behind this header.
//
// dtypes, vector types and conversions come from NVIDIA's own headers, which hold a host
// version of each. The execution model is ours, in fibers.cpp: every CUDA thread is a
// fiber, and between two synchronizations the fibers of a block run in an order that a
// seed shuffles, as do the blocks of a grid. It is stricter than hardware: it stops where
// CUDA leaves the result undefined (a barrier that some threads do not reach, a shuffle
// that reads a lane which is not there).
#ifndef SHIM_HPP
#define SHIM_HPP
#include <cuda_runtime_api.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "model.hpp"

#undef __global__
#undef __device__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __constant__
// Blocks run one after another, so one copy of __shared__ is enough. All threads being
// fibers of one, it can be thread-local: then it lies in one piece, which the shim fills
// with a pattern before each block, and what a kernel reads too early is no lucky value
// of the block before. (The sanitizers look closer at plain statics.)
#ifdef SHIM_POISON
#define __shared__ static thread_local
#else
#define __shared__ static
#endif
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::shim::thread)
#define blockIdx (::shim::block)
#define blockDim (::shim::block_size)
#define gridDim (::shim::grid_size)

inline void __syncthreads() { shim::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::sync_warp(mask); }

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int first = shim::lane() / width * width;
  return shim::shuffle(mask, value, first + (from & (width - 1)), width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() ^ bits, width);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() + by, width);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() - by, width);
}
inline unsigned __ballot_sync(unsigned mask, int vote) { return shim::ballot(mask, vote); }
inline int __any_sync(unsigned mask, int vote) { return shim::ballot(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return shim::ballot(mask, !vote) == 0; }

// g++ is told -ffp-contract=off, so each of these rounds once, as its name promises.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline unsigned __float_as_uint(float a) {
  unsigned bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <class T> T atomicMin(T* to, T value) {
  T old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(to, &old, value, true,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

#endif
