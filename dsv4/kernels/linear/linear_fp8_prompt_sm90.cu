// y = W x for FP8 block-scaled W, many tokens. The Python file of the same name checks arguments.
//
// A block owns 128 rows of W times 128 tokens, 64 rows for each of two warpgroups, and goes on to
// the next such tile when it is done. Tokens come as images, which a kernel before has written: 128
// tokens x 128 columns as the matrix unit wants them in shared memory, so that one thread of a
// third warpgroup fetches them with bulk copies into a ring of SLOTS. Weights go from global memory
// to registers, a step ahead, and are decoded into the matrix unit's A operand there, half of them
// while the products of the other half run; sums of a step are scaled while the other warpgroup's
// products run.
//
// Sums are those of linear_fp8_sm90.cu: products of 128 columns start from zero and are added to
// the sum of a chunk with one FMA; an output is the sum of its chunks, the first one first.
//
// Order of columns: within 64, thread q of four owns 16 q .. 16 q + 15, which is what 16 bytes of a
// row are; images hold the matching order.
//
// Follows linear_device.cu in one text.

// E8M0    whether scales of weights are bytes, not FP32
// SLOTS   images of the ring        STAGED  tokens of a block that writes images
// SHARED_BYTES  what the launch of the products asks for
constexpr int TOKENS = 128, ACC = TOKENS / 2, GROUPS = 2;
constexpr int IMAGE = TOKENS * 256, HALF = IMAGE / 2;  // bytes of 128 columns, of 64
constexpr int SUMS = SLOTS * IMAGE;                    // where sums of chunks, then results lie
constexpr int GROUP_SUMS = ACC * 128 * 4;              // bytes of a warpgroup's
constexpr int BARRIERS = SUMS + GROUPS * GROUP_SUMS;
constexpr int PITCH = 144;                             // bytes of a token's 64 results and a gap
constexpr int TOGETHER = 8;                            // tiles of tokens that share what L2 holds
static_assert(TOKENS * PITCH <= GROUP_SUMS, "results lie over sums");
static_assert(BARRIERS + 2 * 8 * SLOTS == SHARED_BYTES && TOKENS % STAGED == 0, "sizes");

// Rows g and g + 8 of 64 columns as A of four products.
__device__ __forceinline__ void decode_half(u32 (&a)[4][4], const uint4& top, const uint4& low) {
  const u32 t[4] = {top.x, top.y, top.z, top.w}, l[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    decode_e4m3(t[j], a[j][0], a[j][2]);
    decode_e4m3(l[j], a[j][1], a[j][3]);
  }
}

// d = a b + (keep ? d : 0): 64 rows of weights, 128 tokens, 16 columns.
__device__ __forceinline__ void mma(float (&d)[ACC], const u32 (&a)[4], u64 b, int keep) {
  asm volatile(MMA("%69", 128) "{" NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"
               "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
               "{%64,%65,%66,%67}, %68" MMA_END
               : D16(0), D16(16), D16(32), D16(48) : A4, "l"(b), "r"(keep));
}

// Begin the products of 64 columns; they run on until as many groups are waited for.
__device__ __forceinline__ void begin_half(float (&d)[ACC], const u32 (&a)[4][4], u64 b, int keep) {
  begin_products();
#pragma unroll
  for (int j = 0; j < 4; j++) mma(d, a[j], b + 2 * j, keep | j);
  commit_products();
}

// Until here the registers of products are in use.
__device__ __forceinline__ void hold(u32 (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Return when a phase of that parity is complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Products that read shared memory have been waited for.
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Copy an image; the barrier counts the bytes.
__device__ __forceinline__ void copy_image(u32 to, const u8* from, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to), "l"(from), "r"(IMAGE), "r"(barrier) : "memory");
}

// What kernels before wrote is read by asynchronous copies from here on.
__device__ __forceinline__ void order_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Registers of each thread of a warpgroup from here on.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ void load_weights(uint4& v, const u8* at) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
}

__device__ __forceinline__ u32 load_scale_bits(const u8* at) {
  u32 v;
  if (E8M0) asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(at));
  else asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

__device__ __forceinline__ void load_tokens(uint2& v, const u8* at) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
}

// Four matrices of 8 x 8 BF16 as products leave them, each column as 16 bytes to the address of one
// lane of eight.
__device__ __forceinline__ void store_columns(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// 128 rows, from `row`, times tile `tile` of tokens, `count` blocks of columns from `first`.
struct Item {
  int row, tile, first, count, part;
};

struct Sizes {
  int T, N, K, group_rows, x_blocks, chunk, parts;

  __device__ __forceinline__ int token_tiles() const { return (T + TOKENS - 1) / TOKENS; }
  __device__ __forceinline__ int items() const { return token_tiles() * (N / 128) * parts; }

  // Items that run at the same time share rows and tokens: TOGETHER tiles of tokens, and for them
  // all rows in order.
  __device__ __forceinline__ Item item(int i) const {
    const int rows = N / 128, tiles = token_tiles(), blocks = K / 128;
    const int part = i / (tiles * rows), at = i % (tiles * rows);
    const int start = at / (TOGETHER * rows) * TOGETHER, within = at % (TOGETHER * rows);
    const int width = min(TOGETHER, tiles - start);
    Item it;
    it.row = within / width * 128, it.tile = start + within % width;
    it.part = part, it.first = parts > 1 ? part * chunk : 0;
    it.count = parts > 1 ? min(chunk, blocks - it.first) : blocks;
    return it;
  }
};

// One thread: every image that this block multiplies with, into the ring, and one that is empty.
__device__ __forceinline__ void fetch_images(const u8* images, const Sizes& s, u32 memory) {
  const u32 full = memory + BARRIERS, empty = full + 8 * SLOTS;
  const int blocks = s.K / 128, items = s.items();
  int slot = 0, phase = 0;
  wait_for_previous();
  order_copies();
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item it = s.item(i);
    const size_t at = (size_t)it.tile * s.x_blocks + it.row / s.group_rows * blocks + it.first;
    const u8* from = images + at * IMAGE;
#pragma unroll 1
    for (int b = 0; b < it.count; b++, from += IMAGE) {
      barrier_wait(empty + 8 * slot, phase ^ 1);
      expect_bytes(full + 8 * slot, IMAGE);
      copy_image(memory + slot * IMAGE, from, full + 8 * slot);
      if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
  }
  barrier_wait(empty + 8 * slot, phase ^ 1);
  expect_bytes(full + 8 * slot, 0);
}

// What a thread reads of W, in the order in which it needs it: 64 bytes of a block of 128 columns,
// with the block's scale, for all items of its own.
struct Weights {
  const u8 *weight, *scale, *from, *scale_from;
  const Sizes& s;
  int thread_row, thread_column, next, left;

  __device__ __forceinline__ void start(int i) {
    const Item it = s.item(i);
    next = i, left = it.count;
    from = weight + (size_t)(it.row + thread_row) * s.K + it.first * 128 + thread_column;
    scale_from = scale + ((size_t)(it.row / 128) * (s.K / 128) + it.first) * (E8M0 ? 1 : 4);
  }
  // On to the next block; at the end the last one again, which nobody uses.
  __device__ __forceinline__ void advance() {
    if (--left > 0) {
      from += 128, scale_from += E8M0 ? 1 : 4;
    } else if (next + gridDim.x < s.items()) {
      start(next + gridDim.x);
    } else {
      left = 1;
    }
  }
  __device__ __forceinline__ void load(uint4& top, uint4& low, int half) const {
    load_weights(top, from + half * 64);
    load_weights(low, from + half * 64 + 8 * (size_t)s.K);
  }
};

__device__ __forceinline__ void clear(float (&total)[ACC]) {
#pragma unroll
  for (int i = 0; i < ACC; i++) total[i] = 0.0f;
}

// total += the sum so far, unless this is the first chunk; kept in memory unless it is the last. A
// thread's numbers are its own.
__device__ __forceinline__ void add_chunks(float (&total)[ACC], float4* sums, bool first,
                                           bool last) {
#pragma unroll
  for (int i = 0; i < ACC / 4; i++) {
    float4 v = make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
    if (!first) {
      const float4 before = sums[i * 128];
      add(v, before);
    }
    if (!last) sums[i * 128] = v;
    total[4 * i] = v.x, total[4 * i + 1] = v.y, total[4 * i + 2] = v.z, total[4 * i + 3] = v.w;
  }
}

// y of 64 rows and up to 128 tokens, rounded; rows of the fragments become neighbours on their way
// through shared memory.
__device__ __forceinline__ void store_results(const float (&total)[ACC], u32 to, u8* y, int tokens,
                                              size_t pitch, int group) {
  const int t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  const u32 at = to + (lane / 16 * 8 + lane % 8) * PITCH + warp * 32 + lane / 8 % 2 * 16;
  group_barrier(group);  // sums of chunks have been read
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n += 2) {
    const float* d = total + 4 * n;
    store_columns(at + n * 8 * PITCH, bf16_pair(d[0], d[1]), bf16_pair(d[2], d[3]),
                  bf16_pair(d[4], d[5]), bf16_pair(d[6], d[7]));
  }
  group_barrier(group);
#pragma unroll
  for (int i = 0; i < TOKENS / 16; i++) {
    const int token = i * 16 + t / 8, piece = t % 8;
    uint4 v;
    load_shared(v, to + token * PITCH + piece * 16);
    if (token < tokens) *(uint4*)(y + token * pitch + piece * 16) = v;
  }
  group_barrier(group);  // before sums are written here again
}

// The sum of one chunk, FP32, to [T, N] of its part.
__device__ __forceinline__ void store_sums(const float (&total)[ACC], float* to, int tokens,
                                           int N) {
  const int lane = threadIdx.x % 32, token = lane % 4 * 2;
  to += (size_t)token * N + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < ACC; i++) {
    const int t = i / 4 * 8 + i % 2;
    if (token + t < tokens) to[(size_t)t * N + i / 2 % 2 * 8] = total[i];
  }
}

// A warpgroup: 64 rows of every item of this block.
__device__ __forceinline__ void multiply(Weights& w, u8* y, float* partial, u8* memory, int group) {
  const Sizes& s = w.s;
  const u32 base = shared_address(memory), full = base + BARRIERS, empty = full + 8 * SLOTS;
  const int t = threadIdx.x % 128;
  u8* own = memory + SUMS + group * GROUP_SUMS;
  const int items = s.items();
  int slot = 0, phase = 0;

  u32 a0[4][4], a1[4][4];  // A of 64 columns each; the first is decoded a step ahead
  uint4 top0, low0, top1, low1;
  w.start(blockIdx.x);
  w.load(top0, low0, 0);
  w.load(top1, low1, 1);
  u32 next_scale = load_scale_bits(w.scale_from);
  w.advance();
  decode_half(a0, top0, low0);
  w.load(top0, low0, 0);
  wait_for_previous();
  barrier_wait(full, 0);

  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item it = s.item(i);
    float total[ACC];
    for (int c = 0; c < it.count; c += s.chunk) {
      clear(total);
      const int end = min(s.chunk, it.count - c);
      for (int b = 0; b < end; b++) {
        const u64 x = descriptor(base + slot * IMAGE);
        float part[ACC];
        begin_half(part, a0, x, 0);
        decode_half(a1, top1, low1);
        const float scale = E8M0 ? e8m0(next_scale) : __uint_as_float(next_scale);
        w.load(top1, low1, 1);
        next_scale = load_scale_bits(w.scale_from);
        w.advance();
        begin_half(part, a1, x + (HALF >> 4), 1);
        wait_products<1>();
        hold(a0);
        decode_half(a0, top0, low0);
        w.load(top0, low0, 0);
        const u32 done = empty + 8 * slot;
        if (++slot == SLOTS) slot = 0, phase ^= 1;
        barrier_wait(full + 8 * slot, phase);  // the next image; and decoding stays above
        wait_products<0>();
        hold(a1);
        hold(part);
        if (t % 32 == 0) arrive(done);
#pragma unroll
        for (int j = 0; j < ACC; j++) total[j] = __fmaf_rn(part[j], scale, total[j]);
      }
      if (s.chunk < it.count)
        add_chunks(total, (float4*)own + t, c == 0, c + s.chunk >= it.count);
    }
    const int row = it.row + group * 64, first = it.tile * TOKENS, tokens = s.T - first;
    if (s.parts > 1)
      store_sums(total, partial + ((size_t)it.part * s.T + first) * s.N + row, tokens, s.N);
    else
      store_results(total, shared_address(own), y + ((size_t)first * s.N + row) * 2, tokens,
                    (size_t)s.N * 2, group);
  }
}

// x_blocks  blocks of 128 columns of x, which are those of all groups
// chunk     blocks of a chunk        parts  1, or the number of chunks, whose sums go to `partial`
extern "C" __global__ void __launch_bounds__(384, 1)
linear_fp8_kernel(const u8* images, const u8* __restrict__ weight, const u8* __restrict__ scale,
                  u8* y, float* partial, int T, int N, int K, int group_rows, int x_blocks,
                  int chunk, int parts) {
  extern __shared__ __align__(1024) u8 memory[];
  let_next_start();
  const int tid = threadIdx.x, group = tid / 128;
  const Sizes s{T, N, K, group_rows, x_blocks, chunk, parts};
  if (tid == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(shared_address(memory) + BARRIERS + 8 * i, 1);
      barrier_init(shared_address(memory) + BARRIERS + 8 * (SLOTS + i), GROUPS * 4);
    }
    publish_barriers();
  }
  __syncthreads();
  if (group == GROUPS) {
    leave_registers<40>();
    if (tid == GROUPS * 128) fetch_images(images, s, shared_address(memory));
  } else {
    take_registers<232>();
    const int row = group * 64 + tid % 128 / 32 * 16 + tid % 32 / 4;
    Weights w{weight, scale, nullptr, nullptr, s, row, tid % 4 * 16, 0, 0};
    multiply(w, y, partial, memory, group);
  }
}

// Images of x: block (columns, tokens) writes STAGED tokens of one image, zeros beyond T.
extern "C" __global__ void __launch_bounds__(256)
linear_fp8_images_kernel(const u8* x, u8* images, int T, int x_blocks) {
  let_next_start();
  wait_for_previous();
  // A thread takes step j of 16 columns of the products of 64: four from each thread of four.
  const int j = threadIdx.x % 4, half = threadIdx.x / 4 % 2;
  const int block = blockIdx.x % x_blocks, first = blockIdx.x / x_blocks * STAGED;
  u8* image = images + ((size_t)(first / TOKENS) * x_blocks + block) * IMAGE + half * HALF;
  uint2 v[STAGED / 32][4];
#pragma unroll
  for (int i = 0; i < STAGED / 32; i++) {
    const int token = first + i * 32 + threadIdx.x / 8;
    const u8* from = x + ((size_t)token * x_blocks + block) * 256 + half * 128 + j * 8;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      v[i][q] = make_uint2(0, 0);
      if (token < T) load_tokens(v[i][q], from + q * 32);
    }
  }
#pragma unroll
  for (int i = 0; i < STAGED / 32; i++) {
    const int row = (first + i * 32 + threadIdx.x / 8) % TOKENS;
    u32 even[4], odd[4];  // pieces of 16 bytes: columns 0 and 2, then 1 and 3, of all threads
#pragma unroll
    for (int q = 0; q < 4; q++) {
      even[q] = __byte_perm(v[i][q].x, v[i][q].y, 0x5410);
      odd[q] = __byte_perm(v[i][q].x, v[i][q].y, 0x7632);
    }
    // Neighbours write the two pieces of one step together, then those of the other.
    uint4 one, two;
    u32* o = &one.x;
    u32* w = &two.x;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const u32 other = __shfl_xor_sync(~0u, j % 2 ? even[q] : odd[q], 1);
      o[q] = j % 2 ? other : even[q], w[q] = j % 2 ? odd[q] : other;
    }
    const int step = j / 2 * 2;
    *(uint4*)(image + swizzled(row, step * 2 + j % 2)) = one;
    *(uint4*)(image + swizzled(row, step * 2 + 2 + j % 2)) = two;
  }
}

// y = the sum of `parts` partial sums, the first one first; `count` groups of four values.
extern "C" __global__ void __launch_bounds__(256)
linear_fp8_sum_kernel(const float4* partial, u8* y, int count, int parts) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  let_next_start();
  wait_for_previous();
  if (i >= count) return;
  float4 v = partial[i];
#pragma unroll 8
  for (int c = 1; c < parts; c++) add(v, partial[(size_t)c * count + i]);
  store_bf16(y + (size_t)i * 8, v);
}
