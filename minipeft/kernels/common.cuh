// What every kernel includes: dtypes, 16-byte vectors, and arithmetic with a rounding that
// is explicit. `__fmul_rn`, `__fadd_rn`, … are never fused and never approximated, so a
// kernel built from them gives the reference's bits on any device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

typedef unsigned char byte;
typedef long long i64;
typedef unsigned long long u64;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// One rounding to nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The largest value of a warp, in each of its lanes.
__device__ __forceinline__ float warp_max(float m) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance >>= 1)
    m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, distance));
  return m;
}

// The sum over a warp, in each of its lanes, added as a balanced tree.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance >>= 1)
    x = __fadd_rn(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

// 16 bytes, the widest load and store of a thread, or 8 bytes. The address must be a
// multiple of that size; the launchers check it.
template <class T, int SIZE = 16 / sizeof(T)> struct alignas(SIZE * sizeof(T)) Vector {
  static constexpr int size = SIZE;
  T at[SIZE];
};

template <int BYTES> struct Word;
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

template <class V> __device__ __forceinline__ void copy_vector(V* to, const V* from) {
  typedef typename Word<sizeof(V)>::type Whole;
  *reinterpret_cast<Whole*>(to) = *reinterpret_cast<const Whole*>(from);
}

template <int SIZE, class T>
__device__ __forceinline__ Vector<T, SIZE> load_vector(const T* from) {
  Vector<T, SIZE> to;
  copy_vector(&to, reinterpret_cast<const Vector<T, SIZE>*>(from));
  return to;
}

template <class T> __device__ __forceinline__ Vector<T> load_vector(const T* from) {
  return load_vector<Vector<T>::size>(from);
}

template <class T, int SIZE>
__device__ __forceinline__ void store_vector(T* to, Vector<T, SIZE> from) {
  copy_vector(reinterpret_cast<Vector<T, SIZE>*>(to), &from);
}

// Two values at once: one instruction converts both.
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}
__device__ __forceinline__ void store_pair(__half* to, float first, float second) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
}

template <class T> __device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// The values of a vector, where a thread takes no more than COUNT.
template <class T, int COUNT>
constexpr int vector_size = COUNT < Vector<T>::size ? COUNT : Vector<T>::size;

// `COUNT` consecutive values as float32; what lies at `n` or beyond reads as zero. `whole`
// says that `from` is aligned, so that a vector can be read at a time.
template <int COUNT, class T>
__device__ __forceinline__ void load_padded(const T* from, i64 first, i64 n, float* to,
                                            bool whole = true) {
  constexpr int SIZE = vector_size<T, COUNT>;
  if (whole && first + COUNT <= n) {
#pragma unroll
    for (int v = 0; v < COUNT; v += SIZE) {
      const Vector<T, SIZE> part = load_vector<SIZE>(from + first + v);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) to[v + i] = to_float(part.at[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = first + i < n ? to_float(from[first + i]) : 0.0f;
  }
}
