// mHC in one pass: 16 blocks of a cluster share a tile of 16 tokens, each a sixteenth of the columns.
//
// A block keeps its columns of fn in shared memory for all its tiles. Per tile:
//   streams   post o + comb X in registers, stored, and rounded to BF16 (POST)
//   products  registers are the A fragments of m16n8k16; fn is split into three BF16 parts
//   combine   partial sums go to the block that owns the token (rank t owns token t of the tile);
//             its last warp adds them up by rank, sends pre to all, then runs Sinkhorn
//   collapse  sum_j pre_j X_j from registers; squares are exchanged, then the norm and the stores
// Blocks exchange by st.async, which signals an mbarrier of the receiver: nothing else synchronises
// them. A token's arithmetic depends on neither its place in a tile nor the number of tokens.
//
// Constants: D a multiple of 1024, ROWS 24 (or 4: the head), POST, QUANTISE, NORM_BF16, KERNEL; ARGS_BYTES
// of the launch.
// Follows mhc_device.cu in one text.

constexpr int COMPUTE = 32 * WARPS, THREADS = COMPUTE + 32;
constexpr int COEFS = N + N * N, COEFS_EACH = POST ? (TILE * COEFS + COMPUTE - 1) / COMPUTE : 1;
constexpr int YPARTS = QUANTISE ? 2 : 1;  // squares, and the largest of half a group

struct Shared {
  float fn[ROWS * FN_STRIDE];
  float red[WARPS * TILE * RED_STRIDE];
  float part[2][CTAS][COLS + 3];
  float pre[2][TILE][N];
  float ysum[2][CTAS][TILE][YPARTS];
  float coef[TILE][COEFS];
  float ysq[WARPS][TILE];
  u32 ymax[2][WARPS][TILE];
  u64 fn_bar, part_bar[2], pre_bar[2], ysum_bar[2];
};

struct Args : Tensors {
  int T, iters;
  float norm_eps, eps;
};
static_assert(sizeof(Args) == ARGS_BYTES, "what the host sends");

// ---- PTX

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 remote(u32 local, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(local), "r"(rank));
  return r;
}

__device__ __forceinline__ void bar_init(u64 *bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(bar)) : "memory");
}

__device__ __forceinline__ void bar_expect(u64 *bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bar_wait(u64 *bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}\n" ::"r"(address(bar)),
      "r"(phase)
      : "memory");
}

__device__ __forceinline__ void send(u32 to, u32 bar, float v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
               "r"(__float_as_uint(v)), "r"(bar)
               : "memory");
}

__device__ __forceinline__ void send2(u32 to, u32 bar, float a, u32 b) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
      "r"(__float_as_uint(a)), "r"(b), "r"(bar)
      : "memory");
}

__device__ __forceinline__ void send4(u32 to, u32 bar, float a, float b, float c, float d) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(to), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(__float_as_uint(c)),
      "r"(__float_as_uint(d)), "r"(bar)
      : "memory");
}

__device__ __forceinline__ void compute_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(COMPUTE) : "memory");
}

// ---- what a thread of the computing warps holds: tokens g and g + 8, 8 columns

struct Raw {
  uint4 o[2], x[2][N];
  float coef[COEFS_EACH];
};

__device__ __forceinline__ void load_tile(Raw &raw, const Args &a, int tile, int column) {
  const int g = (threadIdx.x & 31) >> 2;
  for (int h = 0; h < 2; h++) {
    const long long t = (long long)tile * TILE + g + 8 * h;
    const bool live = t < a.T;
    if (POST) raw.o[h] = load16(a.o + t * D + column, live);
#pragma unroll
    for (int j = 0; j < N; j++) raw.x[h][j] = load16(a.x + (t * N + j) * D + column, live);
  }
  if (POST) {
#pragma unroll
    for (int i = 0; i < COEFS_EACH; i++) {
      const int at = threadIdx.x + i * COMPUTE, c = at % COEFS;
      const long long t = (long long)tile * TILE + at / COEFS;
      raw.coef[i] = 0.0f;
      if (at < TILE * COEFS && t < a.T)
        raw.coef[i] = c < N ? a.post[t * N + c] : a.comb[t * N * N + c - N];
    }
  }
}

// Sums over the block's warps, each to the block that owns the token.
__device__ __forceinline__ void send_partials(
    Shared &s, float (&sum)[NB][4], const float (&squares)[2], int p, u32 rank) {
  leave_sums(s.red, threadIdx.x >> 5, sum, squares);
  compute_sync();
  for (int i = threadIdx.x; i < TILE * COLS; i += COMPUTE) {
    const int token = i / COLS, column = i % COLS;
    send(remote(address(&s.part[p][rank][column]), token),
         remote(address(&s.part_bar[p]), token), sum_of_warps(s.red, token, column));
  }
}

// Whether a warp's group of 128 columns lies in two blocks.
__device__ __forceinline__ bool is_shared_group(int warp, u32 rank) {
  return WARPS % 4 && (rank % 2 ? warp < 2 : warp >= WARPS - 2);
}

// Squares of y over the block, and the largest of a shared half group, to every block.
__device__ __forceinline__ void send_squares(
    Shared &s, const float (&squares)[2], const u32 (&largest)[2], int p, u32 rank) {
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float v = quad_sum(squares[h]);
    if (q == 0) s.ysq[warp][g + 8 * h] = v;
    if (QUANTISE) {
      const u32 m = quad_max(largest[h]);
      if (q == 0) s.ymax[p][warp][g + 8 * h] = m;
    }
  }
  compute_sync();
  for (int i = threadIdx.x; i < TILE * CTAS; i += COMPUTE) {
    const int token = i % TILE, to = i / TILE;
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) v += s.ysq[w][token];
    const u32 at = remote(address(&s.ysum[p][rank][token][0]), to);
    const u32 bar = remote(address(&s.ysum_bar[p]), to);
    if (QUANTISE) {
      const int first = rank % 2 ? 0 : WARPS - 2;
      send2(at, bar, v, max(s.ymax[p][first][token], s.ymax[p][first + 1][token]));
    } else {
      send(at, bar, v);
    }
  }
}

// Bits of the largest |y w| of the 128 columns that the thread's are part of.
__device__ __forceinline__ u32 group_max(const Shared &s, int token, int p, u32 rank) {
  const int warp = threadIdx.x >> 5;
  if (is_shared_group(warp, rank))
    return max(__float_as_uint(s.ysum[p][rank][token][YPARTS - 1]),
               __float_as_uint(s.ysum[p][rank ^ 1][token][YPARTS - 1]));
  const int skip = WARPS % 4 && rank % 2 ? 2 : 0, first = (warp - skip) / 4 * 4 + skip;
  u32 m = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) m = max(m, s.ymax[p][(first + i) % WARPS][token]);
  return m;
}

__device__ __forceinline__ void finish(
    Shared &s, const Args &a, float (&y)[2][8], const float (&weight)[8], int tile, int index,
    int column, u32 rank) {
  const int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3, p = index & 1;
  bar_wait(&s.ysum_bar[p], index >> 1 & 1);
  if (threadIdx.x == 0) bar_expect(&s.ysum_bar[p], CTAS * TILE * YPARTS * 4);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (tile * TILE + 8 * h >= a.T) continue;
    const int token = g + 8 * h;
    const long long t = (long long)tile * TILE + token;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += s.ysum[p][4 * q + i][token][0];
    const float factor = inverse_root(quad_sum(sum) / D + a.norm_eps);
    uint4 out;
#pragma unroll
    for (int i = 0; i < 4; i++)
      word(out, i) = pack(y[h][2 * i] * weight[2 * i] * factor,
                          y[h][2 * i + 1] * weight[2 * i + 1] * factor);
    if (t >= a.T) continue;
    store16(a.y + t * D + column, out);
    if (QUANTISE) {
      const float largest = __uint_as_float(group_max(s, token, p, rank)) * factor;
      store_fp8(a.value, a.fp8_scale, out, largest, t, column);
    }
  }
}

// The streams of a tile from what was loaded for it.
__device__ __forceinline__ void streams_of(
    Shared &s, const Args &a, uint4 (&x)[2][N], float (&squares)[2], Raw &raw, int tile,
    int column) {
  const int g = (threadIdx.x & 31) >> 2;
  if (POST) {
#pragma unroll
    for (int i = 0; i < COEFS_EACH; i++)
      if (threadIdx.x + i * COMPUTE < TILE * COEFS)
        (&s.coef[0][0])[threadIdx.x + i * COMPUTE] = raw.coef[i];
    compute_sync();
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const long long t = (long long)tile * TILE + g + 8 * h;
    squares[h] = 0.0f;
    if (tile * TILE + 8 * h >= a.T) {  // no token of this half
#pragma unroll
      for (int k = 0; k < N; k++) x[h][k] = make_uint4(0, 0, 0, 0);
      continue;
    }
    make_streams(x[h], raw.o[h], raw.x[h], s.coef[g + 8 * h], squares[h]);
    if (POST && t < a.T)
#pragma unroll
      for (int k = 0; k < N; k++) store16(a.streams + (t * N + k) * D + column, x[h][k]);
  }
}

// y of a tile before its norm, once pre has come; its squares go out.
__device__ __forceinline__ void collapse_tile(
    Shared &s, const Args &a, float (&y)[2][8], uint4 (&x)[2][N], const float (&weight)[8],
    int tile, int index, u32 rank) {
  const int g = (threadIdx.x & 31) >> 2, p = index & 1;
  float squares[2] = {0.0f, 0.0f};
  u32 largest[2] = {0, 0};
  bar_wait(&s.pre_bar[p], index >> 1 & 1);
  if (threadIdx.x == 0) bar_expect(&s.pre_bar[p], TILE * N * 4);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (tile * TILE + 8 * h >= a.T) continue;
    collapse(y[h], x[h], s.pre[p][g + 8 * h], squares[h]);
    if (QUANTISE)
#pragma unroll
      for (int i = 0; i < 8; i++)
        largest[h] = max(largest[h], __float_as_uint(y[h][i] * weight[i]) & 0x7FFFFFFFu);
  }
  send_squares(s, squares, largest, p, rank);
}

// Stages of two tiles alternate, so that what the blocks send each other arrives during work.
__device__ void compute_warps(Shared &s, const Args &a, u32 rank, int first, int step) {
  const int warp = threadIdx.x >> 5, q = threadIdx.x & 3;
  const int column = rank * SLAB + warp * 32 + 8 * q, tiles = (a.T + TILE - 1) / TILE;
  float weight[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    weight[i] = NORM_BF16 ? low(((const unsigned short *)a.norm)[column + i])
                          : ((const float *)a.norm)[column + i];
  Raw raw;
  uint4 x[2][N], next[2][N];
  float squares[2], next_squares[2], sum[NB][4], y[2][8];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  load_tile(raw, a, first, column);
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  streams_of(s, a, x, squares, raw, first, column);
  if (first + step < tiles) load_tile(raw, a, first + step, column);
  bar_wait(&s.fn_bar, 0);
  for (int tile = first, index = 0;; tile += step, index++) {
    const bool is_last = tile + step >= tiles;
    products(s.fn, threadIdx.x >> 5, x, sum);
    send_partials(s, sum, squares, index & 1, rank);
    if (index) finish(s, a, y, weight, tile - step, index - 1, column, rank);
    if (!is_last) {
      streams_of(s, a, next, next_squares, raw, tile + step, column);
      if (tile + 2 * step < tiles) load_tile(raw, a, tile + 2 * step, column);
    }
    collapse_tile(s, a, y, x, weight, tile, index, rank);
    if (is_last) {
      finish(s, a, y, weight, tile, index, column, rank);
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      squares[h] = next_squares[h];
#pragma unroll
      for (int k = 0; k < N; k++) x[h][k] = next[h][k];
    }
  }
}

// The last warp: sums and maps of the token that the block owns.
__device__ void owner_warp(Shared &s, const Args &a, u32 rank, int first, int step) {
  const int lane = threadIdx.x & 31, tiles = (a.T + TILE - 1) / TILE;
  const int part = ROWS == 24 ? min(lane / N, 2) : 0;
  const float gain = lane < ROWS ? a.scale[part] : 0.0f, base = lane < ROWS ? a.base[lane] : 0.0f;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  int p = 0;
  u32 phase = 0;
  for (int tile = first; tile < tiles; tile += step) {
    bar_wait(&s.part_bar[p], phase);
    if (lane == 0) bar_expect(&s.part_bar[p], CTAS * COLS * 4);
    float v = 0.0f;
#pragma unroll
    for (int r = 0; r < CTAS; r++) v += lane < COLS ? s.part[p][r][lane] : 0.0f;
    v = scaled_mix(v, gain, base, a.norm_eps);
    const float gate = sigmoid(v), pre = gate + a.eps;
    float all[N];
#pragma unroll
    for (int j = 0; j < N; j++) all[j] = __shfl_sync(~0u, pre, j);
    if (lane < CTAS)
      send4(remote(address(&s.pre[p][rank][0]), lane), remote(address(&s.pre_bar[p]), lane),
            all[0], all[1], all[2], all[3]);
    const long long t = (long long)tile * TILE + rank;
    if (ROWS == 24 && t < a.T) store_maps(v, gate, a.new_post, a.new_comb, t, a.iters, a.eps);
    phase ^= p;
    p ^= 1;
  }
}

// One row of fn and stream at a time, into rows that are padded.
__device__ __forceinline__ void fetch_fn(Shared &s, const Args &a, u32 rank) {
  const int lane = threadIdx.x & 31;
  if (lane == 0) {
    bar_init(&s.fn_bar);
    for (int p = 0; p < 2; p++) {
      bar_init(&s.part_bar[p]);
      bar_init(&s.pre_bar[p]);
      bar_init(&s.ysum_bar[p]);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    bar_expect(&s.fn_bar, ROWS * N * SLAB * 4);
    for (int p = 0; p < 2; p++) {
      bar_expect(&s.part_bar[p], CTAS * COLS * 4);
      bar_expect(&s.pre_bar[p], TILE * N * 4);
      bar_expect(&s.ysum_bar[p], CTAS * TILE * YPARTS * 4);
    }
  }
  __syncwarp();
  for (int i = lane; i < ROWS * N; i += 32) {
    const int row = i / N, stream = i % N;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(address(s.fn + row * FN_STRIDE + stream * SLAB)),
        "l"(a.fn + (row * N + stream) * (long long)D + rank * SLAB), "r"(SLAB * 4),
        "r"(address(&s.fn_bar))
        : "memory");
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) KERNEL(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared &s = *(Shared *)memory;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int first = blockIdx.x / CTAS, step = gridDim.x / CTAS;
  const bool is_owner = threadIdx.x >= COMPUTE;
  asm volatile("griddepcontrol.launch_dependents;");
  if (is_owner) fetch_fn(s, a, rank);
  __syncthreads();
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  if (is_owner)
    owner_warp(s, a, rank, first, step);
  else
    compute_warps(s, a, rank, first, step);
}
