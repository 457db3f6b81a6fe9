// y = W x, FP32, for BF16 W and x and few tokens. The Python files of this name check arguments.
//
// A block has ROWS rows and four chunks of K, one for a warpgroup; CLUSTER blocks have all chunks
// of the same rows. Every warp copies the weights of its own 16 rows asynchronously into a ring that
// only it reads, so that its loop has no barrier, and asks for as much as the ring holds before the
// kernel in front of it has ended. The block of rank r gives the tokens r, r + CLUSTER, ...: it
// adds the sums of all chunks, chunk 0 first, which reach it through distributed shared memory.
//
// Follows linear_device.cu in one text.

// NTOK     columns of the matrix instruction: 8, 16, 32 or 64 tokens
// ROWS     rows of a block: 16, 32 or 64; the matrix instruction always has 64
// BLOCKS   blocks of 128 columns of a block at most      CLUSTER  blocks that share an output
// DEPTH    steps of 64 columns under way for a warp
// RING     whether x goes through the ring too; else a block stages its share of x as a whole
// PUSH     whether a warp sends its sums to the block that adds them as soon as it has them, to a
//          place of their own; else they lie where x and weights did, once a cluster is done
// JOINED   whether there are a bias by position and several parts
constexpr int NWG = 4, THREADS = NWG * 128, ACC = NTOK / 2, CHUNKS = NWG * CLUSTER;
constexpr int WARPS = ROWS / 16;   // of a warpgroup that have rows
constexpr int W_STEP = 16 * 128;   // bytes of a step of a warp: rows of 64 columns
constexpr int X_STEP = NTOK * 128;
constexpr int X_BYTES = RING ? NWG * DEPTH * X_STEP : 2 * BLOCKS * X_STEP;
constexpr int OWN = (NTOK + CLUSTER - 1) / CLUSTER;  // tokens that a block gives at most
constexpr int PITCH = 68;          // floats of 64 rows in the sums of a token
constexpr int PIECES = BLOCKS * 16;  // 16 bytes each, of a token's share of x
constexpr int X_ITEMS = (NTOK * PIECES + THREADS - 1) / THREADS;  // of a thread, for all tokens
constexpr int AT_ONCE = RING ? 1 : 2;                             // steps of a chunk are even
constexpr int X_BATCH = X_ITEMS < 8 ? X_ITEMS : 8;                // on their way at a time
static_assert(ROWS % 16 == 0 && ROWS <= 64, "whole warps of one matrix instruction");
static_assert(DEPTH >= AT_ONCE && NTOK <= 64, "a ring with room");
static_assert(!RING || DEPTH > 1, "a slot is filled while another is read");

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy_once(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "l"(read_once()));
}

// 16 rows and 16 columns, as the matrix unit's A operand.
__device__ __forceinline__ void load_fragment(u32 (&a)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

// d += a b: 64 rows of weights, NTOK tokens, 16 columns.
__device__ __forceinline__ void mma(float (&d)[ACC], const u32 (&a)[4], u64 b) {
#if NTOK == 8
  asm volatile(MMA("1", 8) "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8" MMA_END : D4(0) : A4, "l"(b));
#elif NTOK == 16
  asm volatile(MMA("1", 16) "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12" MMA_END
               : D4(0), D4(4) : A4, "l"(b));
#elif NTOK == 32
  asm volatile(MMA("1", 32) "{" NAMES_16 "}, {%16,%17,%18,%19}, %20" MMA_END
               : D16(0) : A4, "l"(b));
#else
  asm volatile(MMA("1", 64) "{" NAMES_32 "}, {%32,%33,%34,%35}, %36" MMA_END
               : D16(0), D16(16) : A4, "l"(b));
#endif
}

// Store in another block, which its barrier counts; both are addresses of `in_block`.
__device__ __forceinline__ void send(u32 to, u32 bar, float v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               ::"r"(to), "r"(__float_as_uint(v)), "r"(bar) : "memory");
}

__device__ __forceinline__ float load_cluster(u32 address) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

// What the joined kernel has besides: the first rows of parts 1 to 4, and a bias for R places.
struct Joined {
  const float* bias;
  const long long* position;
  int R, first[4];
};

__device__ __forceinline__ float bias_of(const Joined& p, long long position, int row, int N) {
  return p.bias[position % p.R * N + row];
}

// Where the value of a token and a row lies: parts follow each other, each [T, its rows].
__device__ __forceinline__ size_t place_of(const Joined& p, int token, int row, int T, int N) {
  int start = 0, end = N;
  for (int i = 0; i < 4; i++) start = row >= p.first[i] ? p.first[i] : start;
  for (int i = 3; i >= 0; i--) end = row < p.first[i] ? p.first[i] : end;
  return (size_t)start * T + (row - start) + (size_t)token * (end - start);
}

__device__ __forceinline__ void run(
    u8* memory, const u8* __restrict__ x, const u8* __restrict__ weight, float* y, int T, int N,
    int K, const Joined& joined) {
  let_next_start();
  const int tid = threadIdx.x, wg = tid / 128, warp = tid / 32 % 4, lane = tid % 32;
  const int rank = blockIdx.x % CLUSTER, first_row = blockIdx.x / CLUSTER * ROWS;
  const int num_blocks = K / 128;
  auto first_block = [&](int chunk) { return chunk * num_blocks / CHUNKS; };
  const int chunk = rank * NWG + wg, begin = first_block(chunk);
  const int block0 = first_block(rank * NWG);
  const int steps = 2 * (first_block(chunk + 1) - begin);
  const bool has_rows = warp < WARPS;
  const u32 xs = shared_address(memory);
  const u32 ring = xs + X_BYTES + (wg * WARPS + warp) * (DEPTH * W_STEP);
  const int own = (T - rank + CLUSTER - 1) / CLUSTER;  // tokens that this block gives
#if PUSH
  const u32 parts = xs + X_BYTES + NWG * WARPS * DEPTH * W_STEP;
  const u32 bar = parts + CHUNKS * OWN * ROWS * 4;
  if (tid < 32) open_barrier(bar, own * CHUNKS * ROWS * 4, tid == 0);
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif

  // A lane copies 16 bytes of rows i, i + 4, i + 8 and i + 12; past the last row, of that one.
  const u8* w_from[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int row = min(first_row + warp * 16 + j * 4 + lane / 8, N - 1);
    w_from[j] = weight + ((size_t)row * K + begin * 128 + lane % 8 * 8) * 2;
  }
  auto copy_weights = [&](int step) {
    if (has_rows && step < steps)
#pragma unroll
      for (int j = 0; j < 4; j++)
        copy_once(ring + step % DEPTH * W_STEP + swizzled(j * 4 + lane / 8, lane % 8),
                  w_from[j] + step * 128);
  };
  for (int step = 0; step < DEPTH; step++) {
    copy_weights(step);
    if (!RING || step == DEPTH - 1) commit_copies();
  }

  // From here on what the kernel before this one wrote may be read. Tokens from T on stay what they
  // are in shared memory: no other token depends on them, and nobody reads their sums.
  wait_for_previous();
  const bool has_out = tid < own * ROWS && first_row + tid % ROWS < N;
  long long position = 0;
  if (JOINED && has_out)
    asm volatile("ld.global.u64 %0, [%1];"
                 : "=l"(position) : "l"(joined.position + tid / ROWS * CLUSTER + rank));
#if RING
  const u8* x_from = x + begin * 256;
  auto copy_x = [&](int step) {
    if (step < steps)
      for (int i = tid % 128; i < T * 8; i += 128)
        copy_async(xs + (wg * DEPTH + step % DEPTH) * X_STEP + swizzled(i / 8, i % 8),
                   x_from + (size_t)(i / 8) * K * 2 + step * 128 + i % 8 * 16);
  };
  for (int step = 0; step < DEPTH; step++) {
    copy_x(step);
    commit_copies();
  }
#else
  const u8* x_from = x + block0 * 256;
  const int pieces = (first_block(rank * NWG + NWG) - block0) * 16;
  for (int first = tid; first < T * PIECES; first += X_BATCH * THREADS) {
    uint4 v[X_BATCH];
#pragma unroll
    for (int j = 0; j < X_BATCH; j++) {
      const int i = first + j * THREADS, token = i / PIECES, piece = i % PIECES;
      if (token >= T) break;
      if (piece < pieces)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                     : "l"(x_from + (size_t)token * K * 2 + piece * 16));
    }
#pragma unroll
    for (int j = 0; j < X_BATCH; j++) {
      const int i = first + j * THREADS, token = i / PIECES, piece = i % PIECES;
      if (token >= T) break;
      if (piece < pieces)
        *(uint4*)(memory + piece / 8 * X_STEP + swizzled(token, piece % 8)) = v[j];
    }
  }
  publish_to_products();
  __syncthreads();
#endif
  // Asked for now, needed at the end.
  float bias = JOINED && has_out ? bias_of(joined, position, first_row + tid % ROWS, N) : 0;

  float acc[ACC] = {};
  for (int step = 0; step < steps; step += AT_ONCE) {
    await_copies<DEPTH - 2>();
#if RING
    // Who passes the barrier knows that this step has arrived for all, and that all are done with
    // the step before, whose slot is free then.
    publish_to_products();
    group_barrier(wg);
    if (step > 0) {
      copy_weights(step - 1 + DEPTH);
      copy_x(step - 1 + DEPTH);
      commit_copies();
    }
    const u32 block = xs + (wg * DEPTH + step % DEPTH) * X_STEP;
#else
    __syncwarp();
    const u32 block = xs + ((begin - block0) * 2 + step) * X_STEP;
#endif
    u32 a[4 * AT_ONCE][4] = {};
    if (has_rows)
#pragma unroll
      for (int j = 0; j < 4 * AT_ONCE; j++)
        load_fragment(a[j], ring + (step + j / 4) % DEPTH * W_STEP +
                                swizzled(lane % 16, j % 4 * 2 + lane / 16));
#if !RING
    __syncwarp();
    for (int i = 0; i < AT_ONCE; i++) {
      copy_weights(step + i + DEPTH);
      commit_copies();
    }
#endif
    const u64 at = descriptor(block);
    begin_products();
#pragma unroll
    for (int j = 0; j < 4 * AT_ONCE; j++) mma(acc, a[j], at + j / 4 * (X_STEP >> 4) + j % 4 * 2);
    commit_products();
    wait_products<0>();
    hold(acc);
  }

#if PUSH
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // all have opened their barriers
  if (has_rows)
#pragma unroll
    for (int i = 0; i < ACC; i++) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, to = token % CLUSTER;
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
      const u32 at = parts + ((chunk * OWN + token / CLUSTER) * ROWS + row) * 4;
      if (token < T) send(in_block(at, to), in_block(bar, to), acc[i]);
    }
  // Nobody leaves before all that is sent to him is there.
  if (own > 0) await_bytes(bar);
  auto load_part = [&](int c, int i) {
    float v;
    const u32 at = parts + ((c * OWN + i / ROWS) * ROWS + i % ROWS) * 4;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
  };
#else
  // Sums of the chunks: [chunk][token][PITCH], over what x and the ring held.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  if (has_rows) {
    float* to = (float*)memory + (wg * NTOK + lane % 4 * 2) * PITCH + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < ACC; i++) to[(i / 4 * 8 + i % 2) * PITCH + i / 2 % 2 * 8] = acc[i];
  }
  if (CLUSTER > 1) cluster_barrier(); else __syncthreads();
  u32 sums[CLUSTER];
#pragma unroll
  for (int r = 0; r < CLUSTER; r++) sums[r] = in_block(xs, r);
  auto load_part = [&](int c, int i) {
    const int token = i / ROWS * CLUSTER + rank;
    return load_cluster(sums[c / NWG] + ((c % NWG * NTOK + token) * PITCH + i % ROWS) * 4);
  };
#endif
  for (int i = tid; i < own * ROWS; i += THREADS) {
    const int token = i / ROWS * CLUSTER + rank, row = first_row + i % ROWS;
    if (row >= N) continue;
    float part[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) part[c] = load_part(c, i);
    float total = part[0];
#pragma unroll
    for (int c = 1; c < CHUNKS; c++) total += part[c];
#if JOINED
    if (i != tid) bias = bias_of(joined, joined.position[token], row, N);
    y[place_of(joined, token, row, T, N)] = total + bias;
#else
    y[(size_t)token * N + row] = total;
#endif
  }
#if !PUSH
  // Nobody leaves while his sums are read; what was read has arrived, so that nothing need be seen.
  if (CLUSTER > 1)
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;"
                 ::: "memory");
#endif
}

#if JOINED
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
joined_wide_linear_kernel(const u8* x, const u8* weight, float* y, int T, int N, int K,
                          const float* bias, const long long* position, int R, int b1, int b2,
                          int b3, int b4) {
  extern __shared__ __align__(1024) u8 memory[];
  run(memory, x, weight, y, T, N, K, Joined{bias, position, R, {b1, b2, b3, b4}});
}
#else
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
wide_linear_kernel(const u8* x, const u8* weight, float* y, int T, int N, int K) {
  extern __shared__ __align__(1024) u8 memory[];
  run(memory, x, weight, y, T, N, K, Joined{});
}
#endif
