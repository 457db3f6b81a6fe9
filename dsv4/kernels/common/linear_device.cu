// What the linear kernels of Hopper share: one text, compiled in front of each (linear/*_sm90.cu,
// moe/moe_routed_sm90.cu and, behind that one, moe/moe_with_shared_sm90.cu).
//
// Constants: QUANT where products are of FP8, else nothing.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- kernels that overlap

// Blocks of the kernel after this one may start from here on.
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;");
}

// From here on what the kernel before this one wrote may be read.
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- shared memory

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

// Byte of a 16-byte piece in a tile of 128-byte rows, as the matrix unit swizzles it.
__device__ __forceinline__ u32 swizzled(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

__device__ __forceinline__ void load_shared(uint4& v, u32 at) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
}

// The policy of copies of weights, which are read once a step: they leave L2 first, so that what
// comes back in every layer, code and activations, stays.
__device__ __forceinline__ u64 read_once() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// What this thread has asked for since the last call is a group that can be waited for.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Return when at most PENDING groups of copies are on their way.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- barriers

// The threads of a warpgroup wait for each other.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

// One that lies in shared memory: a phase of it is complete after `count` arrivals, and with all
// bytes that are expected.
__device__ __forceinline__ void barrier_init(u32 bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Barriers that were made before are seen by all of the cluster, and by copies.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival of this thread, and the bytes that will come before the phase is complete.
__device__ __forceinline__ void expect_bytes(u32 bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// Open a barrier for `bytes` of `send`: a whole warp calls it. One lane does both steps, in order;
// but the first is an instruction of the warp as a whole, and racecheck takes the two for those of
// different lanes unless they are kept apart.
__device__ __forceinline__ void open_barrier(u32 bar, int bytes, bool is_first) {
  if (is_first) {
    barrier_init(bar, 1);
    publish_barriers();
  }
  __syncwarp();
  if (is_first) expect_bytes(bar, bytes);
}

// Return when all bytes of an opened barrier are there.
__device__ __forceinline__ void await_bytes(u32 bar) {
  asm volatile("{\n.reg .pred p;\nagain:\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
               "@!p bra again;\n}" ::"r"(bar) : "memory");
}

// ---- other blocks of the cluster

// What lay in a block before is seen by all of the cluster after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
}

// The address in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ u32 in_block(u32 address, int rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// ---- numbers

// The value of a UE8M0 scale, NaN and 2^-127 included.
__device__ __forceinline__ float e8m0(u32 byte) {
  return __uint_as_float(byte == 255 ? 0x7fc00000u : byte == 0 ? 0x400000u : byte << 23);
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four E4M3 codes as BF16 pairs (0, 2) and (1, 3): see dsv4.kernels.common.fragments. Volatile, so
// that it stays where products run meanwhile.
__device__ __forceinline__ void decode_e4m3(u32 w, u32& even, u32& odd) {
  asm volatile(
      "{\n"
      ".reg .b32 sign, rest, scale;\n"
      "mov.b32 scale, 0x7b807b80;\n"
      "and.b32 sign, %2, 0x80008000;\n"
      "shr.b32 rest, %2, 4;\n"
      "lop3.b32 rest, rest, 0x07f007f0, sign, 0xEA;\n"
      "mul.bf16x2 %1, rest, scale;\n"
      "shl.b32 sign, %2, 8;\n"
      "and.b32 sign, sign, 0x80008000;\n"
      "shl.b32 rest, %2, 4;\n"
      "lop3.b32 rest, rest, 0x07f007f0, sign, 0xEA;\n"
      "mul.bf16x2 %0, rest, scale;\n"
      "}"
      : "=r"(even), "=r"(odd)
      : "r"(w));
}

__device__ __forceinline__ void add(float4& total, const float4& v) {
  total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
}

__device__ __forceinline__ void store_bf16(u8* to, const float4& v) {
  *(uint2*)to = make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
}

// ---- products of a warpgroup

#if QUANT
#define MMA_TYPE "k32.f32.e4m3.e4m3 "
#define MMA_END ", p, 1, 1;\n}"
#else
#define MMA_TYPE "k16.f32.bf16.bf16 "
#define MMA_END ", p, 1, 1, 0;\n}"
#endif
// A product with A in registers adds to what d holds if the predicate is not 0: a number or, as an
// operand's name, a register. After it the lists of d, a and b, and MMA_END.
#define MMA(keep, n) "{\n.reg .pred p;\nsetp.ne.b32 p, " keep ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #n MMA_TYPE
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// Tokens at an address in shared memory as B: 128-byte swizzle, 1024 bytes between groups of eight.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return 1ull << 62 | 64ull << 32 | 1ull << 16 | address >> 4;
}

// What this thread has stored in shared memory, or copied, is seen by products from here on.
__device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers as they are now are those of the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Products since the last call are a group that can be waited for.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Return when at most PENDING groups of products run.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Until here the registers of products are in use.
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
