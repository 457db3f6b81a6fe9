// y = W x for FP8 block-scaled W and few tokens. The Python file of the same name checks arguments.
//
// linear_fp8_kernel is for up to 16 tokens, linear_fp8_stream_kernel for 17 to 64. In either a block
// stages its share of x in shared memory, then streams weights: a thread copies 16 bytes of a row
// asynchronously into a ring that only it reads, decodes them into the registers of the matrix
// unit's A operand and multiplies; there is no barrier between two steps.
//
// Order of columns: within 64, thread q of four owns 16 q .. 16 q + 15, which is what 16 bytes of a
// row are; x is staged in the matching order, so products meet their partners.
//
// Follows linear_device.cu in one text.

// NTOK   columns of the matrix instruction: 8, 16, 32 or 64 tokens
// NWG    warpgroups of a block        CHUNK  steps of 128 columns in a chunk
// DEPTH  steps under way for a thread
// QUANT  0: x is BF16, 1: it is rounded to FP8, 2: it is FP8 with scales already
// E8M0   whether scales of weights are bytes, not FP32
//
// group_magic: the upper half of its product with a row is the row's group. A division would stand
// behind the wait for the kernel before, in front of x.
constexpr int THREADS = NWG * 128, WARPS = NWG * 4, ACC = NTOK / 2;
constexpr int STAGE = NWG * 8192;             // bytes of one step of all warpgroups
constexpr int X_BLOCK = 2 * NTOK * 128;       // bytes of x for 128 columns, half used when FP8
constexpr int STEPS = QUANT ? 2 : 4;          // matrix instructions for 64 columns

__device__ __forceinline__ void copy_async(u32 to, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from), "l"(policy));
}

// What a thread decodes of a step: 16 of each 64 columns of two rows, the second `below` bytes on.
__device__ __forceinline__ void copy_rows(u32 to, const u8* from, int below, u64 policy) {
  copy_async(to, from, policy);
  copy_async(to + THREADS * 16, from + 64, policy);
  copy_async(to + THREADS * 32, from + below, policy);
  copy_async(to + THREADS * 48, from + below + 64, policy);
}

// d = a b + (keep ? d : 0): 64 rows of weights, NTOK tokens, 16 columns (32 of FP8).
__device__ __forceinline__ void mma(float (&d)[ACC], const u32 (&a)[4], u64 b, int keep) {
#if NTOK == 8
  asm volatile(MMA("%9", 8) "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8" MMA_END
               : D4(0) : A4, "l"(b), "r"(keep));
#elif NTOK == 16
  asm volatile(MMA("%13", 16) "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12" MMA_END
               : D4(0), D4(4) : A4, "l"(b), "r"(keep));
#elif NTOK == 32
  asm volatile(MMA("%21", 32) "{" NAMES_16 "}, {%16,%17,%18,%19}, %20" MMA_END
               : D16(0) : A4, "l"(b), "r"(keep));
#else
  asm volatile(MMA("%37", 64) "{" NAMES_32 "}, {%32,%33,%34,%35}, %36" MMA_END
               : D16(0), D16(16) : A4, "l"(b), "r"(keep));
#endif
}

#if QUANT
// Round 8 neighbours to FP8 with the scale of their 128; sixteen lanes hold those. -> the scale
__device__ __forceinline__ float quantize(const uint4& v, u32& low, u32& high) {
  u32 word[4] = {v.x, v.y, v.z, v.w}, amax = 0;
  for (int i = 0; i < 4; i++)
    amax = max(amax, max((word[i] & 0x7fff) << 16, word[i] & 0x7fff0000));
  for (int lane = 8; lane > 0; lane /= 2) amax = max(amax, __shfl_xor_sync(~0u, amax, lane));
  amax = max(amax, 0x38d1b717u);  // 1e-4
  u32 bits = __float_as_uint(__fmul_rn(__uint_as_float(amax), 1.0f / 448.0f)) & 0x7fffffffu;
  u32 byte = min((bits >> 23) + ((bits & 0x7fffff) != 0), 255u);
  float inverse = __uint_as_float(byte == 255 ? 0x7fc00000u : (254 - byte) << 23);
  u32 half[4];
  for (int i = 0; i < 4; i++) {
    float a = __uint_as_float(word[i] << 16) * inverse;
    float b = __uint_as_float(word[i] & 0xffff0000u) * inverse;
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
    half[i] = pair;
  }
  low = half[0] | half[1] << 16, high = half[2] | half[3] << 16;
  return e8m0(byte);
}
#endif

// A warp takes 64 columns of four tokens of x at a time, or 128 of two where they share a scale.
constexpr int X_LANES = QUANT ? 16 : 8, X_TOKENS = 32 / X_LANES;

// Where the scale of a token's 128 columns is kept: in the half that FP8 leaves free.
__device__ __forceinline__ float* x_scale(u8* xs, int block, int token) {
  return (float*)(xs + block * X_BLOCK + X_BLOCK / 2) + token * 32 + token % 32;
}

#if NTOK > 16
// A block has 256 rows and one chunk of K, a tile of 64 rows for each warpgroup. EARLY of the DEPTH
// steps of weights are asked for before the kernel in front has ended. x is staged STAGED blocks of
// 128 columns at a time, all of the chunk where they fit. Row g of a warp's 16, as the matrix unit
// sees them, is row 4 (g / 2) + g % 2 of the weights, row g + 8 the second one after it: then a lane
// ends up with four neighbouring rows of one token.
//
// PARTS > 1 blocks have the chunks of the same rows. Each leaves its sums in `partial`, waits for
// the others and adds its share of the rows, chunk 0 first. No block waits for one that may never
// start: after PATIENCE clocks it leaves its share to whoever comes last.
constexpr int X_SPANS = 16 / X_LANES, X_ITEMS = X_SPANS * NTOK / X_TOKENS / WARPS;  // of a block
constexpr int X_BYTES = STAGED * X_BLOCK, PASSES = (CHUNK + STAGED - 1) / STAGED;
static_assert(NWG == 4 && EARLY <= DEPTH && DEPTH <= CHUNK && PARTS <= 48,
              "a tile a warpgroup, rings, and the word of a tile");

// Of an 8 x 8 matrix of BF16, a pair of columns of row lane / 4 -> of column lane / 4 a pair of rows.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

__device__ __forceinline__ void store_shared(u32 at, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

__device__ __forceinline__ u64 add_word(u64* word, u64 v) {
  u64 old;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(old) : "l"(word), "l"(v) : "memory");
  return old;
}

__device__ __forceinline__ int arrived(const u64* word) {
  u64 v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(word) : "memory");
  return v & 255;
}

// The word of a tile: bits 0 to 7 count the blocks whose sums are there, 8 to 15 those that look at
// it no more, 16 + r says that block r gave up. -> the shares, a bit each, that this block adds.
__device__ __forceinline__ u64 shares_of(u64* word, int rank) {
  const u64 own = 1ull << rank, old = add_word(word, 1);
  if ((old & 255) == PARTS - 1) return own | old >> 16;
  const long long start = clock64();
  while (arrived(word) < PARTS)
    if (clock64() - start > PATIENCE) return (add_word(word, own << 16) & 255) < PARTS ? 0 : own;
  return own;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_fp8_stream_kernel(const u8* __restrict__ x, const u8* x_scales,
                         const u8* __restrict__ weight, const u8* scale, u8* y, float4* partial,
                         u64* words, int T, int N, int K, int x_stride, u32 group_magic) {
  extern __shared__ __align__(1024) u8 memory[];
  let_next_start();
  const int tid = threadIdx.x, wg = tid / 128, lane = tid % 32, g = lane / 4, q = lane % 4;
  const int rank = blockIdx.x % PARTS, tile = blockIdx.x / PARTS, first_row = tile * 256;
  const int num_blocks = K / 128, block0 = rank * CHUNK, blocks = min(CHUNK, num_blocks - block0);
  u8* xs = memory;
  float* w_scale = (float*)(memory + X_BYTES + DEPTH * STAGE);  // [2][CHUNK]
  const u32 ring = shared_address(memory) + X_BYTES + tid * 16;
  u64* shares = (u64*)(w_scale + 2 * CHUNK);

  const u64 policy = read_once();
  const u8* from = weight + (size_t)(first_row + tid / 32 * 16 + g / 2 * 4 + g % 2) * K +
                   block0 * 128 + q * 16;
  int left = blocks, slot_in = 0;
  auto copy_step = [&]() {
    if (left > 0) {
      copy_rows(ring + slot_in * STAGE, from, 2 * K, policy);
      from += 128, left--;
    }
    commit_copies();
    slot_in = slot_in + 1 == DEPTH ? 0 : slot_in + 1;
  };
#pragma unroll
  for (int i = 0; i < EARLY; i++) copy_step();
  float own_scale = 0.0f;  // of blocks of 128 columns and rows; stored once x is on its way
  if (tid < 2 * CHUNK && tid % CHUNK < blocks) {
    const int at = (first_row / 128 + tid / CHUNK) * num_blocks + block0 + tid % CHUNK;
    own_scale = E8M0 ? e8m0(scale[at]) : ((float*)scale)[at];
  }

  // From here on what the kernel before this one wrote may be read. Of a block of x a lane stages
  // eight columns of token `first` and of every 32nd one after it.
  wait_for_previous();
  const int item = tid / 32, first = item / X_SPANS * X_TOKENS + lane / X_LANES;
  const int piece = item % X_SPANS * X_LANES + lane % X_LANES;
  const size_t x_at = (size_t)__umulhi(first_row, group_magic) * K + (size_t)first * x_stride + block0 * 128;
  const u8* x_from = x + (x_at + piece * 8) * (QUANT == 2 ? 1 : 2);
  auto fetch = [&](uint4* v, int b) {
#pragma unroll
    for (int j = 0; j < X_ITEMS; j++) {
      v[j] = make_uint4(0, 0, 0, 0);
      if (first + 32 * j >= T || b >= blocks) continue;
#if QUANT == 2
      const size_t at = (size_t)(32 * j) * x_stride + b * 128;
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(v[j].x), "=r"(v[j].y) : "l"(x_from + at));
      if (piece == 0)
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(v[j].z) : "l"(x_scales + (x_at + at) / 128));
#else
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                   : "l"(x_from + (size_t)(32 * j) * x_stride * 2 + b * 256));
#endif
    }
  };
  // 16-byte chunks of a row that differ in their last two bits differ there once swizzled.
  const u32 x_to = shared_address(memory) + (QUANT ? 0 : piece / 8 * (X_BLOCK / 2)) +
                   swizzled(first, (QUANT ? piece / 8 * 4 + piece % 2 * 2 : piece % 2 * 4)) +
                   piece % 8 / 2 * 4;
  auto place = [&](const uint4* v, int s) {
#pragma unroll
    for (int j = 0; j < X_ITEMS; j++) {
      const u32 to = x_to + s * X_BLOCK + j * 32 * 128;
#if QUANT
#if QUANT == 2
      const u32 low = v[j].x, high = v[j].y;
      const float scale = e8m0(v[j].z);
#else
      u32 low, high;
      const float scale = quantize(v[j], low, high);
#endif
      store_shared(to, low);
      store_shared(to ^ 16, high);
      if (piece == 0) *x_scale(xs + s * X_BLOCK + j * 32 * 128, 0, first) = scale;
#else
      store_shared(to, __byte_perm(v[j].x, v[j].y, 0x5410));
      store_shared(to ^ 16, __byte_perm(v[j].x, v[j].y, 0x7632));
      store_shared(to ^ 32, __byte_perm(v[j].z, v[j].w, 0x5410));
      store_shared(to ^ 48, __byte_perm(v[j].z, v[j].w, 0x7632));
#endif
    }
  };

  float total[ACC] = {};
  int slot = 0;
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    const int begin = pass * STAGED, end = min(begin + STAGED, blocks);
    if (pass > 0) __syncthreads();  // nobody reads the blocks before any more
    uint4 v[STAGED * X_ITEMS];
#pragma unroll
    for (int i = 0; i < STAGED; i++) fetch(v + i * X_ITEMS, begin + i);
    __syncwarp();  // keeps the compiler from asking for weights first
    if (pass == 0) {
#pragma unroll
      for (int i = EARLY; i < DEPTH; i++) copy_step();
      if (tid < 2 * CHUNK) w_scale[tid] = own_scale;
    }
#pragma unroll
    for (int i = 0; i < STAGED; i++) place(v + i * X_ITEMS, i);
    publish_to_products();
    __syncthreads();
    for (int b = begin; b < end; b++) {
      u8* block = xs + (b - begin) * X_BLOCK;
      const float s = w_scale[wg / 2 * CHUNK + b];
      await_copies<DEPTH - 1>();
      const u64 at = descriptor(shared_address(block));
      float part[ACC];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 raw[2];  // 16 columns of both rows; the second half while the first is multiplied
        load_shared(raw[0], ring + slot * STAGE + half * THREADS * 16);
        load_shared(raw[1], ring + slot * STAGE + (half + 2) * THREADS * 16);
        const u32 top[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
        const u32 low[4] = {raw[1].x, raw[1].y, raw[1].z, raw[1].w};
        u32 a[STEPS][4];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
#if QUANT
          a[j][0] = top[2 * j], a[j][1] = low[2 * j];
          a[j][2] = top[2 * j + 1], a[j][3] = low[2 * j + 1];
#else
          decode_e4m3(top[j], a[j][0], a[j][2]);
          decode_e4m3(low[j], a[j][1], a[j][3]);
#endif
        }
        begin_products();
#pragma unroll
        for (int j = 0; j < STEPS; j++)
          mma(part, a[j], at + (QUANT ? half * 4 : half * (X_BLOCK >> 5)) + 2 * j, half + j > 0);
        commit_products();
      }
      copy_step();  // into the slot that was just read
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
      wait_products<0>();
#pragma unroll
      for (int i = 0; i < ACC; i++) {
        asm volatile("" : "+f"(part[i])::"memory");
#if QUANT
        const float both = s * *x_scale(block, 0, i / 4 * 8 + 2 * q + i % 2);
#else
        const float both = s;
#endif
        total[i] = __fmaf_rn(part[i], both, total[i]);
      }
    }
  }

  // Store what a lane has of the eight tokens of a group and the 16 rows from `row` on.
  auto store = [&](const float4& v, int group, int row) {
    const uint2 rows = make_uint2(transpose(bf16_pair(v.x, v.y)), transpose(bf16_pair(v.z, v.w)));
    const int token = group * 8 + g;
    if (token < T) *(uint2*)(y + ((size_t)token * N + first_row + row + q * 4) * 2) = rows;
  };
  const int groups = (T + 7) / 8;  // of tokens
#if PARTS == 1
#pragma unroll
  for (int i = 0; i < NTOK / 8; i++)
    store(make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]), i,
          tid / 32 * 16);
#else
  float4* sums = partial + (size_t)tile * PARTS * groups * THREADS;
#pragma unroll
  for (int i = 0; i < NTOK / 8; i++)
    if (i < groups)
      sums[(rank * groups + i) * THREADS + tid] =
          make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
  __syncthreads();
  u64* word = (u64*)(((u64)words + 7) & ~7ull) + tile;
  if (tid == 0) *shares = shares_of(word, rank);
  __syncthreads();
  u64 gone = 0;
  if (tid == 0) gone = atomicAdd(word, 256ull);
  // Share r: of the 16 groups of rows of the groups of tokens, r and every PARTS-th after it.
  for (u64 todo = *shares; todo; todo &= todo - 1)
    for (int u = tid / 32 * PARTS + __ffsll(todo) - 1; u < groups * 16; u += WARPS * PARTS) {
      const float4* at = sums + u / 16 * THREADS + u % 16 * 32 + lane;
      float4 sum;
#pragma unroll 8
      for (int c = 0; c < PARTS; c++) {
        float4 v;
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "l"(at + c * groups * THREADS) : "memory");
        if (c == 0) sum = v; else add(sum, v);
      }
      store(sum, u / 16, u % 16 * 16);
    }
  if (tid == 0 && (gone >> 8 & 255) == PARTS - 1) *word = 0;
#endif
}
#else
// A block owns RT tiles of 64 rows and KW chunks of K, one (tile, chunk) or two for a warpgroup, and
// all of x that they need. CLUSTER blocks with different chunks of the same rows add their sums
// through distributed shared memory, chunk 0 first.
//
// PUSH  whether a warp sends its sums to the block that adds them as soon as it has them; else they lie
//       where x and weights did, and are read once all of a cluster have theirs
constexpr int UNITS = RT * KW / NWG, BLOCKS = KW * CHUNK, X_BYTES = BLOCKS * X_BLOCK;
constexpr int X_SPANS = BLOCKS * 16 / X_LANES, X_BATCH = 8;  // X_BATCH items on their way at a time
constexpr int FIXED_BYTES = X_BYTES + ((RT * BLOCKS * 4 + 15) & ~15);  // and scales of weights
constexpr int PITCH = 68;  // floats of 64 rows in the sums of a token
constexpr int OWN = (NTOK + CLUSTER - 1) / CLUSTER, PARTS_BYTES = CLUSTER * KW * OWN * RT * 256;
static_assert(RT * KW % NWG == 0, "whole units for every warpgroup");

// The same of 16 rows and 8 tokens by one warp. The rows, tokens and columns of a lane are those of
// `mma`, and so are the bits. An instruction for a warp group takes the matrix unit about 33 clocks
// however few the tokens are; these four take about 8.
__device__ __forceinline__ void mma_warp(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 load_shared(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

// Write 8 columns of x to their places.
__device__ __forceinline__ void stage(u8* xs, int token, int piece, const uint4& v) {
  const int c = piece % 8, q = c / 2;
#if QUANT
#if QUANT == 2
  const u32 low = v.x, high = v.y;
  const float scale = e8m0(v.z);
#else
  u32 low, high;
  const float scale = quantize(v, low, high);
#endif
  u8* tile = xs + piece / 16 * X_BLOCK;
  const int chunk = piece / 8 % 2 * 4 + c % 2 * 2;
  *(u32*)(tile + swizzled(token, chunk) + 4 * q) = low;
  *(u32*)(tile + swizzled(token, chunk + 1) + 4 * q) = high;
  if (piece % 16 == 0) *x_scale(xs, piece / 16, token) = scale;
#else
  u8* tile = xs + piece / 8 * (X_BLOCK / 2);
  const u32 word[4] = {v.x, v.y, v.z, v.w};
  for (int j = 0; j < 2; j++) {  // words hold columns (0, 1), (2, 3); pairs are (0, 2), (1, 3)
    const int chunk = (c % 2 * 2 + j) * 2;
    const u32 low = word[2 * j], high = word[2 * j + 1];
    *(u32*)(tile + swizzled(token, chunk) + 4 * q) = __byte_perm(low, high, 0x5410);
    *(u32*)(tile + swizzled(token, chunk + 1) + 4 * q) = __byte_perm(low, high, 0x7632);
  }
#endif
}

__device__ __forceinline__ float4 load_cluster(u32 address, int rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(in_block(address, rank)));
  return v;
}

// Store in block `rank` of the cluster, whose barrier counts it.
__device__ __forceinline__ void send(u32 to, u32 bar, int rank, float v) {
  asm volatile("{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %2;\n"
               "mapa.shared::cluster.u32 counter, %1, %2;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [counter];\n}"
               ::"r"(to), "r"(bar), "r"(rank), "r"(__float_as_uint(v)) : "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
linear_fp8_kernel(const u8* __restrict__ x, const u8* x_scales, const u8* __restrict__ weight,
                  const u8* scale, u8* y, int T, int N, int K, int x_stride, u32 group_magic) {
  extern __shared__ __align__(1024) u8 memory[];
  let_next_start();
  const int tid = threadIdx.x, wg = tid / 128, warp = tid / 32 % 4, lane = tid % 32;
  const int g = lane / 4, q = lane % 4;
  const int rank = blockIdx.x % CLUSTER, first_row = blockIdx.x / CLUSTER * (RT * 64);
  const int num_blocks = K / 128, block0 = rank * BLOCKS;
  const int blocks = max(0, min(BLOCKS, num_blocks - block0));
  u8* xs = memory;
  float* w_scale = (float*)(xs + X_BYTES);
  const u32 ring = shared_address(memory) + FIXED_BYTES + tid * 16;
#if PUSH
  const u32 parts = shared_address(memory) + FIXED_BYTES + DEPTH * STAGE;
  const u32 bar = parts + PARTS_BYTES;
  const int own = (T - rank + CLUSTER - 1) / CLUSTER;  // tokens that this block gives
  if (tid < 32) open_barrier(bar, own * CLUSTER * KW * RT * 256, tid == 0);
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif

  // Unit u of this warpgroup: rows of tile t, columns of chunk c of this block.
  auto unit_tile = [&](int u) { return (wg + u * NWG) % RT; };
  auto unit_first = [&](int u) { return (wg + u * NWG) / RT * CHUNK; };
  auto unit_blocks = [&](int u) { return max(0, min(CHUNK, blocks - unit_first(u))); };

  const u64 policy = read_once();
  int to_u = -1, left = 0, slot_in = 0;  // the unit that is copied next, its steps, their slot
  const u8* from = weight + (size_t)(first_row + warp * 16 + g) * K + block0 * 128 + q * 16;
  auto copy_step = [&]() {
    while (left == 0 && to_u < UNITS) {
      if (UNITS > 1 && to_u >= 0)
        from -= unit_tile(to_u) * 64 * (size_t)K + (unit_first(to_u) + unit_blocks(to_u)) * 128;
      if (++to_u < UNITS) {
        left = unit_blocks(to_u);
        from += unit_tile(to_u) * 64 * (size_t)K + unit_first(to_u) * 128;
      }
    }
    if (left > 0) {
      copy_rows(ring + slot_in * STAGE, from, 8 * K, policy);
      from += 128, left--;
    }
    commit_copies();
    slot_in = slot_in + 1 == DEPTH ? 0 : slot_in + 1;
  };
  for (int i = 0; i < DEPTH - 1; i++) copy_step();

  for (int i = tid; i < RT * BLOCKS; i += THREADS) {
    const int at = (first_row + i / BLOCKS * 64) / 128 * num_blocks + block0 + i % BLOCKS;
    if (i % BLOCKS < blocks) w_scale[i] = E8M0 ? e8m0(scale[at]) : ((float*)scale)[at];
  }
  // Multiply the oldest step in the ring with one block of x and add it, scaled.
  int slot = 0;
  auto multiply = [&](float (&total)[ACC], u8* block, float s) {
    await_copies<DEPTH - 2>();
    uint4 raw[4];  // rows g and g + 8, columns 0 .. 63 and 64 .. 127 of each
#pragma unroll
    for (int i = 0; i < 4; i++) load_shared(raw[i], ring + slot * STAGE + i * THREADS * 16);
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
    copy_step();
    const u64 at = descriptor(shared_address(block));
    float part[ACC];
#if !QUANT
#pragma unroll
    for (int i = 0; i < ACC; i++) part[i] = 0.0f;
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 top[4] = {raw[half].x, raw[half].y, raw[half].z, raw[half].w};
      const u32 low[4] = {raw[half + 2].x, raw[half + 2].y, raw[half + 2].z, raw[half + 2].w};
      u32 a[STEPS][4];
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
#if QUANT
        a[j][0] = top[2 * j], a[j][1] = low[2 * j];
        a[j][2] = top[2 * j + 1], a[j][3] = low[2 * j + 1];
#else
        decode_e4m3(top[j], a[j][0], a[j][2]);
        decode_e4m3(low[j], a[j][1], a[j][3]);
#endif
      }
#if QUANT
      begin_products();
#pragma unroll
      for (int j = 0; j < STEPS; j++) mma(part, a[j], at + half * 4 + 2 * j, half + j > 0);
      commit_products();
#else
      const u32 x_at = shared_address(block) + half * (X_BLOCK / 2) + 4 * q;
#pragma unroll
      for (int j = 0; j < STEPS; j++)
#pragma unroll
        for (int i = 0; i < NTOK / 8; i++)
          mma_warp(part + 4 * i, a[j], load_shared(x_at + swizzled(8 * i + g, 2 * j)),
                   load_shared(x_at + swizzled(8 * i + g, 2 * j + 1)));
#endif
    }
#if QUANT
    wait_products<0>();
#endif
#pragma unroll
    for (int i = 0; i < ACC; i++) {
      asm volatile("" : "+f"(part[i])::"memory");
#if QUANT
      const float both = s * *x_scale(block, 0, i / 4 * 8 + 2 * q + i % 2);
#else
      const float both = s;
#endif
      total[i] = __fmaf_rn(part[i], both, total[i]);
    }
  };

  // From here on what the kernel before this one wrote may be read. Tokens from T on stay what they
  // are in shared memory: no other token depends on them, and nobody reads their sums.
  wait_for_previous();
  const size_t x_at = (size_t)__umulhi(first_row, group_magic) * K + block0 * 128;
  const u8* x_from = x + x_at * (QUANT == 2 ? 1 : 2);
  auto load_x = [&](int token, int piece) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token < T && piece < blocks * 16) {
#if QUANT == 2
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(v.x), "=r"(v.y)
                   : "l"(x_from + (size_t)token * x_stride + piece * 8));
      if (piece % 16 == 0)
        asm volatile("ld.global.u8 %0, [%1];"
                     : "=r"(v.z)
                     : "l"(x_scales + (x_at + (size_t)token * x_stride) / 128 + piece / 16));
#else
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(x_from + ((size_t)token * x_stride + piece * 8) * 2));
#endif
    }
    return v;
  };
  float acc[UNITS][ACC] = {};
  const int items = X_SPANS * ((T + X_TOKENS - 1) / X_TOKENS);
  for (int first = tid / 32; first < items; first += X_BATCH * WARPS) {
    uint4 v[X_BATCH];
#pragma unroll
    for (int j = 0; j < X_BATCH; j++) {
      const int i = first + j * WARPS, token = i / X_SPANS * X_TOKENS + lane / X_LANES;
      v[j] = load_x(token, i % X_SPANS * X_LANES + lane % X_LANES);
    }
#pragma unroll
    for (int j = 0; j < X_BATCH; j++) {
      const int i = first + j * WARPS, token = i / X_SPANS * X_TOKENS + lane / X_LANES;
      if (i < items) stage(xs, token, i % X_SPANS * X_LANES + lane % X_LANES, v[j]);
    }
  }
  publish_to_products();
  __syncthreads();
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const int count = unit_blocks(u), first = unit_first(u);
    for (int b = first; b < first + count; b++)
      multiply(acc[u], xs + b * X_BLOCK, w_scale[unit_tile(u) * BLOCKS + b]);
  }

  const int num_chunks = (num_blocks + CHUNK - 1) / CHUNK;
#if PUSH
  // Sums go to the block that adds those of the token, r gives tokens r, r + CLUSTER, ..., to a place
  // of their own: [chunk][token][tile][64].
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // all have opened their barriers
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const int unit = wg + u * NWG, chunk = rank * KW + unit / RT;
#pragma unroll
    for (int i = 0; i < ACC; i++) {
      const int token = i / 4 * 8 + 2 * q + i % 2, row = warp * 16 + g + i / 2 % 2 * 8;
      const u32 to = parts + (((chunk * OWN + token / CLUSTER) * RT + unit % RT) * 64 + row) * 4;
      if (token < T) send(to, bar, token % CLUSTER, acc[u][i]);
    }
  }
  if (own == 0) return;
  await_bytes(bar);  // nobody leaves before all that is sent to him is there
  for (int i = tid; i < own * RT * 16; i += THREADS) {
    float4 total;
#pragma unroll
    for (int c = 0; c < CLUSTER * KW; c++) {
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(parts + (c * OWN * RT * 16 + i) * 16) : "memory");
      if (c == 0) total = v; else if (c < num_chunks) add(total, v);
    }
    const int token = i / (RT * 16) * CLUSTER + rank;
    store_bf16(y + ((size_t)token * N + first_row + i % (RT * 16) * 4) * 2, total);
  }
#else
  // Sums of the units: [unit][token][PITCH], over what x and the ring held.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* sums = (float*)memory;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    float* to = sums + ((wg + u * NWG) * NTOK + 2 * q) * PITCH + warp * 16 + g;
#pragma unroll
    for (int i = 0; i < ACC; i++) to[(i / 4 * 8 + i % 2) * PITCH + i / 2 % 2 * 8] = acc[u][i];
  }
  if (CLUSTER > 1) cluster_barrier(); else __syncthreads();
#pragma unroll 4
  for (int i = rank * THREADS + tid; i < RT * NTOK * 16; i += CLUSTER * THREADS) {
    const int tile = i / 16 % RT, token = i / 16 / RT, row = tile * 64 + i % 16 * 4;
    if (token >= T) break;
    const float* at = sums + (tile * NTOK + token) * PITCH + row % 64;
    float4 total = *(const float4*)at;
    if (CLUSTER > 1) total = load_cluster(shared_address(at), 0);
#pragma unroll
    for (int c = 1; c < CLUSTER * KW; c++) {
      const float* other = at + c % KW * (RT * NTOK * PITCH);
      if (c < num_chunks)
        add(total, CLUSTER > 1 ? load_cluster(shared_address(other), c / KW) : *(const float4*)other);
    }
    store_bf16(y + ((size_t)token * N + first_row + row) * 2, total);
  }
  if (CLUSTER > 1) cluster_barrier();
#endif
}
#endif
