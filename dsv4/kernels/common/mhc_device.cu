// What the mHC kernels of Hopper share: one text, compiled in front of each (mhc_cluster.cu and
// mhc/mhc_post_pre_{few,many}_sm90.cu), so that a token has the same bits in all.
//
// Constants: D a multiple of 1024, ROWS 24 (or 4: the head), POST.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int CTAS = 16, N = 4, TILE = 16;  // ranks of a token's columns, streams, tokens of a tile
constexpr int SLAB = D / CTAS, WARPS = SLAB / 32;  // of a rank
constexpr int COLS = ROWS + 1;  // the products and the sum of squares
constexpr int NB = ROWS == 24 ? 3 : 1, STEPS = 2 * N;  // of 8 rows; of 16 columns: 32 of each stream
constexpr int FN_STRIDE = N * SLAB + 4;  // + 4: rows of a phase of loads in different banks
constexpr int RED_STRIDE = 26;
constexpr float FP8_RECIPROCAL = 1.0f / 448.0f;
constexpr u32 MOST_TRIES = 1 << 26;  // half a minute and more
static_assert(D % 1024 == 0 && (ROWS == 24 || ROWS == 4), "sizes");

// What clusters and many tokens have in front of their arguments (args_type of mhc_cluster.py).
struct Tensors {
  const unsigned short *o, *x;
  const float *post, *comb, *fn, *scale, *base;
  const void *norm;
  unsigned short *streams, *y;
  float *new_post, *new_comb;
  unsigned char *value, *fp8_scale;
};

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

__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// A block that waits for one that never comes is an error, not a hang.
__device__ __forceinline__ void count_try(u32 &tries) {
  if (++tries == MOST_TRIES) __trap();
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

// B fragments of eight rows and a step: three BF16 parts of what a lane needs.
struct Parts {
  uint2 of[3][32];
};

// f: of lane (g, q) row g and, of the stream, columns 8 q + 4 half and the next three.
__device__ __forceinline__ void put_parts(Parts &to, uint4 &f) {
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; k++) v[k] = __uint_as_float(word(f, k));
#pragma unroll
  for (int part = 0; part < 3; part++) {
    const u32 first = split(v[0], v[1]);
    to.of[part][threadIdx.x & 31] = make_uint2(first, split(v[2], v[3]));
  }
}

// Products of the warp's columns with rows of fn. The order of columns within a k16 step is that of the registers:
// lane q holds 8q .. 8q + 7, and gives four of them to each of two steps.
__device__ __forceinline__ void products(
    const float *fn, int warp, uint4 (&x)[2][N], float (&sum)[NB][4]) {
  const int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
  float rest[NB][4];
#pragma unroll
  for (int b = 0; b < NB; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[b][i] = rest[b][i] = 0.0f;
  fn += g * FN_STRIDE + warp * 32 + 8 * q;
#pragma unroll
  for (int j = 0; j < N; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 a[4] = {word(x[0][j], 2 * half), word(x[1][j], 2 * half),
                        word(x[0][j], 2 * half + 1), word(x[1][j], 2 * half + 1)};
      u32 part[3][NB][2];
#pragma unroll
      for (int b = 0; b < NB; b++) {
        float4 f = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (ROWS == 24 || g < ROWS)
          f = *(const float4 *)(fn + b * 8 * FN_STRIDE + j * SLAB + 4 * half);
#pragma unroll
        for (int i = 0; i < 3; i++) {
          part[i][b][0] = split(f.x, f.y);
          part[i][b][1] = split(f.z, f.w);
        }
      }
      // Products that add to the same sum lie NB apart.
#pragma unroll
      for (int i = 0; i < 3; i++)
#pragma unroll
        for (int b = 0; b < NB; b++)
          mma(i == 0 ? sum[b] : rest[b], a, part[i][b][0], part[i][b][1]);
    }
  }
#pragma unroll
  for (int b = 0; b < NB; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[b][i] += rest[b][i];
}

// The same with rows that are in parts; HALVES 1: rows 8 to 15 of the tile are no tokens.
template <int HALVES>
__device__ __forceinline__ void products(
    const Parts (&fn)[STEPS][NB], uint4 (&x)[HALVES][N], float (&sum)[NB][4]) {
  const int lane = threadIdx.x & 31;
  float rest[NB][4];
#pragma unroll
  for (int b = 0; b < NB; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[b][i] = rest[b][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int j = step / 2, half = step % 2;
    constexpr int LAST = HALVES - 1;
    const u32 rows[4] = {
        word(x[0][j], 2 * half), LAST ? word(x[LAST][j], 2 * half) : 0,
        word(x[0][j], 2 * half + 1), LAST ? word(x[LAST][j], 2 * half + 1) : 0};
#pragma unroll
    for (int part = 0; part < 3; part++)
#pragma unroll
      for (int b = 0; b < NB; b++) {
        const uint2 f = fn[step][b].of[part][lane];
        mma(part == 0 ? sum[b] : rest[b], rows, f.x, f.y);
      }
  }
#pragma unroll
  for (int b = 0; b < NB; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[b][i] += rest[b][i];
}

// What the warp has of a tile's sums, to its part of shared memory: [WARPS, TILE, RED_STRIDE].
__device__ __forceinline__ void leave_sums(
    float *red, int warp, const float (&sum)[NB][4], const float (&squares)[2]) {
  const int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
  red += (warp * TILE + g) * RED_STRIDE;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float squared = quad_sum(squares[h]);
    if (q == 0) red[h * 8 * RED_STRIDE + ROWS] = squared;
#pragma unroll
    for (int b = 0; b < NB; b++)
      if (ROWS == 24 || q < ROWS / 2)
        *(float2 *)(red + h * 8 * RED_STRIDE + b * 8 + 2 * q) =
            make_float2(sum[b][2 * h], sum[b][2 * h + 1]);
  }
}

__device__ __forceinline__ float sum_of_warps(const float *red, int token, int column) {
  float v = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) v += red[(w * TILE + token) * RED_STRIDE + column];
  return v;
}

// dsv4.reference.quant.fp8_act_quantize of 8 columns, whose group is `largest` before the factor.
__device__ __forceinline__ void store_fp8(
    unsigned char *value, unsigned char *scale, const uint4 &y, float largest, long long t,
    int column) {
  const float amax = low(pack(largest, 0.0f));  // rounded as the values are; NaN stays
  const u32 ratio = __float_as_uint((amax < 1e-4f ? 1e-4f : amax) * FP8_RECIPROCAL) & 0x7FFFFFFFu;
  const u32 byte = min((ratio >> 23) + ((ratio & 0x7FFFFFu) != 0), 255u);
  const float inverse = __uint_as_float(byte == 255 ? 0x7FC00000u : (254 - byte) << 23);
  uint2 codes;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    unsigned short c[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const u32 pair = (&y.x)[2 * i + k];
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
          : "=h"(c[k])
          : "f"(high(pair) * inverse), "f"(low(pair) * inverse));
    }
    (&codes.x)[i] = c[0] | ((u32)c[1] << 16);
  }
  *(uint2 *)(value + t * D + column) = codes;
  if (column % 128 == 0) scale[t * (D / 128) + column / 128] = byte;
}

// To about half a unit in the last place, without the branch of a division. x: 1e-37 .. 1e37
__device__ __forceinline__ float precise_reciprocal(float x) {
  const float r = reciprocal(x);
  return fmaf(r, fmaf(-x, r, 1.0f), r);
}

// Half a round: to_k = sum_i c_ik / from_i + eps to_k; c_ki if IS_ROWS. 1 / from_i is the product
// of the three others by 1 / that of all four, which comes when the sums that it scales are there:
// its unit is slow, and each half round waits for the one before.
template <bool IS_ROWS>
__device__ __forceinline__ void balance(
    const float (&c)[N][N], const float (&from)[N], float (&to)[N], float eps) {
  const float first = from[0] * from[1], last = from[2] * from[3];
  const float others[N] = {from[1] * last, from[0] * last, from[3] * first, from[2] * first};
  const float all = reciprocal(first * last);
#pragma unroll
  for (int k = 0; k < N; k++) {
    float sum = others[0] * (IS_ROWS ? c[k][0] : c[0][k]);
#pragma unroll
    for (int i = 1; i < N; i++) sum = fmaf(others[i], IS_ROWS ? c[k][i] : c[i][k], sum);
    to[k] = fmaf(sum, all, eps * to[k]);
  }
}

// comb of one token, of scaled and shifted mixes; every lane holds all of it. From the softmax to
// the last columns it is c_jk / (row_j column_k): to divide a column by its sum + eps, that is by
// sum_j c_jk / (row_j column_k) + eps, is to multiply column_k by it.
//
// Range. c lies in eps .. 1 + eps, so row_j differ by a factor of 1 / eps at most, and column_k do.
// No element exceeds 1 and rounds make either product of four smaller, so these lie in eps^4 .. 1
// or so: within FP32, with all that is multiplied, for an eps of 1e-7 and more; why_not says so.
__device__ __forceinline__ void sinkhorn(float (&c)[N][N], int iters, float eps) {
  float row[N], column[N];
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float top = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = expf(c[j][k] - top);
    const float r = precise_reciprocal((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]));
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = fmaf(c[j][k], r, eps);
    row[j] = column[j] = 1.0f;
  }
#pragma unroll 1
  for (int i = 1; i < iters; i++) {
    balance<false>(c, row, column, eps);
    balance<true>(c, column, row, eps);
  }
  // The last columns element by element: what 1 / row_j is off by then counts in their sums too.
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float r = reciprocal(row[j]);
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = __fmul_rn(c[j][k], r);  // in no FMA of the sums
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float sum = (c[0][k] + c[1][k]) + (c[2][k] + c[3][k]);
    const float r = precise_reciprocal(fmaf(eps, column[k], sum));
#pragma unroll
    for (int j = 0; j < N; j++) c[j][k] *= r;
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
  if (lane < N)
#pragma unroll
    for (int j = 0; j < N; j++)
      new_comb[t * N * N + j * N + lane] =
          lane == 0 ? c[j][0] : lane == 1 ? c[j][1] : lane == 2 ? c[j][2] : c[j][3];
}
