// AdamW: one step of a tensor, its moments in float32 or in eight bits.
//
//   m = m + (1 - b1) (g - m)                       v = b2 v + (1 - b2) g g
//   W = (1 - lr wd) W - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//
// Every operation is rounded to float32, the next W once more to its own dtype. In eight
// bits a moment is a code of the dynamic map times the absmax of its block of 256: decoded,
// updated and encoded again within the kernel, so that it never lies in memory as float32.
//
// Bytes moved a value (s = bytes of the dtype of W):
//   adamw       W, g read and W written: 3 s; m, v read and written: 16. 28 in float32
//   adamw_8bit  W, g read and W written: 3 s; codes 2 read, 2 written; scales 16/256:
//               16.06 in float32, 10.06 in 16 bits
// Operations a value: 14, with a division and a square root; in eight bits 16 comparisons
// more.
//
// Roofline: at most 3 operations a byte, so memory bounds both. A billion parameters in
// float32 at 1.5 TB/s: 18.7 ms a step, and 10.7 ms with states of eight bits.
//
// Launch: 256 threads.
//   adamw       a thread takes 16 bytes of W
//   adamw_8bit  a thread takes 4 values, two warps a block of 256, a CUDA block 8 times 1024
//               values, so that the 4 KB of tables are loaded once for many
#include "scale.cuh"

constexpr int THREADS = 256;

// The settings of a step.
struct Step {
  float decay, new_m, beta2, new_v, minus_step, correction, eps;

  __device__ __forceinline__ void update(float& w, float g, float& m, float& v) const {
    m = __fadd_rn(m, __fmul_rn(new_m, __fsub_rn(g, m)));
    const float square = __fmul_rn(__fmul_rn(new_v, g), g);
    v = __fadd_rn(__fmul_rn(beta2, v), square);
    const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction), eps);
    w = __fadd_rn(__fmul_rn(w, decay), __fdiv_rn(__fmul_rn(minus_step, m), root));
  }
};

template <int COUNT, class T>
__device__ __forceinline__ void store(T* to, i64 first, i64 n, const float* from) {
  constexpr int SIZE = vector_size<T, COUNT>;
  if (first + COUNT <= n) {
#pragma unroll
    for (int v = 0; v < COUNT; v += SIZE) {
      Vector<T, SIZE> part;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) part.at[i] = from_float<T>(from[v + i]);
      store_vector(to + first + v, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (first + i < n) to[first + i] = from_float<T>(from[i]);
  }
}

// An output may be its own input: a thread reads before it writes, and only what it writes.
// bad: holds n at the start; at the end, the first index whose gradient is not finite. Null
// where the caller has looked.
template <class T>
__global__ void __launch_bounds__(THREADS, 4)
adamw(const T* W, const T* __restrict__ grad, const float* m_in, const float* v_in,
      T* W_out, float* m_out, float* v_out, u64* __restrict__ bad, i64 n, float decay,
      float new_m, float beta2, float new_v, float minus_step, float correction,
      float eps) {
  constexpr int SIZE = Vector<T>::size;
  const Step step{decay, new_m, beta2, new_v, minus_step, correction, eps};
  const i64 first = (i64(blockIdx.x) * THREADS + threadIdx.x) * SIZE;
  if (first >= n) return;
  float w[SIZE], g[SIZE], m[SIZE], v[SIZE];
  load_padded<SIZE>(W, first, n, w);
  load_padded<SIZE>(grad, first, n, g);
  load_padded<SIZE>(m_in, first, n, m);
  load_padded<SIZE>(v_in, first, n, v);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    if (bad && !is_finite(g[i])) atomicMin(bad, u64(first + i));
    step.update(w[i], g[i], m[i], v[i]);
  }
  store<SIZE>(W_out, first, n, w);
  store<SIZE>(m_out, first, n, m);
  store<SIZE>(v_out, first, n, v);
}

// Eight bits ----------------------------------------------------------------------------

constexpr int BLOCK = 256;  // values that share a scale
constexpr int GROUP = 4;    // neighbours of one thread: 4 bytes of codes
constexpr int TILE = THREADS * GROUP;

// The values and the boundaries of both dynamic maps.
struct Maps {
  float m[256], m_midpoints[256], v[256], v_midpoints[256];
};

__device__ __forceinline__ void decode(const byte* codes, i64 first, i64 n, float scale,
                                       const float* map, float* to) {
  unsigned word = 0;
  if (first + GROUP <= n)
    word = *reinterpret_cast<const unsigned*>(codes + first);
  else
    for (int i = 0; i < GROUP && first + i < n; ++i)
      word |= unsigned(codes[first + i]) << 8 * i;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    const float value = __fmul_rn(map[word >> 8 * i & 255], scale);
    to[i] = first + i < n ? value : 0.0f;
  }
}

__device__ __forceinline__ void encode(byte* codes, i64 first, i64 n, const Scale& scale,
                                       const float* midpoints, const float* from) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i)
    word |= unsigned(nearest<256>(scale(from[i]), midpoints)) << 8 * i;
  if (first + GROUP <= n)
    *reinterpret_cast<unsigned*>(codes + first) = word;
  else
    for (int i = 0; i < GROUP && first + i < n; ++i) codes[first + i] = byte(word >> 8 * i);
}

__device__ __forceinline__ float largest(const float* of) {
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) m = fmaxf(m, fabsf(of[i]));
  return warp_max(m);
}

// As above; a block's scales are read by all its threads before a barrier and written after.
// bad: also where a moment is not finite, which no scale could hold.
template <class T>
__global__ void __launch_bounds__(THREADS)
adamw_8bit(const T* W, const T* __restrict__ grad, const byte* m_codes,
           const byte* v_codes, const float* m_absmax, const float* v_absmax,
           const float* __restrict__ maps, T* W_out, byte* m_codes_out, byte* v_codes_out,
           float* m_absmax_out, float* v_absmax_out, u64* __restrict__ bad, i64 n,
           float decay, float new_m, float beta2, float new_v, float minus_step,
           float correction, float eps) {
  alignas(16) __shared__ Maps map;
  __shared__ float part[2][THREADS / WARP];
  const Step step{decay, new_m, beta2, new_v, minus_step, correction, eps};
  const int warp = threadIdx.x / WARP;
  store_vector(reinterpret_cast<float*>(&map) + threadIdx.x * 4,
               load_vector(maps + threadIdx.x * 4));
  __syncthreads();

  for (i64 tile = i64(blockIdx.x) * TILE; tile < n; tile += i64(gridDim.x) * TILE) {
    const i64 first = tile + threadIdx.x * GROUP, block = first / BLOCK;
    const bool inside = first < n;
    float w[GROUP], g[GROUP], m[GROUP], v[GROUP];
    load_padded<GROUP>(W, first, n, w);
    load_padded<GROUP>(grad, first, n, g);
    decode(m_codes, first, n, inside ? m_absmax[block] : 0.0f, map.m, m);
    decode(v_codes, first, n, inside ? v_absmax[block] : 0.0f, map.v, v);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      step.update(w[i], g[i], m[i], v[i]);
      if (bad && !(is_finite(g[i]) && is_finite(m[i]) && is_finite(v[i])))
        atomicMin(bad, u64(first + i));
    }
    const float m_here = largest(m), v_here = largest(v);
    if (threadIdx.x % WARP == 0) {
      part[0][warp] = m_here;
      part[1][warp] = v_here;
    }
    __syncthreads();
    const float m_scale = fmaxf(part[0][warp], part[0][warp ^ 1]);
    const float v_scale = fmaxf(part[1][warp], part[1][warp ^ 1]);
    __syncthreads();  // before the next tile writes `part`
    store<GROUP>(W_out, first, n, w);
    encode(m_codes_out, first, n, Scale(m_scale), map.m_midpoints, m);
    encode(v_codes_out, first, n, Scale(v_scale), map.v_midpoints, v);
    if (first % BLOCK == 0 && inside) {
      m_absmax_out[block] = m_scale;
      v_absmax_out[block] = v_scale;
    }
  }
}
