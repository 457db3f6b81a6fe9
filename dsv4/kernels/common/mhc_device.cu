// What the mHC kernels of Hopper share: one text, compiled in front of each (mhc_cluster.cu and
// mhc/mhc_post_pre_few_sm90.cu), so that a token has the same bits in all.
//
// Constants: D, ROWS 24 (or 4: the head), POST.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int CTAS = 16, N = 4;  // blocks of a cluster, streams

// ---- PTX

__device__ __forceinline__ uint4 load16(const void *p, bool live) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (live)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
  return v;
}

__device__ __forceinline__ void store16(void *p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ u32 pack(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

__device__ __forceinline__ u32 &word(uint4 &v, int i) { return (&v.x)[i]; }

// The upper halves of two numbers, and what is left of each.
__device__ __forceinline__ u32 split(float &a, float &b) {
  u32 x = __float_as_uint(a), y = __float_as_uint(b);
  a -= __uint_as_float(x & 0xFFFF0000u);
  b -= __uint_as_float(y & 0xFFFF0000u);
  return __byte_perm(x, y, 0x7632);
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

__device__ __forceinline__ u32 quad_max(u32 v) {
  v = max(v, __shfl_xor_sync(~0u, v, 1));
  return max(v, __shfl_xor_sync(~0u, v, 2));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float inverse_root(float x) { return __frcp_rn(__fsqrt_rn(x)); }

__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// X'_k = post_k o + sum_j comb_jk X_j of one token, rounded; adds the squares.
__device__ __forceinline__ void make_streams(
    uint4 (&out)[N], uint4 &o, uint4 (&x)[N], const float *coef, float &squares) {
  float post[N], comb[N][N];
#pragma unroll
  for (int k = 0; k < N; k++) {
    post[k] = POST ? coef[k] : 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) comb[j][k] = POST ? coef[N + j * N + k] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (POST) {
        float lo = post[k] * low(word(o, i)), hi = post[k] * high(word(o, i));
#pragma unroll
        for (int j = 0; j < N; j++) {
          lo = fmaf(comb[j][k], low(word(x[j], i)), lo);
          hi = fmaf(comb[j][k], high(word(x[j], i)), hi);
        }
        word(out[k], i) = pack(lo, hi);
      } else {
        word(out[k], i) = word(x[k], i);
      }
      squares = fmaf(low(word(out[k], i)), low(word(out[k], i)), squares);
      squares = fmaf(high(word(out[k], i)), high(word(out[k], i)), squares);
    }
  }
}

// y = sum_j pre_j X_j of one token, and its squares.
__device__ __forceinline__ void collapse(
    float (&y)[8], uint4 (&x)[N], const float *pre, float &squares) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float lo = 0.0f, hi = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) {
      lo = fmaf(pre[j], low(word(x[j], i)), lo);
      hi = fmaf(pre[j], high(word(x[j], i)), hi);
    }
    y[2 * i] = lo;
    y[2 * i + 1] = hi;
    squares = fmaf(lo, lo, squares);
    squares = fmaf(hi, hi, squares);
  }
}

// comb of one token, of scaled and shifted mixes; every lane holds all of it.
__device__ __forceinline__ void sinkhorn(float (&c)[N][N], int iters, float eps) {
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float top = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = expf(c[j][k] - top);
    const float r = 1.0f / ((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]));
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = fmaf(c[j][k], r, eps);
  }
#pragma unroll 1
  for (int i = 0; i < 2 * iters - 1; i++) {
    // Columns first; transposed, the next round does the rows.
    float sum[N], r[N];
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] = (c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps;
#pragma unroll
    for (int k = 0; k < N; k += 2) {  // one reciprocal for two: they take turns on their unit
      const float both = reciprocal(sum[k] * sum[k + 1]);
      r[k] = both * sum[k + 1];
      r[k + 1] = both * sum[k];
    }
    float next[N][N];
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int k = 0; k < N; k++) next[k][j] = c[j][k] * r[k];
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int k = 0; k < N; k++) c[j][k] = next[j][k];
  }
}

// What lane m makes of the complete sums of one token, in lanes 0 .. ROWS: its scaled mix m.
__device__ __forceinline__ float scaled_mix(float v, float gain, float base, float norm_eps) {
  const float mean = __shfl_sync(~0u, v, ROWS) / (N * D);
  return fmaf(v * inverse_root(mean + norm_eps), gain, base);
}

// post and comb of token t from its scaled mixes `v`.
__device__ __forceinline__ void store_maps(
    float v, float gate, float *new_post, float *new_comb, long long t, int iters, float eps) {
  const int lane = threadIdx.x & 31;
  if (lane >= N && lane < 2 * N) new_post[t * N + lane - N] = 2.0f * gate;
  float c[N][N];
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = __shfl_sync(~0u, v, 2 * N + j * N + k);
  sinkhorn(c, iters, eps);
  // An odd number of half rounds has left it transposed.
  if (lane < N)
#pragma unroll
    for (int j = 0; j < N; j++)
      new_comb[t * N * N + j * N + lane] =
          lane == 0 ? c[0][j] : lane == 1 ? c[1][j] : lane == 2 ? c[2][j] : c[3][j];
}
