// mHC for many tokens: 16 blocks share tiles of 16 tokens, and do not wait for the tile at hand.
//
// Rank r of a group of 16 blocks keeps its sixteenth of the columns of fn in shared memory. A team of
// its warps, one for every 32 of those columns, and the same team of the group's other blocks walk tiles:
//   mix     tile i: streams, stored; products and squares: 25 sums for each token and rank
//   finish  token r of tile i - LAG, whose sums of all ranks have come meanwhile: adds them up,
//           collapses its streams, read again from L2, norm, store
// So no exchange is waited for, and the streams of LAG tiles a team are what L2 must hold. Products,
// sums and their order are those of mhc_cluster.cu: a token's bits are the same in both.
//
// Order between blocks. What a team has stored of its n-th tile is behind a barrier of the team when
// one thread stores n + 1, with release, to the team's flag of its rank; warps that want it load the
// flags of all ranks, with acquire, until they say so. Flags are zero before and after: of the 16 teams
// the last that needs to wait no more clears them.
//
// Teams of a group wait for each other, so its 16 blocks must be resident at once. Blocks start in their
// order and those in front end by themselves, so they come to be, unless what holds the other SMs waits
// too: a launch may have 15 blocks that wait. So not beside, on another stream, a kernel whose whole
// grid waits for itself, nor eight more launches of this one.
//
// Order in a team. Three barriers a tile: (1) coefficients have come, and what the tile before has left
// in shared memory has been read; (2) sums of all warps are there; (3) squares of y are there, all
// has been stored.
//
// Constants: D a multiple of 1024, ROWS 24, POST 1, QUANTISE, NORM_BF16, LAG, FLAGS of 16 teams;
// SHARED_BYTES, BLOCK_THREADS and ARGS_BYTES of the launch.
// Follows mhc_device.cu in one text.

constexpr bool IN_PARTS = WARPS <= 8;  // 2,304 bytes for 4 columns of all rows; else 1,536 in FP32
constexpr int TEAMS = IN_PARTS ? 16 / WARPS : 1;
constexpr int TEAM = 32 * WARPS, THREADS = TEAMS * TEAM;
constexpr int SLOTS = 2;  // of 8 columns for each thread of the team that has a token
constexpr int COEFS = N + N * N;
constexpr int FN_BYTES = IN_PARTS ? WARPS * STEPS * NB * 768 : ROWS * FN_STRIDE * 4;
static_assert(ROWS == 24 && POST && LAG >= 1 && SLOTS * 8 * TEAM == D && FLAGS > CTAS, "sizes");

struct __align__(16) TeamShared {
  float red[WARPS * TILE * RED_STRIDE];
  float coef[2][TILE][COEFS];
  float squares[D / 32];  // of y
};

struct __align__(16) Shared {
  unsigned char fn[FN_BYTES];
  uint4 x[N][THREADS];  // tokens 8 to 15 of the tile to come: of each thread alone
  TeamShared team[TEAMS];
};

static_assert(sizeof(Shared) == SHARED_BYTES && THREADS == BLOCK_THREADS, "what the host plans");

struct Args : Tensors {
  float *partial;  // [T, ranks, COLS]
  int *flags;  // one for each rank, and how many teams wait no more
  int T, iters;
  float norm_eps, eps;
};
static_assert(sizeof(Args) == ARGS_BYTES, "what the host sends");

// Tiles of a team: tile(0), tile(1) ..
struct Walk {
  int team, rank, first, step, count;
  __device__ __forceinline__ int tile(int n) const { return first + n * step; }
};

// What a thread has asked for of the tile to come; x of token g + 8 comes to shared memory.
struct Raw {
  uint4 o[2], x[N];
};

// ---- PTX

__device__ __forceinline__ void team_sync(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM) : "memory");
}

__device__ __forceinline__ void copy16(void *to, const void *from, bool is_live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(is_live ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void store_release(int *p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ int load_acquire(const int *p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ int add_ordered(int *p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}

__device__ __forceinline__ float load_float(const float *p) {  // from L2
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

// ---- mix

// The rank's columns of fn: as B fragments of every warp and step, or as rows.
__device__ __forceinline__ void stage_fn(Shared &s, const float *fn, int rank) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  fn += rank * SLAB;
  if (IN_PARTS) {
#pragma unroll 4
    for (int i = threadIdx.x >> 5; i < WARPS * STEPS * NB; i += THREADS / 32) {
      const int b = i % NB, step = i / NB % STEPS, warp = i / (NB * STEPS), row = b * 8 + g;
      uint4 f = load16(
          fn + (row * N + step / 2) * (long long)D + warp * 32 + 8 * q + step % 2 * 4, row < ROWS);
      put_parts(((Parts *)s.fn)[i], f);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * N * SLAB / 4; i += THREADS) {
      const int row = i / (N * SLAB / 4), column = i % (N * SLAB / 4) * 4;
      const float *from = fn + (row * N + column / SLAB) * (long long)D + column % SLAB;
      *(uint4 *)((float *)s.fn + row * FN_STRIDE + column) = load16(from, true);
    }
  }
}

// What is asked for has come at barrier 1 of the tile.
__device__ __forceinline__ void ask_for_tile(
    Shared &s, Raw &raw, const Args &a, const Walk &walk, int n, int column) {
  const int g = (threadIdx.x & 31) >> 2;
  const long long first = (long long)walk.tile(n) * TILE;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const long long t = first + g + 8 * h;
    const bool is_live = t < a.T;
    const long long from = is_live ? t : 0;
    raw.o[h] = load16(a.o + from * D + column, is_live);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const unsigned short *x = a.x + (from * N + j) * D + column;
      if (h)
        copy16(&s.x[j][threadIdx.x], x, is_live);
      else
        raw.x[j] = load16(x, is_live);
    }
  }
  float(*coef)[COEFS] = s.team[walk.team].coef[n & 1];
  for (int i = threadIdx.x % TEAM; i < TILE * (N + 1); i += TEAM) {
    const int token = i / (N + 1), part = i % (N + 1);
    const bool is_live = first + token < a.T;
    const long long t = is_live ? first + token : 0;
    const float *from = part ? a.comb + (t * N + part - 1) * N : a.post + t * N;
    copy16(&coef[token][part * N], from, is_live);
  }
}

// Streams of tile n from what was asked for, stored; asks for the next.
__device__ __forceinline__ void streams_of(
    Shared &s, const Args &a, const Walk &walk, uint4 (&x)[2][N], float (&squares)[2], Raw &raw,
    int n, int column) {
  const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const long long t = (long long)walk.tile(n) * TILE + g + 8 * h;
    uint4 old[N];
#pragma unroll
    for (int j = 0; j < N; j++) old[j] = h ? s.x[j][threadIdx.x] : raw.x[j];
    squares[h] = 0.0f;
    make_streams(x[h], raw.o[h], old, s.team[walk.team].coef[n & 1][g + 8 * h], squares[h]);
    if (t < a.T)
#pragma unroll
      for (int k = 0; k < N; k++) store16(a.streams + (t * N + k) * D + column, x[h][k]);
  }
  if (n + 1 < walk.count) ask_for_tile(s, raw, a, walk, n + 1, column);
}

// Sums over the rank's warps, to memory.
__device__ __forceinline__ void store_sums(
    TeamShared &s, const Args &a, const Walk &walk, float (&sum)[NB][4], const float (&squares)[2],
    int n) {
  const int thread = threadIdx.x % TEAM;
  leave_sums(s.red, thread >> 5, sum, squares);
  team_sync(walk.team);
  for (int i = thread; i < TILE * COLS; i += TEAM) {
    const int token = i / COLS, column = i % COLS;
    const long long t = (long long)walk.tile(n) * TILE + token;
    const float v = sum_of_warps(s.red, token, column);
    if (t < a.T) a.partial[(t * CTAS + walk.rank) * COLS + column] = v;
  }
}

__device__ __forceinline__ void mix(
    Shared &s, const Args &a, const Walk &walk, Raw &raw, int n, int column) {
  const int warp = threadIdx.x % TEAM >> 5;
  uint4 x[2][N];
  float squares[2], sum[NB][4];
  wait_for_copies();
  team_sync(walk.team);
  streams_of(s, a, walk, x, squares, raw, n, column);
  if (IN_PARTS)
    products(((const Parts(*)[STEPS][NB])s.fn)[warp], x, sum);
  else
    products((const float *)s.fn, warp, x, sum);
  store_sums(s.team[walk.team], a, walk, sum, squares, n);
}

// ---- finish

// What a thread has of the token that its team finishes: columns 8 (thread + TEAM slot) and on.
struct Token {
  float y[SLOTS][8];
  uint4 norm[SLOTS][NORM_BF16 ? 1 : 2];
  u32 largest[SLOTS];

  __device__ __forceinline__ float weight(int i, int k) {
    if (!NORM_BF16) return __uint_as_float(word(norm[i][k / 4 % (NORM_BF16 ? 1 : 2)], k % 4));
    return k % 2 ? high(word(norm[i][0], k / 2)) : low(word(norm[i][0], k / 2));
  }
};

__device__ __forceinline__ void load_norm(Token &token, const Args &a) {
#pragma unroll
  for (int i = 0; i < SLOTS; i++)
#pragma unroll
    for (int k = 0; k < (NORM_BF16 ? 1 : 2); k++) {
      const int column = 8 * (threadIdx.x % TEAM + i * TEAM) + 4 * k;
      const void *from = NORM_BF16 ? (const void *)((const unsigned short *)a.norm + column)
                                   : (const void *)((const float *)a.norm + column);
      uint4 &v = token.norm[i][k];
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from));
    }
}

__device__ __forceinline__ void load_slot(uint4 (&x)[N], const Args &a, long long t, int i) {
#pragma unroll
  for (int j = 0; j < N; j++)
    x[j] = load16(a.streams + (t * N + j) * D + 8 * (threadIdx.x % TEAM + i * TEAM), true);
}

// Waits for the sums of tile n from all ranks. -> streams and scaled mix of the lane.
__device__ __forceinline__ float gather(
    uint4 (&x)[SLOTS][N], const Args &a, const int *flags, long long t, int n) {
  const int lane = threadIdx.x & 31;
  if (lane < CTAS)
    for (u32 tries = 0; load_acquire(flags + lane) <= n; count_try(tries)) {}
  __syncwarp();
  const int row = min(lane, ROWS - 1);
  const float gain = load_float(a.scale + min(row / N, 2));
  const float base = load_float(a.base + row);
  float part[CTAS], v = 0.0f;
#pragma unroll
  for (int r = 0; r < CTAS; r++)
    part[r] = lane < COLS ? load_float(a.partial + (t * CTAS + r) * COLS + lane) : 0.0f;
  load_slot(x[0], a, t, 0);
#pragma unroll
  for (int r = 0; r < CTAS; r++) v += part[r];
  load_slot(x[1], a, t, 1);
  return scaled_mix(v, gain, base, a.norm_eps);
}

// post, and what comb will be made of, in its place.
__device__ __forceinline__ void store_mixes(const Args &a, long long t, float v, float gate) {
  const int lane = threadIdx.x & 31;
  if (lane >= N && lane < 2 * N) a.new_post[t * N + lane - N] = 2.0f * gate;
  if (lane >= 2 * N && lane < ROWS) a.new_comb[t * N * N + lane - 2 * N] = v;
}

// y of token t before its norm, and its squares.
__device__ __forceinline__ void collapse_token(
    TeamShared &s, const Args &a, Token &token, const int *flags, long long t, int n) {
  const int thread = threadIdx.x % TEAM;
  uint4 x[SLOTS][N];
  const float v = gather(x, a, flags, t, n);
  const float gate = sigmoid(v), pre = gate + a.eps;
  float all[N];
#pragma unroll
  for (int j = 0; j < N; j++) all[j] = __shfl_sync(~0u, pre, j);
  if (thread < 32) store_mixes(a, t, v, gate);
  if (QUANTISE) load_norm(token, a);
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    const int slot = thread + i * TEAM;
    float squares = 0.0f;
    collapse(token.y[i], x[i], all, squares);
    squares = quad_sum(squares);
    if (thread % 4 == 0) s.squares[slot / 4] = squares;
    if (QUANTISE) {
      u32 m = 0;
#pragma unroll
      for (int k = 0; k < 8; k++)
        m = max(m, __float_as_uint(token.y[i][k] * token.weight(i, k)) & 0x7FFFFFFFu);
      m = quad_max(m);
      m = max(m, __shfl_xor_sync(~0u, m, 4));
      token.largest[i] = max(m, __shfl_xor_sync(~0u, m, 8));
    }
  }
  if (!QUANTISE) load_norm(token, a);
}

// 1 / RMS of y: ranks add up their warps, then each lane of a quad four ranks.
__device__ __forceinline__ float factor_of(const TeamShared &s, const Args &a) {
  const int lane = threadIdx.x & 31, rank = lane % CTAS;
  float v = 0.0f, sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) v += s.squares[rank * WARPS + w];
#pragma unroll
  for (int i = 0; i < 4; i++) sum += __shfl_sync(~0u, v, 4 * (lane & 3) + i);
  return inverse_root(quad_sum(sum) / D + a.norm_eps);
}

__device__ __forceinline__ void store_token(
    const TeamShared &s, const Args &a, Token &token, long long t) {
  const float factor = factor_of(s, a);
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    const int column = 8 * (threadIdx.x % TEAM + i * TEAM);
    uint4 out;
#pragma unroll
    for (int k = 0; k < 4; k++)
      word(out, k) = pack(token.y[i][2 * k] * token.weight(i, 2 * k) * factor,
                          token.y[i][2 * k + 1] * token.weight(i, 2 * k + 1) * factor);
    store16(a.y + t * D + column, out);
    if (QUANTISE)
      store_fp8(a.value, a.fp8_scale, out, __uint_as_float(token.largest[i]) * factor, t, column);
  }
}

// comb of up to 32 tokens, the last of which is that of tile n; a lane has a token.
__device__ __forceinline__ void store_combs(const Args &a, const Walk &walk, int n) {
  const int mine = n / 32 * 32 + (threadIdx.x & 31);
  const long long t = (long long)walk.tile(mine) * TILE + walk.rank;
  __syncwarp();
  if (mine > n || t >= a.T) return;
  float c[N][N];
#pragma unroll
  for (int j = 0; j < N; j++) {
    uint4 v = load16(a.new_comb + (t * N + j) * N, true);
#pragma unroll
    for (int k = 0; k < N; k++) c[j][k] = __uint_as_float(word(v, k));
  }
  sinkhorn(c, a.iters, a.eps);
#pragma unroll
  for (int j = 0; j < N; j++) {
    uint4 v;
#pragma unroll
    for (int k = 0; k < N; k++) word(v, k) = __float_as_uint(c[j][k]);
    store16(a.new_comb + (t * N + j) * N, v);
  }
}

// The third barrier of tile n, behind which others may read what the team has stored of it.
__device__ __forceinline__ void end_mix(const Walk &walk, int *flags, int n) {
  team_sync(walk.team);
  if (threadIdx.x % TEAM == 0 && n < walk.count) store_release(flags + walk.rank, n + 1);
}

__device__ void team_warps(Shared &s, const Args &a, const Walk &walk) {
  const int thread = threadIdx.x % TEAM;
  const int column = walk.rank * SLAB + thread / 32 * 32 + 8 * (thread & 3);
  int *flags = a.flags + walk.first * FLAGS;
  TeamShared &team = s.team[walk.team];
  Raw raw;
  ask_for_tile(s, raw, a, walk, 0, column);
#pragma unroll 1
  for (int i = 0; i < walk.count + LAG; i++) {
    const int n = i - LAG;
    const long long t = (long long)walk.tile(n) * TILE + walk.rank;
    if (i < walk.count) mix(s, a, walk, raw, i, column);
    if (n >= 0 && t < a.T) {
      Token token;
      collapse_token(team, a, token, flags, t, n);
      end_mix(walk, flags, i);
      store_token(team, a, token, t);
    } else {
      end_mix(walk, flags, i);
    }
    if (thread < 32 && n >= 0 && (n % 32 == 31 || i + 1 == walk.count + LAG))
      store_combs(a, walk, n);
    if (i + 1 >= walk.count) team_sync(walk.team);  // no mixes come: squares have been read
  }
  if (thread == 0 && add_ordered(flags + CTAS, 1) == CTAS - 1)
    for (int r = 0; r <= CTAS; r++) flags[r] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mhc_post_pre_kernel(
    const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared &s = *(Shared *)memory;
  asm volatile("griddepcontrol.launch_dependents;");
  const int groups = gridDim.x / CTAS, tiles = (a.T + TILE - 1) / TILE;
  const int team = __shfl_sync(~0u, threadIdx.x / TEAM, 0);  // the same for a warp, as the compiler sees
  Walk walk;
  walk.team = team;
  walk.rank = blockIdx.x % CTAS;
  walk.first = team * groups + blockIdx.x / CTAS;
  walk.step = TEAMS * groups;
  walk.count = walk.first < tiles ? (tiles - walk.first + walk.step - 1) / walk.step : 0;
  stage_fn(s, a.fn, walk.rank);
  __syncthreads();
  wait_for_previous();
  if (walk.count) team_warps(s, a, walk);
}
