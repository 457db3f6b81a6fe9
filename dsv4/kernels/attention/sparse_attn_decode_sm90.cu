// Attention of 64 heads of one query over tiles of 64 keys, for sm_90a; arguments and numbers are
// those of sparse_attn_decode.py, the checks are in Python.
//
// Warp groups 0 and 1 each score half of the keys of a tile for all heads, exchange the weights and
// keep half of the value dims; groups 2 and 3 read records and write them as BF16 into one of two
// buffers, swizzled in 128-byte rows so that the same bytes serve as keys (dims contiguous) and as
// values (transposed by the descriptor).

// FP8    whether the result is E4M3 with a scale for 128 dims, not BF16
// SPLIT  0: programs give results, or parts for a combination elsewhere. 2, 4: the tiles of a token
//        are in blocks of a cluster, which combine them; a block has 512 / SPLIT value dims

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int TILE = 64, HEADS = 64, C = 512, DATA = 576, SCALES = 8, GROUPS = 7;
constexpr int BLOCK_BYTES = TILE * 128;  // 64 dims of 64 rows
constexpr int MATRIX_BYTES = 8 * BLOCK_BYTES, STAGES = 2;
constexpr int BIAS_AT = MATRIX_BYTES * (1 + STAGES), BARRIER_AT = BIAS_AT + STAGES * TILE * 4;
constexpr int SHARES = SPLIT ? SPLIT : 1, PIECES = 4 / SHARES;  // of 128 value dims of a block
constexpr int CHUNKS = PIECES;  // of 64 value dims of a warp group
constexpr int MAX_EACH = SPLIT == 4 ? 2 : 1;  // tiles of a block of a cluster
constexpr int SUMS_BYTES = PIECES * HEADS * 512, STATS_AT = 2 * MATRIX_BYTES, AHEAD = 16;
constexpr int SCORED = TILE / 2;  // keys that a warp group scores
constexpr int EXCHANGE_AT = BARRIER_AT + 8 * 3 * STAGES;
constexpr float NO_KEYS = -1e30f, LOG2_E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7F800000)
static_assert(HEADS == TILE, "queries and keys have matrices of one size");
static_assert(MAX_EACH * SUMS_BYTES <= STATS_AT, "sums lie over queries and the first keys");
// A cluster's tiles have a buffer each and none is filled twice: its warp groups read values from
// either half, so what they say of halves (attend_tile) would not do.
static_assert(MAX_EACH <= STAGES && AHEAD >= 16, "sizes of a cluster");

struct Params {  // as in Python, whose size is PARAMS_BYTES
    const u8 *q, *step, *window, *pages;
    const int* table;
    const int* entries;
    const i64 *slot, *position, *first_row, *first_position;
    const float *sink, *cos, *sin;
    u8 *out, *out_scale;
    float *sums, *stats;
    float scale;
    int T, H, K, max_pages, tiles_each, parts, rows, page_rows, ratio, entry_words, page_magic;
    int is_rotated;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "what the host sends");

struct Query {  // what a program does: tiles first .. end - 1 of the token's
    i64 t, slot;
    int part, share, head, window_tiles, first, end, num_tiles;
    int position, first_row, first_position, visible, num_entries;
};

// Plain loads everywhere: the kernel starts before the one in front of it has written, so nothing it
// reads of that is constant for its life, as the read-only path would assume.

// Shared memory and barriers

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ int swizzled(int row, int chunk) {  // 16-byte chunk of a 128-byte row
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Matrix products: accumulators [64, 64] FP32, 32 registers a thread

// 128-byte swizzle, 1024 bytes between groups of 8 rows; one group of columns, so no other stride.
__device__ __forceinline__ u32 matrix_at(u32 address) {
    return (address & 0x3FFFF) >> 4 | 1 << 16;
}

__device__ __forceinline__ u64 descriptor(u32 matrix, int offset) {
    // One addition: addresses end far below the field's 2^18 bytes.
    return u64(matrix + (offset >> 4)) | (u64(1024 >> 4 | 1 << 30) << 32);
}

#define ACC32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGS8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define REGS32(d) REGS8(d, 0), REGS8(d, 8), REGS8(d, 16), REGS8(d, 24)

__device__ __forceinline__ void multiply_keys(float (&d)[16], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, 0, 0;\n}"
        : REGS8(d, 0), REGS8(d, 8)
        : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void multiply_values(
    float (&d)[32], const u32 (&a)[4], u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACC32
        ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
        : REGS32(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void matrix_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void matrix_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void matrix_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {  // no use of d moves above this
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Numbers

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float power_of_two(float exponent) {
    return __int_as_float((static_cast<int>(fmaxf(exponent, -127.f)) + 127) << 23);
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_half(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(u32 x) { return __uint_as_float(x & 0xFFFF0000u); }

// Four E4M3 codes times a BF16 scale (in both halves); see `dequantise` in sparse_attention.py.
__device__ __forceinline__ uint2 dequantise(u32 codes, u32 scale) {
    uint2 out;
    asm("{\n.reg .b32 lo, hi, m, one, none;\n"
        "mov.b32 one, 0x7B807B80;\nmov.b32 none, 0x80008000;\n"
        "prmt.b32 lo, %2, 0, 0x1404;\nprmt.b32 hi, %2, 0, 0x3424;\n"
        "shr.b32 m, lo, 4;\nand.b32 m, m, 0x07F007F0;\nlop3.b32 lo, lo, none, m, 0xEA;\n"
        "shr.b32 m, hi, 4;\nand.b32 m, m, 0x07F007F0;\nlop3.b32 hi, hi, none, m, 0xEA;\n"
        "fma.rn.bf16x2 lo, lo, one, none;\nfma.rn.bf16x2 hi, hi, one, none;\n"
        "fma.rn.bf16x2 %0, lo, %3, none;\nfma.rn.bf16x2 %1, hi, %3, none;\n}"
        : "=r"(out.x), "=r"(out.y)
        : "r"(codes), "r"(scale));
    return out;
}

__device__ __forceinline__ u32 scale_bits(u32 byte) {  // 2^(byte - 127) as BF16, twice
    u32 bits = byte == 0 ? 0x40u : byte == 255 ? 0x7FC0u : byte << 7;
    return bits * 0x10001u;
}

// The producers: records to BF16 in shared memory. Four threads share a row of the tile.

struct Row {
    const u8 *data, *scales;
    bool live;
};

__device__ __forceinline__ int page_bytes(int rows) {
    return (rows * (DATA + SCALES) + DATA - 1) / DATA * DATA;
}

// What the list holds for row r of a tile; only `checked` tells whether it is an entry. Loads are
// not guarded, so that nothing waits for them before their values are used.
__device__ __forceinline__ int listed(const Params& p, const Query& query, int tile, int r) {
    int j = (tile - query.window_tiles) * TILE + r;
    if (p.entry_words == 0 || p.K == 0) return j;
    return p.entries[(query.t * p.K + min(max(j, 0), p.K - 1)) * p.entry_words];
}

__device__ __forceinline__ int page_index(const Params& p, int entry) {  // entry / page_rows
    return p.page_magic ? __umulhi(entry, p.page_magic) : entry;
}

__device__ __forceinline__ int checked(
    const Params& p, const Query& query, int tile, int r, int entry) {
    int j = (tile - query.window_tiles) * TILE + r;
    bool is_entry = j >= 0 && j < query.num_entries && entry >= 0 && entry < query.visible;
    return is_entry && page_index(p, entry) < p.max_pages ? entry : -1;
}

__device__ __forceinline__ int page_of(const Params& p, const Query& query, int entry) {
    if (p.max_pages == 0) return 0;
    return p.table[query.slot * p.max_pages + page_index(p, max(entry, 0))];
}

__device__ __forceinline__ Row row_of(
    const Params& p, const Query& query, int tile, int r, int entry, int page) {
    if (tile >= query.window_tiles) {
        const u8* base = p.pages + static_cast<i64>(page) * page_bytes(p.page_rows);
        int row = entry - page_index(p, entry) * p.page_rows;
        return {
            base + row * DATA, base + p.page_rows * DATA + row * SCALES, entry >= 0 && page > 0};
    }
    int j = tile * TILE + r, at = query.position - p.rows + 1 + j;
    bool live = j < p.rows && at >= 0;
    if (at >= query.first_position) {
        i64 row = query.first_row + (at - query.first_position);
        return {p.step + row * DATA, p.step + static_cast<i64>(p.T) * DATA + row * SCALES, live};
    }
    const u8* base = p.window + query.slot * page_bytes(p.rows);
    int row = live ? at % p.rows : 0;
    return {base + row * DATA, base + p.rows * DATA + row * SCALES, live};
}

__device__ __forceinline__ void load_row(const Row& row, int lane, uint4 (&raw)[9], uint2& scales) {
#pragma unroll
    for (int g = 0; g < 9; g++) raw[g] = make_uint4(0, 0, 0, 0);
    scales = make_uint2(0, 0);
    if (row.live) {
        scales = *reinterpret_cast<const uint2*>(row.scales);
#pragma unroll
        for (int g = 0; g < 9; g++)
            raw[g] = *reinterpret_cast<const uint4*>(row.data + g * 64 + lane * 16);
    }
}

// Dims 64 first .. 64 end - 1 of a row; the last 64 are not quantised.
template <int FIRST, int END>
__device__ __forceinline__ void store_row(
    u8* matrix, int r, int lane, const uint4 (&raw)[9], uint2 scales) {
#pragma unroll
    for (int g = FIRST; g < min(END, GROUPS); g++) {
        u32 scale = scale_bits(((g < 4 ? scales.x : scales.y) >> (g % 4 * 8)) & 0xFF);
        uint2 a = dequantise(raw[g].x, scale), b = dequantise(raw[g].y, scale);
        uint2 c = dequantise(raw[g].z, scale), d = dequantise(raw[g].w, scale);
        u8* block = matrix + g * BLOCK_BYTES;
        *reinterpret_cast<uint4*>(block + swizzled(r, 2 * lane)) = make_uint4(a.x, a.y, b.x, b.y);
        *reinterpret_cast<uint4*>(block + swizzled(r, 2 * lane + 1)) =
            make_uint4(c.x, c.y, d.x, d.y);
    }
    if (END <= GROUPS) return;
    u8* block = matrix + GROUPS * BLOCK_BYTES;
    *reinterpret_cast<uint4*>(block + swizzled(r, lane)) = raw[7];
    *reinterpret_cast<uint4*>(block + swizzled(r, lane + 4)) = raw[8];
}

// `before` tiles went through the buffers for other programs.
__device__ __forceinline__ void produce(
    const Params& p, const Query& query, int before, const int (&early)[2], u8* smem, u32 full,
    u32 empty) {
    int tid = threadIdx.x - 256, lane = tid % 4, r = tid / 4;
    float* bias = reinterpret_cast<float*>(smem + BIAS_AT);
    uint4 raw[9];
    uint2 scales;
    int entry = checked(p, query, query.first, r, early[0]), next = early[1];
    Row row = row_of(p, query, query.first, r, entry, page_of(p, query, entry));
    load_row(row, lane, raw, scales);
    for (int i = query.first; i < query.end; i++) {
        int n = before + i - query.first, stage = n % STAGES;
        entry = checked(p, query, i + 1, r, next);
        int page = page_of(p, query, entry);
        next = listed(p, query, i + 2, r);
        u8* keys = smem + MATRIX_BYTES * (1 + stage);
        barrier_wait(empty + 16 * stage, (n / STAGES + 1) & 1);
        store_row<0, 4>(keys, r, lane, raw, scales);
        barrier_wait(empty + 16 * stage + 8, (n / STAGES + 1) & 1);
        store_row<4, 8>(keys, r, lane, raw, scales);
        if (lane == 0) bias[stage * TILE + r] = row.live ? 0.f : -INFINITE;
        fence_async();
        barrier_arrive(full + 8 * stage);
        if (i + 1 < query.end) {
            row = row_of(p, query, i + 1, r, entry, page);
            load_row(row, lane, raw, scales);
        }
    }
}

// The consumers. A thread has rows (heads) g and g + 8 of its warp's 16, in columns of 2.

struct State {
    float m[2], l[2], acc[CHUNKS][32];
};

// A thread of the other warp group has the same rows; what both exchange lies [group][thread].
__device__ __forceinline__ void exchange_top(u8* area, float (&top)[2]) {
    int wg = threadIdx.x / 128, i = threadIdx.x % 128;
    float2* tops = reinterpret_cast<float2*>(area);
    tops[wg * 128 + i] = make_float2(top[0], top[1]);
    consumers_sync();
    float2 other = tops[(1 - wg) * 128 + i];
    top[0] = fmaxf(top[0], other.x);
    top[1] = fmaxf(top[1], other.y);
}

__device__ __forceinline__ void exchange_weights(u8* area, u32 (&p)[4][4]) {
    int wg = threadIdx.x / 128, i = threadIdx.x % 128;
    uint4* weights = reinterpret_cast<uint4*>(area + 2048);
#pragma unroll
    for (int k = 0; k < 2; k++)
        weights[(wg * 2 + k) * 128 + i] = make_uint4(p[k][0], p[k][1], p[k][2], p[k][3]);
    consumers_sync();
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint4 other = weights[((1 - wg) * 2 + k) * 128 + i];
        u32 others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            p[2 + k][j] = wg == 0 ? others[j] : p[k][j];
            p[k][j] = wg == 0 ? p[k][j] : others[j];
        }
    }
}

// bias: of the keys that were scored
__device__ __forceinline__ void softmax(
    float (&s)[SCORED / 2], const float* bias, float scale, u8* area, State& state, u32 (&p)[4][4],
    float (&alpha)[2], float (&beta)[2]) {
    float top[2] = {-INFINITE, -INFINITE}, total[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < SCORED / 8; j++) {
        float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            s[4 * j + k] = fmaf(s[4 * j + k], scale, k % 2 ? b.y : b.x);
            top[k / 2] = fmaxf(top[k / 2], s[4 * j + k]);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        top[k] = fmaxf(top[k], __shfl_xor_sync(~0u, top[k], 1));
        top[k] = fmaxf(top[k], __shfl_xor_sync(~0u, top[k], 2));
    }
    exchange_top(area, top);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        top[k] = fmaxf(ceilf(top[k]), NO_KEYS);
        float reference = fmaxf(state.m[k], top[k]);
        alpha[k] = power_of_two(state.m[k] - reference);
        beta[k] = power_of_two(top[k] - reference);
        state.m[k] = reference;
    }
#pragma unroll
    for (int j = 0; j < SCORED / 8; j++) {
#pragma unroll
        for (int k = 0; k < 2; k++)
            p[j / 2][j % 2 * 2 + k] = pack_bf16(
                exp2_approx(s[4 * j + 2 * k] - top[k]), exp2_approx(s[4 * j + 2 * k + 1] - top[k]));
    }
    exchange_weights(area, p);
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            u32 pair = p[j / 2][j % 2 * 2 + k];
            total[k] += low_half(pair) + high_half(pair);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        total[k] += __shfl_xor_sync(~0u, total[k], 1);
        total[k] += __shfl_xor_sync(~0u, total[k], 2);
        state.l[k] = fmaf(total[k], beta[k], state.l[k] * alpha[k]);
    }
}

__device__ __forceinline__ void values(
    float (&d)[32], const u32 (&p)[4][4], u32 block, int offset) {
    matrix_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_values(d, p[k], descriptor(block, offset + k * 2048), k);
    matrix_commit();
}

__device__ __forceinline__ void merge(
    float (&acc)[32], float (&d)[32], const float (&alpha)[2], const float (&beta)[2],
    bool is_rescaled) {
    hold(d);
    if (is_rescaled) {
#pragma unroll
        for (int i = 0; i < 32; i++) acc[i] *= alpha[i / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < 32; i++) acc[i] = fmaf(d[i], beta[i / 2 % 2], acc[i]);
}

// Scores and values of a tile, the n-th that goes through the buffers, merged into `state`.
__device__ __forceinline__ void attend_tile(
    const Params& p, const Query& query, int n, u8* smem, u32 full, u32 empty, State& state) {
    int wg = threadIdx.x / 128, stage = n % STAGES;
    u32 heads = matrix_at(shared_address(smem));
    u32 keys = matrix_at(shared_address(smem) + MATRIX_BYTES * (1 + stage));
    u32 scored = keys + (wg * SCORED * 128 >> 4);
    u32 own = keys + ((query.share * 2 + wg) * CHUNKS * BLOCK_BYTES >> 4);
    const float* bias = reinterpret_cast<const float*>(smem + BIAS_AT) + stage * TILE + wg * SCORED;
    float s[SCORED / 2], fresh[32], alpha[2], beta[2];
    u32 weights[4][4];
    barrier_wait(full + 8 * stage, n / STAGES & 1);
    matrix_fence();
#pragma unroll
    for (int k = 0; k < 32; k++) {
        int at = k / 4 * BLOCK_BYTES + k % 4 * 32;
        multiply_keys(s, descriptor(heads, at), descriptor(scored, at), k);
    }
    matrix_commit();
    matrix_wait<0>();
    hold(s);
    barrier_arrive(empty + 16 * stage + 8 * (1 - wg));
    softmax(s, bias, p.scale, smem + EXCHANGE_AT, state, weights, alpha, beta);
    bool is_rescaled = __any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        values(fresh, weights, own, c * BLOCK_BYTES);
        matrix_wait<0>();
        if (c == CHUNKS - 1) barrier_arrive(empty + 16 * stage + 8 * wg);
        merge(state.acc[c], fresh, alpha, beta, is_rescaled);
    }
}

// What leaves: the finished heads, or a part for the combination

__device__ __forceinline__ int head_of(const Query& query, int k) {  // of row k of a thread
    return query.head + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * k;
}

__device__ __forceinline__ float inverse_sum(float sink, float m, float l) {
    float total = l + exp2f(sink * LOG2_E - m);
    return __fdiv_rn(1.f, total == 0.f ? 1.f : total);
}

// A pair of dims turned back. From zero, as Triton negates: a token without keys gives no -0.
__device__ __forceinline__ float2 turned_back(float a, float b, float cos, float sin) {
    cos += 0.f, sin += 0.f;  // there too: no zero of theirs is negative
    float imaginary = fmaf(b, cos, __fsub_rn(0.f, __fmul_rn(a, sin)));
    return make_float2(fmaf(a, cos, __fmul_rn(b, sin)), imaginary);
}

__device__ __forceinline__ float sink_of(const Params& p, const Query& query, int k) {
    int h = head_of(query, k);
    return p.sink[h < p.H ? h : 0];
}

struct Angles {  // of a thread's pairs in the last 64 dims
    float cos[8], sin[8];
};

// All under way at once: behind the first result that leaves, loads wait for stores.
__device__ __forceinline__ Angles load_angles(const Params& p, const Query& query) {
    Angles angles = {};
    if (threadIdx.x / 128 == 1 && p.is_rotated) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            i64 pair = query.t * 32 + 4 * j + threadIdx.x % 4;
            angles.cos[j] = p.cos[pair], angles.sin[j] = p.sin[pair];
        }
    }
    return angles;
}

// Dims c * 64 + 8 j + column and the next of this warp group's half, divided and rotated back: BF16.
__device__ __forceinline__ u32 finished(
    const Params& p, const Angles& angles, const State& state, int c, int j, int k,
    float inverse) {
    float a = state.acc[c][4 * j + 2 * k] * inverse;
    float b = state.acc[c][4 * j + 2 * k + 1] * inverse;
    if (c == 3 && threadIdx.x / 128 == 1 && p.is_rotated) {
        float2 back = turned_back(a, b, angles.cos[j], angles.sin[j]);
        a = back.x, b = back.y;
    }
    return pack_bf16(a, b);
}

// The four threads of a row have a word each of chunks 0 to 3; then each has all words of one.
__device__ __forceinline__ void transpose_words(u32 (&x)[4]) {
    bool is_odd = threadIdx.x & 1, is_upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 other = __shfl_xor_sync(~0u, is_odd ? x[i] : x[i + 1], 1);
        x[i] = is_odd ? other : x[i];
        x[i + 1] = is_odd ? x[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 other = __shfl_xor_sync(~0u, is_upper ? x[i] : x[i + 2], 2);
        x[i] = is_upper ? other : x[i];
        x[i + 2] = is_upper ? x[i + 2] : other;
    }
}

// In 16 bytes a thread, of whole sectors; heads beyond the last take part, and only write nothing.
__device__ __forceinline__ void store_bf16(const Params& p, const Query& query, const State& state) {
    int wg = threadIdx.x / 128, quad = threadIdx.x % 4;
    float sinks[2] = {sink_of(p, query, 0), sink_of(p, query, 1)};
    Angles angles = load_angles(p, query);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int h = head_of(query, k);
        bool live = h < p.H;
        float inverse = inverse_sum(sinks[k], state.m[k], state.l[k]);
        u8* out = p.out + ((query.t * p.H + h) * C + wg * 256 + quad * 8) * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {  // 32 dims of the row
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = finished(p, angles, state, i / 2, i % 2 * 4 + j, k, inverse);
            transpose_words(x);
            if (live) *reinterpret_cast<uint4*>(out + i * 64) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

// The exponent byte of a scale for the bits of the largest magnitude; see `e8m0_byte` in bits.py.
__device__ __forceinline__ u32 scale_byte(u32 amax) {
    amax = max(amax, 0x38D1B717u);  // 1e-4
    u32 bits = __float_as_uint(__fmul_rn(__uint_as_float(amax), 1.f / 448.f)) & 0x7FFFFFFFu;
    return min((bits >> 23) + ((bits & 0x7FFFFF) != 0), 255u);
}

__device__ __forceinline__ float inverse_of(u32 scale_byte) {
    return __uint_as_float(scale_byte == 255 ? 0x7FC00000u : (254 - scale_byte) << 23);
}

__device__ __forceinline__ u32 magnitude(u32 pair) {  // bits of the larger one of two BF16
    return max((pair & 0x7FFF) << 16, pair & 0x7FFF0000);
}

__device__ __forceinline__ unsigned short pack_fp8(u32 pair, float factor) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(codes)
        : "f"(high_half(pair) * factor), "f"(low_half(pair) * factor));
    return codes;
}

// What store_bf16 would write, rounded again. The four threads of a row share its maxima, and a warp
// exchanges them as a whole: heads beyond the last take part, and only write nothing.
__device__ __forceinline__ void store_fp8(const Params& p, const Query& query, const State& state) {
    int wg = threadIdx.x / 128, column = threadIdx.x % 4 * 2;
    float sinks[2] = {sink_of(p, query, 0), sink_of(p, query, 1)};
    Angles angles = load_angles(p, query);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int h = head_of(query, k);
        bool live = h < p.H;
        float inverse = inverse_sum(sinks[k], state.m[k], state.l[k]);
        i64 row = query.t * p.H + h;
#pragma unroll
        for (int group = 0; group < 2; group++) {
            u32 pairs[16], amax = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                pairs[i] = finished(p, angles, state, 2 * group + i / 8, i % 8, k, inverse);
                amax = max(amax, magnitude(pairs[i]));
            }
            amax = max(amax, __shfl_xor_sync(~0u, amax, 1));
            amax = max(amax, __shfl_xor_sync(~0u, amax, 2));
            u32 byte = scale_byte(amax);
            float factor = inverse_of(byte);
            u8* out = p.out + row * C + wg * 256 + group * 128 + column;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                unsigned short codes = pack_fp8(pairs[i], factor);
                if (live) *reinterpret_cast<unsigned short*>(out + i * 8) = codes;
            }
            if (live && column == 0) p.out_scale[row * (C / 128) + wg * 2 + group] = byte;
        }
    }
}

__device__ __forceinline__ void store_part(const Params& p, const Query& query, State& state) {
    int wg = threadIdx.x / 128, column = threadIdx.x % 4 * 2;
    i64 part = query.t * p.parts + query.part;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int h = head_of(query, k);
        if (h >= p.H) continue;
        if (wg == 0 && threadIdx.x % 4 == 0) {
            p.stats[(part * p.H + h) * 2] = state.m[k];
            p.stats[(part * p.H + h) * 2 + 1] = state.l[k];
        }
        float* sums = p.sums + (part * p.H + h) * C + wg * 256;
#pragma unroll
        for (int c = 0; c < 4; c++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 pair = make_float2(
                    state.acc[c][4 * j + 2 * k], state.acc[c][4 * j + 2 * k + 1]);
                *reinterpret_cast<float2*>(sums + c * 64 + 8 * j + column) = pair;
            }
        }
    }
}

// A cluster: each block leaves the sums of its tiles in its own shared memory, and then finishes some
// heads from those of all blocks, in the order of tiles and with the numbers of
// sparse_attn_combine_kernel.

__device__ __forceinline__ u32 remote(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ float2 remote_load2(u32 address) {
    float2 x;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ float4 remote_load4(u32 address) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void cluster_sync() {  // writes before it are seen behind it
    asm volatile(
        "barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// 16 bytes, 4 dims, of the sums: rows of 128 dims of a head. Four heads that a half warp writes, or
// one that a warp reads, are in different banks.
__device__ __forceinline__ int sums_at(int slot, int piece, int h, int chunk) {
    return slot * SUMS_BYTES + (piece * HEADS + h) * 512 + ((chunk ^ (h & 3) << 1) << 4);
}

__device__ __forceinline__ void leave_part(u8* smem, const State& state, int slot) {
    int wg = threadIdx.x / 128, quad = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int h = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * k;
        if (wg == 0 && quad == 0)
            reinterpret_cast<float2*>(smem + STATS_AT)[slot * HEADS + h] =
                make_float2(state.m[k], state.l[k]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int dim = (wg * CHUNKS + c) * 64 + 8 * j + 2 * quad;
                u8* at = smem + sums_at(slot, dim / 128, h, dim % 128 / 4) + dim % 4 * 4;
                *reinterpret_cast<float2*>(at) = make_float2(
                    state.acc[c][4 * j + 2 * k], state.acc[c][4 * j + 2 * k + 1]);
            }
        }
    }
}

__device__ __forceinline__ void add_part(
    float& m, float& l, float (&acc)[4], float top, float total, float4 sums) {
    float reference = fmaxf(m, top);
    float alpha = power_of_two(m - reference), beta = power_of_two(top - reference);
    m = reference;
    l = fmaf(total, beta, l * alpha);
    acc[0] = fmaf(sums.x, beta, acc[0] * alpha);
    acc[1] = fmaf(sums.y, beta, acc[1] * alpha);
    acc[2] = fmaf(sums.z, beta, acc[2] * alpha);
    acc[3] = fmaf(sums.w, beta, acc[3] * alpha);
}

struct Ending {  // what a lane needs besides the sums
    float sink, cos[2], sin[2];
    bool is_rotated;
};

__device__ __forceinline__ Ending load_ending(
    const Params& p, const Query& query, int h, int piece) {
    int lane = threadIdx.x % 32;
    i64 pair = query.t * 32 + lane % 16 * 2;
    Ending e = {p.sink[h], {1.f, 1.f}, {0.f, 0.f}, piece == 3 && p.is_rotated};
    if (e.is_rotated && lane >= 16) {
        e.cos[0] = p.cos[pair], e.cos[1] = p.cos[pair + 1];
        e.sin[0] = p.sin[pair], e.sin[1] = p.sin[pair + 1];
    }
    return e;
}

// A lane's 4 of 128 dims of head h, divided, rotated back and stored.
__device__ __forceinline__ void store_four(
    const Params& p, const Query& query, const Ending& ending, float m, float l,
    const float (&acc)[4], int h, int piece) {
    int lane = threadIdx.x % 32;
    float inverse = inverse_sum(ending.sink, m, l), x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = acc[i] * inverse;
    if (ending.is_rotated) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 back = turned_back(x[2 * i], x[2 * i + 1], ending.cos[i], ending.sin[i]);
            x[2 * i] = back.x, x[2 * i + 1] = back.y;
        }
    }
    u32 low = pack_bf16(x[0], x[1]), high = pack_bf16(x[2], x[3]);
    i64 row = query.t * p.H + h;
    if (!FP8) {
        *reinterpret_cast<uint2*>(p.out + (row * C + piece * 128 + lane * 4) * 2) =
            make_uint2(low, high);
        return;
    }
    u32 byte = scale_byte(__reduce_max_sync(~0u, max(magnitude(low), magnitude(high))));
    float factor = inverse_of(byte);
    *reinterpret_cast<u32*>(p.out + row * C + piece * 128 + lane * 4) =
        pack_fp8(low, factor) | static_cast<u32>(pack_fp8(high, factor)) << 16;
    if (lane == 0) p.out_scale[row * (C / 128) + piece] = byte;
}

// What a warp finishes at a time: 128 dims of a head, of which each lane has 4.
struct Unit {
    int h, piece;
    Ending ending;
    u32 stats, sums[AHEAD];  // addresses: m and l of part `lane`, the first parts
};

__device__ __forceinline__ u32 part_at(const Params& p, u32 in_first, int part, int bytes) {
    return p.tiles_each == 2 ? remote(in_first + (part & 1) * bytes, part >> 1)
                             : remote(in_first, part);
}

__device__ __forceinline__ Unit unit_at(
    const Params& p, const Query& query, u8* smem, int unit, int written) {
    int lane = threadIdx.x % 32, last = max(written - 1, 0);
    Unit u = {unit / PIECES, unit % PIECES};
    u.ending = load_ending(p, query, query.head + u.h, query.share * PIECES + u.piece);
    u32 base = shared_address(smem), row = base + sums_at(0, u.piece, u.h, lane);
    u.stats = part_at(p, base + STATS_AT + u.h * 8, min(lane, last), HEADS * 8);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) u.sums[i] = part_at(p, row, min(i, last), SUMS_BYTES);
    return u;
}

__device__ __forceinline__ void finish(
    const Params& p, const Query& query, u8* smem, const Unit& u, int written) {
    int lane = threadIdx.x % 32;
    float2 own = make_float2(NO_KEYS, 0.f);
    if (lane < written) own = remote_load2(u.stats);
    float m = NO_KEYS, l = 0.f, acc[4] = {};
    float4 sums[AHEAD];  // loads under way at once
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < written) sums[i] = remote_load4(u.sums[i]);
    for (int start = 0; start < written; start += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int part = start + i & 31;
            float top = __shfl_sync(~0u, own.x, part), total = __shfl_sync(~0u, own.y, part);
            if (start + i < written) add_part(m, l, acc, top, total, sums[i]);
        }
        if (MAX_EACH == 1) break;  // no more parts than blocks
        u32 row = shared_address(smem) + sums_at(0, u.piece, u.h, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int part = start + AHEAD + i;
            if (part < written) sums[i] = remote_load4(part_at(p, row, part, SUMS_BYTES));
        }
    }
    // The group joins a whole that is still empty.
    float whole_m = NO_KEYS, whole_l = 0.f, whole[4] = {};
    add_part(whole_m, whole_l, whole, m, l, make_float4(acc[0], acc[1], acc[2], acc[3]));
    store_four(
        p, query, u.ending, whole_m, whole_l, whole, query.head + u.h,
        query.share * PIECES + u.piece);
}

// `written` tiles have parts. All that needs no other block is done before the cluster has met.
__device__ __forceinline__ void finish_share(
    const Params& p, const Query& query, u8* smem, int written) {
    int end = min(HEADS, p.H - query.head) * PIECES, at = query.part + p.parts * (threadIdx.x / 32);
    Unit unit;
    if (at < end) unit = unit_at(p, query, smem, at, written);
    cluster_sync();
    while (at < end) {
        finish(p, query, smem, unit, written);
        at += p.parts * 8;
        if (at < end) unit = unit_at(p, query, smem, at, written);
    }
}

// All copies under way at once; heads beyond the last are zeros. A thread has every fourth head.
__device__ __forceinline__ void load_query(const Params& p, const Query& query, u8* smem) {
    int chunk = threadIdx.x % 64, first = threadIdx.x / 64, left = p.H - query.head;
    u32 block = shared_address(smem) + chunk / 8 * BLOCK_BYTES;
    u32 to[2] = {
        block + swizzled(first, chunk % 8), block + swizzled(first + 4, chunk % 8)};
    const u8* from = p.q + (query.t * p.H + query.head + first) * C * 2 + chunk * 16;
#pragma unroll
    for (int j = 0; j < HEADS / 4; j++) {
        bool live = first + 4 * j < left;
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to[j % 2] + j / 2 * 1024),
            "l"(live ? from + j * 4 * C * 2 : p.q), "r"(live ? 16 : 0)
            : "memory");
    }
}

__device__ __forceinline__ void await_query() {  // every consumer, for the copies of all
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_async();
    consumers_sync();
}

// A program's token, heads and place among those of the token.
__device__ __forceinline__ Query program_at(const Params& p, int index) {
    Query query;
    int head_blocks = (p.H + HEADS - 1) / HEADS;
    if (SPLIT) {  // blocks of a cluster are neighbours
        query.part = index % p.parts;
        query.share = index / p.parts % SHARES;
        query.head = index / p.parts / SHARES % head_blocks * HEADS;
        query.t = index / p.parts / SHARES / head_blocks;
    } else {
        int parts = p.parts;
        // Not known to the compiler: it would keep what divides by them in registers it lacks.
        asm volatile("" : "+r"(parts), "+r"(head_blocks));
        query.head = index % head_blocks * HEADS;
        query.t = index / head_blocks / parts;
        query.part = index / head_blocks % parts;
        query.share = 0;
    }
    query.window_tiles = (p.rows + TILE - 1) / TILE;
    query.first = query.part * p.tiles_each;
    return query;
}

// Asked for first by a block's first program: what is known of the token only says whether it counts.
__device__ __forceinline__ void list_first(const Params& p, const Query& query, int (&early)[2]) {
    int row = threadIdx.x % 256 / 4;
    early[0] = listed(p, query, query.first, row);
    early[1] = listed(p, query, query.first + 1, row);
}

__device__ __forceinline__ void look_up(const Params& p, Query& query) {
    query.slot = p.slot[query.t];
    query.position = static_cast<int>(p.position[query.t]);
    query.first_row = static_cast<int>(p.first_row[query.t]);
    query.first_position = static_cast<int>(p.first_position[query.t]);
    query.visible = (query.position + 1) / p.ratio;
    query.num_entries = p.entry_words ? p.K : min(query.visible, p.K);
    query.num_tiles = query.window_tiles + (query.num_entries + TILE - 1) / TILE;
    if (query.slot < 0) query.num_tiles = 0;
    int end = min(query.first + min(p.tiles_each, query.num_tiles), query.num_tiles);
    query.end = max(query.first, end);
}

__device__ __forceinline__ int num_programs(const Params& p) {
    return p.T * ((p.H + HEADS - 1) / HEADS) * p.parts;
}

// The first of programs `index`, `index` + gridDim.x, .. that has something to do, or -1 if there is
// none. Parts without tiles are not written, results without keys are.
__device__ __forceinline__ int find_program(const Params& p, int index, Query& query) {
#pragma unroll 1
    for (; index < num_programs(p); index += gridDim.x) {
        query = program_at(p, index);
        look_up(p, query);
        if (p.parts == 1 || query.first < query.num_tiles) return index;
    }
    return -1;
}

// A block of a cluster.
__device__ __forceinline__ void consume_and_combine(
    const Params& p, const Query& query, u8* smem, u32 full, u32 empty) {
    load_query(p, query, smem);
    await_query();
    State states[MAX_EACH];
#pragma unroll
    for (int i = 0; i < MAX_EACH; i++) {
        states[i] = {{NO_KEYS, NO_KEYS}, {0.f, 0.f}, {}};
        if (query.first + i < query.end) attend_tile(p, query, i, smem, full, empty, states[i]);
    }
    consumers_sync();  // products of both warp groups are done with what the sums overwrite
#pragma unroll
    for (int i = 0; i < MAX_EACH; i++)
        if (query.first + i < query.end) leave_part(smem, states[i], i);
    finish_share(p, query, smem, query.num_tiles);
    cluster_sync();  // none leaves before all have read
}

// Programs at gridDim.x from each other. The next token is looked up, and its queries fetched, while the
// results before leave; the producers are ahead by as many tiles as there are buffers.
__device__ __forceinline__ void consume(
    const Params& p, Query query, u8* smem, u32 full, u32 empty) {
    load_query(p, query, smem);
    for (int index = blockIdx.x, n = 0; index >= 0;) {
        await_query();
        State state = {{NO_KEYS, NO_KEYS}, {0.f, 0.f}, {}};
        for (int i = query.first; i < query.end; i++)
            attend_tile(p, query, n++, smem, full, empty, state);
        // Both warp groups have exchanged scores since, or met above: none reads the queries.
        Query next = query;
        index = find_program(p, index + gridDim.x, next);
        if (index >= 0) load_query(p, next, smem);
        if (p.parts > 1) {
            if (query.first < query.end) store_part(p, query, state);
        } else if (FP8) {
            store_fp8(p, query, state);
        } else {
            store_bf16(p, query, state);
        }
        query = next;
    }
}

extern "C" __global__ void __launch_bounds__(512, 1) sparse_attn_sm90_kernel(
    const __grid_constant__ Params p) {
    extern __shared__ u8 unaligned[];
    u8* smem = unaligned + (-shared_address(unaligned) & 1023);
    // Until it waits for what the kernel before writes, it only reads weights.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    u32 full = shared_address(smem) + BARRIER_AT, empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 256);
            barrier_init(empty + 16 * s, 256);
            barrier_init(empty + 16 * s + 8, 256);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x * 32 < p.H)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.sink + threadIdx.x * 32));
    __syncthreads();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Query query = program_at(p, blockIdx.x);
    int early[2];
    list_first(p, query, early);
    look_up(p, query);
    bool is_last = blockIdx.x + gridDim.x >= num_programs(p);
    if (!SPLIT && p.parts > 1 && is_last && query.first >= query.num_tiles) return;

    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
#if SPLIT
        if (query.first < query.end) produce(p, query, 0, early, smem, full, empty);
        cluster_sync();
        cluster_sync();
#else
        for (int index = blockIdx.x, n = 0;;) {
            if (query.first < query.end) produce(p, query, n, early, smem, full, empty);
            n += query.end - query.first;
            index = find_program(p, index + gridDim.x, query);
            if (index < 0) break;
            list_first(p, query, early);
        }
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
#if SPLIT
        consume_and_combine(p, query, smem, full, empty);
#else
        consume(p, query, smem, full, empty);
#endif
    }
}
