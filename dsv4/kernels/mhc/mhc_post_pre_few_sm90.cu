// mHC between two sub-layers for up to 8 tokens: a block for 32 columns, not a cluster of large ones.
//
// Clusters of 16 need 16 SMs of one group empty at once. These blocks are small enough to stand beside
// those of the kernel before, so their columns of fn are in shared memory when that one ends. What a
// warp of mhc_cluster.cu does a block does here (source s: warp s % WARPS of rank s / WARPS), and
// sums are added in the same order, so a token's bits are the same in both.
//
//   streams    post o + comb X, stored; products with fn and squares: 25 sums for each token
//   hop 1      they go to memory; every block reads those of pre and adds them up itself, and block
//              SOURCES + t all others of token t, for post and comb
//   collapse   sum_j pre_j X_j and its squares
//   hop 2      every block reads all squares: norm, store
//
// Exchange. A word of 16 or 8 bytes is stored and loaded by one instruction on one address, and
// carries the epoch of the launch beside its numbers: a reader that sees the epoch has the
// numbers, so nothing else orders the two. Words are read past L1 until they have it.
//
// The epoch is one more than what `epoch` in memory holds. Every block reads that after
// griddepcontrol.wait, that is when the launch before, on the same memory, has ended. It is set for
// the next launch when nobody will read it again: sources are known to have, by warp 0 alone and before
// they sent the sums that block SOURCES has from all; blocks of maps say so in `read`. The next launch
// writes words only when all blocks of this one have ended, so one set of words will do. Epoch 0
// is what memory begins with and never in use; a word of the same epoch that was left 2^32
// launches ago is the one thing that this does not tell apart.
//
// Blocks wait for each other: all must be resident. Those before them in the stream are, and end by
// themselves; those behind them start when all of these have. Another stream must not run blocks that
// wait for each other: each might hold what the other needs.
//
// Constants: D a multiple of 1024, ROWS 24, POST 1, NORM_BF16, BLOCK_WARPS, MIN_BLOCKS on an SM, MOST_SOURCES,
// EXCHANGE_INTS of the memory.
// Follows mhc_device.cu in one text.

constexpr int SOURCES = D / 32;
constexpr int MOST_TOKENS = 8, PAIRS = 5, THREADS = 32 * BLOCK_WARPS;
constexpr int STRIDE = CTAS + 4;  // of a row of sums: rows of a phase of loads in different banks
static_assert(SOURCES <= MOST_SOURCES && ROWS == 24 && POST, "sizes");
constexpr int ROWS_OF_PRE = N + 1;
static_assert(BLOCK_WARPS >= 4, "a warp gathers what the quads' lane of its number has sent");

// The same for all D, so that an epoch never lies where another kernel has numbers.
struct Exchange {
  // Three sums and the epoch. Pair 0: columns 2 h, 2 h + 1 and the squares; pair 1 + q: what else
  // lane q of a quad has.
  uint4 sums[MOST_TOKENS][PAIRS][MOST_SOURCES][2];
  u64 squares[MOST_TOKENS][MOST_SOURCES];  // of y, epoch
  u32 read[MOST_TOKENS], epoch;
};
static_assert(sizeof(Exchange) == 4 * EXCHANGE_INTS, "what is allocated");

struct Shared {
  Parts fn[STEPS][NB];
  float sums[ROWS_OF_PRE * 8][STRIDE];  // by rank: pre and squares of each token, or all of one
  float pre[MOST_TOKENS][N], factor[MOST_TOKENS];
  u32 epoch;
};

struct Args {
  const unsigned short *o, *x;
  const float *post, *comb, *fn, *scale, *base;
  const void *norm;
  unsigned short *streams, *y;
  float *new_post, *new_comb;
  Exchange *exchange;
  int T, iters;
  float norm_eps, eps;
};

// ---- words

__device__ __forceinline__ void store_word(uint4 *p, float a, float b, float c, u32 epoch) {
  const u64 low = __float_as_uint(a) | (u64)__float_as_uint(b) << 32;
  const u64 high = __float_as_uint(c) | (u64)epoch << 32;
  asm volatile(
      "{\n.reg .b128 w;\nmov.b128 w, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], w;\n}" ::"l"(p),
      "l"(low), "l"(high)
      : "memory");
}

__device__ __forceinline__ uint4 load_word(const uint4 *p) {
  u64 low, high;
  asm volatile("{\n.reg .b128 w;\nld.relaxed.gpu.global.b128 w, [%2];\nmov.b128 {%0, %1}, w;\n}"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}

__device__ __forceinline__ void store_word(u64 *p, float a, u32 epoch) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p),
               "l"(__float_as_uint(a) | (u64)epoch << 32)
               : "memory");
}

__device__ __forceinline__ u64 load_word(const u64 *p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_word(u32 *p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ u32 load_word(const u32 *p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Written by a launch that has ended, so any load will do.
__device__ __forceinline__ u32 next_epoch(const Exchange &e) {
  u32 last;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(last) : "l"(&e.epoch));
  return last + 1 ? last + 1 : 1;
}

__device__ __forceinline__ void prefetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ---- sums of all sources

// Where source s of a token lies: those of one warp of all ranks side by side.
__device__ __forceinline__ int slot_of(int source) {
  return source % WARPS * CTAS + source / WARPS;
}

// Pair p of token t: lane 2 r + h adds word h over the warps of rank r.
__device__ __forceinline__ void gather(
    float (&v)[3], const Exchange &e, int t, int p, u32 epoch) {
  const int lane = threadIdx.x & 31, r = lane >> 1, h = lane & 1;
  const uint4 *from = &e.sums[t][p][r][h];
  uint4 word[WARPS];
  bool is_missing = true;
  for (u32 tries = 0; is_missing; count_try(tries)) {
    is_missing = false;
#pragma unroll
    for (int w = 0; w < WARPS; w++) word[w] = load_word(from + w * CTAS * 2);
#pragma unroll
    for (int w = 0; w < WARPS; w++) is_missing |= word[w].w != epoch;
  }
  v[0] = v[1] = v[2] = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    v[0] += __uint_as_float(word[w].x);
    v[1] += __uint_as_float(word[w].y);
    v[2] += __uint_as_float(word[w].z);
  }
}

__device__ __forceinline__ float sum_of_ranks(const float *row) {
  float v = 0.0f;
#pragma unroll
  for (int r = 0; r < CTAS; r++) v += row[r];
  return v;
}

// 1 / RMS of y of token t.
__device__ __forceinline__ float gather_factor(const Exchange &e, int t, u32 epoch, float eps) {
  const int lane = threadIdx.x & 31, r = lane >> 1, h = lane & 1, q = lane & 3;
  const u64 *from = &e.squares[t][h * (WARPS / 2) * CTAS + r];
  u64 word[WARPS / 2];
  bool is_missing = true;
  for (u32 tries = 0; is_missing; count_try(tries)) {
    is_missing = false;
#pragma unroll
    for (int w = 0; w < WARPS / 2; w++) word[w] = load_word(from + w * CTAS);
#pragma unroll
    for (int w = 0; w < WARPS / 2; w++) is_missing |= (u32)(word[w] >> 32) != epoch;
  }
  __syncwarp();
  // Lane 2 r adds the first half of the warps of rank r, lane 2 r + 1 goes on from there.
  float v = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS / 2; w++) v += __uint_as_float((u32)word[w]);
  v = __shfl_sync(~0u, v, lane & ~1);
#pragma unroll
  for (int w = 0; w < WARPS / 2; w++) v += __uint_as_float((u32)word[w]);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) sum += __shfl_sync(~0u, v, 2 * (4 * q + i) + 1);
  return inverse_root(quad_sum(sum) / D + eps);
}

// ---- blocks that have columns

// The block's columns of fn as the lanes of warp 0 will want them: lane (g, q) row g of each 8 and,
// of the stream, columns 8 q + 4 half and the next three.
__device__ __forceinline__ void stage_fn(Shared &s, const float *fn, int source) {
  constexpr int EACH = (STEPS + BLOCK_WARPS - 1) / BLOCK_WARPS;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  uint4 f[EACH][NB];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int step = warp + i * BLOCK_WARPS, j = step / 2, half = step % 2;
#pragma unroll
    for (int b = 0; b < NB; b++)
      f[i][b] = load16(
          fn + ((b * 8 + g) * N + j) * (long long)D + source * 32 + 8 * q + 4 * half, step < STEPS);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int step = warp + i * BLOCK_WARPS;
    if (step >= STEPS) break;
#pragma unroll
    for (int b = 0; b < NB; b++) put_parts(s.fn[step][b], f[i][b]);
  }
}

// Streams of token g, 8 columns a lane; stored. The epoch comes with what they are made of.
__device__ __forceinline__ void make_block_streams(
    Shared &s, const Args &a, uint4 (&x)[N], float &squares, int column, int g) {
  const bool is_live = g < a.T;
  const u32 epoch = next_epoch(*a.exchange);
  uint4 o = load16(a.o + (long long)g * D + column, is_live), old[N], maps[N + 1];
#pragma unroll
  for (int j = 0; j < N; j++) old[j] = load16(a.x + (long long)(g * N + j) * D + column, is_live);
  maps[0] = load16(a.post + g * N, is_live);
#pragma unroll
  for (int j = 0; j < N; j++) maps[j + 1] = load16(a.comb + (g * N + j) * N, is_live);
  if ((threadIdx.x & 31) == 0) s.epoch = epoch;
  __syncwarp();  // or the compiler asks for the epoch behind the streams
  float coef[N + N * N];
#pragma unroll
  for (int i = 0; i < N + N * N; i++) coef[i] = __uint_as_float(word(maps[i / N], i % N));
  squares = 0.0f;
  make_streams(x, o, old, coef, squares);
  if (is_live)
#pragma unroll
    for (int k = 0; k < N; k++)
      store16(a.streams + (long long)(g * N + k) * D + column, x[k]);
}

// Sums of the warp's columns to all: lane q has 2 q and 2 q + 1 of each 8.
__device__ __forceinline__ void send_sums(
    Exchange &e, const float (&sum)[NB][4], float squares, u32 epoch, int slot, int g, int q) {
  if (q < 2) store_word(&e.sums[g][0][slot][q], sum[0][0], sum[0][1], squares, epoch);
  uint4 *rest = e.sums[g][1 + q][slot];
  store_word(rest, q ? sum[0][0] : squares, sum[0][1], sum[1][0], epoch);
  store_word(rest + 1, sum[1][1], sum[2][0], sum[2][1], epoch);
}

// Where sum i of lane q of a quad belongs among those of a token; the squares come last.
__device__ __forceinline__ int row_of(int q, int i) {
  return i == 0 && q == 0 ? ROWS : i / 2 * 8 + 2 * q + i % 2;
}

// pre of token t, once all sources have sent their sums; gain and base: of lane 0 .. 3.
__device__ __forceinline__ void gather_pre(
    Shared &s, const Args &a, int t, u32 epoch, float gain, float base) {
  const int lane = threadIdx.x & 31, r = lane >> 1, h = lane & 1;
  float(*rows)[STRIDE] = s.sums + ROWS_OF_PRE * t, v[3];
  gather(v, *a.exchange, t, 0, epoch);
  rows[2 * h][r] = v[0];
  rows[2 * h + 1][r] = v[1];
  if (h == 0) rows[N][r] = v[2];
  __syncwarp();
  const float mix = scaled_mix(sum_of_ranks(rows[min(lane, N)]), gain, base, a.norm_eps);
  const float gate = sigmoid(mix), pre = gate + a.eps;
  if (lane < N) s.pre[t][lane] = pre;
}

__device__ __forceinline__ void sync(int T) {
  if (T == 1)  // the other warps have left
    __syncwarp();
  else
    __syncthreads();
}

__device__ void source_block(Shared &s, const Args &a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  const int source = blockIdx.x, slot = slot_of(source), column = source * 32 + 8 * q;
  Exchange &e = *a.exchange;
  if (threadIdx.x < PAIRS * a.T) prefetch(e.sums[threadIdx.x / PAIRS][threadIdx.x % PAIRS][slot]);
  if (threadIdx.x < a.T) prefetch(&e.squares[threadIdx.x][slot]);
  if (threadIdx.x == 0) prefetch(&e.epoch);
  stage_fn(s, a.fn, source);
  float weight[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    weight[i] = NORM_BF16 ? low(((const unsigned short *)a.norm)[column + i])
                          : ((const float *)a.norm)[column + i];
  const float gain = a.scale[0], base = a.base[lane % N];
  __syncthreads();
  wait_for_previous();
  if (warp >= a.T) {
    if (a.T > 1)
      for (int i = 0; i < 4; i++) __syncthreads();
    return;
  }
  uint4 x[1][N];
  float squares, sum[NB][4], y[8];
  if (warp == 0) {
    make_block_streams(s, a, x[0], squares, column, g);
    products(s.fn, x, sum);
    squares = quad_sum(squares);
    if (g < a.T) send_sums(e, sum, squares, s.epoch, slot, g, q);
  }
  sync(a.T);
  const u32 epoch = s.epoch;
  gather_pre(s, a, warp, epoch, gain, base);
  sync(a.T);
  if (warp == 0) {
    squares = 0.0f;
    collapse(y, x[0], s.pre[g], squares);
    squares = quad_sum(squares);
    if (g < a.T && q == 0) store_word(&e.squares[g][slot], squares, epoch);
  }
  sync(a.T);  // nobody asks for squares before
  const float factor = gather_factor(e, warp, epoch, a.norm_eps);
  if (lane == 0) s.factor[warp] = factor;
  sync(a.T);
  if (warp == 0 && g < a.T) {
    uint4 out;
#pragma unroll
    for (int i = 0; i < 4; i++)
      word(out, i) = pack(y[2 * i] * weight[2 * i] * s.factor[g],
                          y[2 * i + 1] * weight[2 * i + 1] * s.factor[g]);
    store16(a.y + (long long)g * D + column, out);
  }
}

// ---- the block that makes post and comb of a token

__device__ void maps_block(Shared &s, const Args &a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = blockIdx.x - SOURCES;
  Exchange &e = *a.exchange;
  const float gain = lane < ROWS ? a.scale[min(lane / N, 2)] : 0.0f;
  const float base = lane < ROWS ? a.base[lane] : 0.0f;
  wait_for_previous();
  const u32 epoch = next_epoch(e);
  if (warp < 4) {
    float v[3];
    gather(v, e, t, 1 + warp, epoch);
#pragma unroll
    for (int i = 0; i < 3; i++) s.sums[row_of(warp, lane % 2 * 3 + i)][lane / 2] = v[i];
  }
  __syncthreads();
  if (warp == 0) {
    const float v = scaled_mix(sum_of_ranks(s.sums[min(lane, ROWS)]), gain, base, a.norm_eps);
    store_maps(v, sigmoid(v), a.new_post, a.new_comb, t, a.iters, a.eps);
  } else if (warp == 1) {  // all of this block have read the epoch
    if (t > 0) {
      if (lane == 0) store_word(&e.read[t], epoch);
      return;
    }
    if (lane > 0 && lane < a.T)
      for (u32 tries = 0; load_word(&e.read[lane]) != epoch;) count_try(tries);
    __syncwarp();
    if (lane == 0) store_word(&e.epoch, epoch);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) mhc_post_pre_kernel(
    const unsigned short *o, const unsigned short *x, const float *post, const float *comb,
    const float *fn, const float *scale, const float *base, const void *norm,
    unsigned short *streams, unsigned short *y, float *new_post, float *new_comb,
    Exchange *exchange, int T, int iters, float norm_eps, float eps) {
  __shared__ __align__(128) Shared s;
  const Args a = {o,       x, post,     comb,     fn,       scale, base,  norm,    streams,
                  y, new_post, new_comb, exchange, T,     iters, norm_eps, eps};
  asm volatile("griddepcontrol.launch_dependents;");
  if (blockIdx.x < SOURCES)
    source_block(s, a);
  else
    maps_block(s, a);
}
