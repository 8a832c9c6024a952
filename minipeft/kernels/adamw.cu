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
// Roofline: at most 3 operations a byte, so by operations memory bounds both. A billion
// parameters in float32 at 1.5 TB/s: 18.7 ms a step, and 10.7 ms with states of eight bits.
//
// Launch: 256 threads.
//   adamw       a thread takes 4 neighbours at a time, so that a warp reads and writes
//               whole lines of 128 bytes of each array; once in float32, twice in 16 bits
//   adamw_8bit  a warp takes a block of 256, a lane twice 4 neighbours; a CUDA block 4 times
//               2048 values, so that the 4 KB of tables are loaded once for many
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

constexpr int GROUP = 4;  // neighbours of one thread
constexpr int TILE = THREADS * GROUP;

// WHOLE: the tile lies within the tensor, so no index is compared with n.
template <bool WHOLE, class T>
__device__ __forceinline__ void load(const T* from, i64 first, i64 n, float* to) {
  load_padded<GROUP>(from, first, WHOLE ? first + GROUP : n, to);
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store(T* to, i64 first, i64 n, const float* from) {
  if (WHOLE || first + GROUP <= n) {
    Vector<T, GROUP> part;
#pragma unroll
    for (int i = 0; i < GROUP; i += 2) store_pair(part.at + i, from[i], from[i + 1]);
    store_vector(to + first, part);
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      if (first + i < n) to[first + i] = from_float<T>(from[i]);
  }
}

template <bool WHOLE, class T>
__device__ __forceinline__ void advance(const Step& step, const T* W,
                                        const T* __restrict__ grad, const float* m_in,
                                        const float* v_in, T* W_out, float* m_out,
                                        float* v_out, u64* __restrict__ bad, i64 start,
                                        i64 n) {
  constexpr int GROUPS = 4 / sizeof(T);
  float w[GROUPS][GROUP], g[GROUPS][GROUP], m[GROUPS][GROUP], v[GROUPS][GROUP];
#pragma unroll
  for (int k = 0; k < GROUPS; ++k) {
    const i64 first = start + k * TILE + threadIdx.x * GROUP;
    load<WHOLE>(W, first, n, w[k]);
    load<WHOLE>(grad, first, n, g[k]);
    load<WHOLE>(m_in, first, n, m[k]);
    load<WHOLE>(v_in, first, n, v[k]);
  }
#pragma unroll
  for (int k = 0; k < GROUPS; ++k) {
    const i64 first = start + k * TILE + threadIdx.x * GROUP;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (bad && !is_finite(g[k][i])) atomicMin(bad, u64(first + i));
      step.update(w[k][i], g[k][i], m[k][i], v[k][i]);
    }
    store<WHOLE>(W_out, first, n, w[k]);
    store<WHOLE>(m_out, first, n, m[k]);
    store<WHOLE>(v_out, first, n, v[k]);
  }
}

// An output may lie in the memory of its input: a thread reads a value before it writes it,
// and reads no value that another thread writes.
// bad: holds n at the start; at the end, the first index whose gradient is not finite. Null
// if the caller has checked the gradient.
template <class T>
__global__ void __launch_bounds__(THREADS, 4)
adamw(const T* W, const T* __restrict__ grad, const float* m_in, const float* v_in,
      T* W_out, float* m_out, float* v_out, u64* __restrict__ bad, i64 n, float decay,
      float new_m, float beta2, float new_v, float minus_step, float correction,
      float eps) {
  constexpr int SPAN = TILE * (4 / sizeof(T));
  const Step step{decay, new_m, beta2, new_v, minus_step, correction, eps};
  const i64 start = i64(blockIdx.x) * SPAN;
  if (start + SPAN <= n)
    advance<true>(step, W, grad, m_in, v_in, W_out, m_out, v_out, bad, start, n);
  else
    advance<false>(step, W, grad, m_in, v_in, W_out, m_out, v_out, bad, start, n);
}

// Eight bits ----------------------------------------------------------------------------

constexpr int BLOCK = 256;  // values that share a scale

// The values of both dynamic maps, and their boundaries as search trees: the children of
// node k are nodes 2 k and 2 k + 1, and node 1 is the root.
struct Maps {
  float m[256], m_tree[256], v[256], v_tree[256];
};

// Position among the 256 sorted values, as `nearest` finds it, in eight steps. The nodes of
// a level lie side by side, so up to the sixth level no two lanes read different words of one
// bank of shared memory. In a sorted array, the first steps all read one bank. The first two
// levels are in registers. A search waits 8 cycles for shared memory, in a sorted array 31.
//
// The next bit of k is the sign of (midpoint - x), and one instruction shifts it in. The
// difference may be rounded; its sign is exact.
struct Tree {
  const float* at;
  float root, left, right;
  __device__ __forceinline__ explicit Tree(const float* tree)
      : at(tree), root(tree[1]), left(tree[2]), right(tree[3]) {}
  __device__ __forceinline__ static unsigned below(unsigned k, float midpoint, float x) {
    return __funnelshift_l(__float_as_uint(__fsub_rn(midpoint, x)), k, 1);
  }
  __device__ __forceinline__ unsigned position(float x) const {
    unsigned k = below(1, root, x);
    k = below(k, x > root ? right : left, x);
#pragma unroll
    for (int level = 2; level < 8; ++level) k = below(k, at[k], x);
    return k - 256;
  }
};

template <bool WHOLE>
__device__ __forceinline__ void decode(const byte* codes, i64 first, i64 n, float scale,
                                       const float* map, float* to) {
  unsigned word = 0;
  if (WHOLE || first + GROUP <= n)
    word = *reinterpret_cast<const unsigned*>(codes + first);
  else
    for (int i = 0; i < GROUP && first + i < n; ++i)
      word |= unsigned(codes[first + i]) << 8 * i;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    const float value = __fmul_rn(map[word >> 8 * i & 255], scale);
    to[i] = WHOLE || first + i < n ? value : 0.0f;
  }
}

template <bool WHOLE>
__device__ __forceinline__ void encode(byte* codes, i64 first, i64 n, const Scale& scale,
                                       const Tree& tree, const float* from) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) word |= tree.position(scale(from[i])) << 8 * i;
  if (WHOLE || first + GROUP <= n)
    *reinterpret_cast<unsigned*>(codes + first) = word;
  else
    for (int i = 0; i < GROUP && first + i < n; ++i) codes[first + i] = byte(word >> 8 * i);
}

// The arguments that are the same for every tile of a CUDA block.
template <class T> struct Tensors {
  const T *W, *grad;
  const byte *m_codes, *v_codes;
  const float *m_absmax, *v_absmax;
  T* W_out;
  byte *m_codes_out, *v_codes_out;
  float *m_absmax_out, *v_absmax_out;
  u64* bad;
};

// One block, from `start` on. Its scales are read by all lanes before one of them writes.
template <bool WHOLE, class T>
__device__ __forceinline__ void advance_8bit(const Step& step, const Tensors<T>& t,
                                             const Maps& map, const Tree& m_tree,
                                             const Tree& v_tree, i64 start, i64 n) {
  constexpr int GROUPS = BLOCK / (WARP * GROUP);
  const int lane = threadIdx.x % WARP;
  const i64 block = start / BLOCK;
  const float m_before = t.m_absmax[block], v_before = t.v_absmax[block];
  float w[GROUPS][GROUP], g[GROUPS][GROUP], m[GROUPS][GROUP], v[GROUPS][GROUP];
#pragma unroll
  for (int k = 0; k < GROUPS; ++k) {
    const i64 first = start + (k * WARP + lane) * GROUP;
    load<WHOLE>(t.W, first, n, w[k]);
    load<WHOLE>(t.grad, first, n, g[k]);
    decode<WHOLE>(t.m_codes, first, n, m_before, map.m, m[k]);
    decode<WHOLE>(t.v_codes, first, n, v_before, map.v, v[k]);
  }
  float m_scale = 0.0f, v_scale = 0.0f;
#pragma unroll
  for (int k = 0; k < GROUPS; ++k) {
    const i64 first = start + (k * WARP + lane) * GROUP;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      step.update(w[k][i], g[k][i], m[k][i], v[k][i]);
      if (t.bad && !(is_finite(g[k][i]) && is_finite(m[k][i]) && is_finite(v[k][i])))
        atomicMin(t.bad, u64(first + i));
      m_scale = fmaxf(m_scale, fabsf(m[k][i]));
      v_scale = fmaxf(v_scale, fabsf(v[k][i]));
    }
    store<WHOLE>(t.W_out, first, n, w[k]);
  }
  m_scale = warp_max(m_scale);
  v_scale = warp_max(v_scale);
  const Scale m_of(m_scale), v_of(v_scale);
#pragma unroll
  for (int k = 0; k < GROUPS; ++k) {
    const i64 first = start + (k * WARP + lane) * GROUP;
    encode<WHOLE>(t.m_codes_out, first, n, m_of, m_tree, m[k]);
    encode<WHOLE>(t.v_codes_out, first, n, v_of, v_tree, v[k]);
  }
  if (lane == 0) {
    t.m_absmax_out[block] = m_scale;
    t.v_absmax_out[block] = v_scale;
  }
}

// Outputs and `bad` are those of `adamw`. Here `bad` also finds a moment that is not finite,
// because no scale can hold it.
template <class T>
__global__ void __launch_bounds__(THREADS, 3)  // four blocks would spill registers
adamw_8bit(const T* W, const T* __restrict__ grad, const byte* m_codes,
           const byte* v_codes, const float* m_absmax, const float* v_absmax,
           const float* __restrict__ maps, T* W_out, byte* m_codes_out, byte* v_codes_out,
           float* m_absmax_out, float* v_absmax_out, u64* __restrict__ bad, i64 n,
           float decay, float new_m, float beta2, float new_v, float minus_step,
           float correction, float eps) {
  alignas(16) __shared__ Maps map;
  constexpr int WARPS = THREADS / WARP;
  const Step step{decay, new_m, beta2, new_v, minus_step, correction, eps};
  const Tensors<T> t{W,     grad,        m_codes,     v_codes,      m_absmax,     v_absmax,
                     W_out, m_codes_out, v_codes_out, m_absmax_out, v_absmax_out, bad};
  store_vector(reinterpret_cast<float*>(&map) + threadIdx.x * 4,
               load_vector(maps + threadIdx.x * 4));
  __syncthreads();
  const Tree m_tree(map.m_tree), v_tree(map.v_tree);
  const i64 own = (i64(blockIdx.x) * WARPS + threadIdx.x / WARP) * BLOCK;
  for (i64 start = own; start < n; start += i64(gridDim.x) * WARPS * BLOCK)
    if (start + BLOCK <= n)
      advance_8bit<true>(step, t, map, m_tree, v_tree, start, n);
    else
      advance_8bit<false>(step, t, map, m_tree, v_tree, start, n);
}
