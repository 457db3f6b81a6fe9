// Routed experts of up to 64 tokens in one launch: gate and up, SwiGLU, down, ordered sum.
//
// A weight byte is read from memory once, 16 bytes a lane, and decoded in registers straight into
// the A operand of mma.m16n8k16: the tokens are its eight columns. A lane takes 32 consecutive
// inputs of a row, which is one MXFP4 group: the order of k inside a product is free as long as the
// tokens use the same. Weights lie in tiles of 8 rows and 128 inputs (core/expert_tiles.py), those
// of the same rows one behind the other, so what a warp reads is two streams.
//
// e2m1 to BF16: the code s|ee|m goes to bits 15 and 8..6 of a half; as BF16 that is the value
// times 2^-126, subnormals included, so one multiplication by 2^62 * scale gives the weight times
// 2^-64 exactly. The sums are multiplied by 2^64 at the end.
//
// Units of work are 16 weight rows a warp of one expert and up to TOKENS tokens of it, first all of
// gate and up, then of down: an expert that many tokens chose is many units, dealt to all blocks.
// A warp copies what it will decode itself through a ring in shared memory (cp.async, U tiles of
// each stream at a time), so no barrier of the block stands between memory and the matrix units, and
// the copies run ahead over the ends of units and from gate and up into down. A unit of the second
// kind waits until the hidden rows of its expert are complete, and the sums at the end, experts in
// ascending order, until every expert has written its part: the result does not depend on who came
// when.
//
// Blocks wait for each other, so all must run at once: moe_routed_kernel is launched when the kernels
// before it are done (moe_with_shared_kernel beside the router's blocks, which wait for nothing and
// end). The kernel after it may start early. That one's blocks come after the last of these has
// started, and so never hold what these need.
//
// Follows linear_device.cu in one text; moe_with_shared_sm90.cu may follow. SHARED_BLOCKS: how many
// blocks, the first, have the shared expert and none of these units.

typedef unsigned short u16;

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS;  // weight rows of a unit
constexpr int HIDDEN_ROWS = ROWS / 2, UP_UNITS = F / HIDDEN_ROWS, DOWN_UNITS = D / ROWS;
constexpr int SCALE_BYTES = 128 / GROUP;  // of a row in a tile
static_assert(16 * U <= 32, "a lane copies the scales of at most one row");
static_assert(TOKENS > 1 || MAX_PAIRS == K_EXPERTS, "one token is staged once");
static_assert(MAX_PAIRS * (UP_UNITS > DOWN_UNITS ? UP_UNITS : DOWN_UNITS) < 1 << 19,
              "units times up to 8192 blocks within 32 bits");
// SHARED_: of the shared expert.
constexpr int SHARED_PARTS = SHARED_BLOCKS ? 2 : 0;  // units of the shared expert for ROWS channels
// Counters: blocks that are done; units of gate and up of a tile; units of down of ROWS channels; the
// shared expert's units of gate and up.
constexpr int OF_DOWN = 1 + MAX_PAIRS, OF_SHARED = OF_DOWN + DOWN_UNITS;
constexpr int COUNTERS = OF_SHARED + (SHARED_BLOCKS ? 1 : 0);
constexpr u32 CODE = 0x01C001C0, SIGN = 0x80008000;

struct Params {
    const u16* x;            // [T, D] BF16
    const int* ids;          // [T, K] expert ids; those outside [first, first + E) count nothing
    const float* routing;    // [T, K]
    const u8 *w1, *s1;       // [E, F / 8, D / 128, 8, 64], [E, F / 8, D / 128, 8, 128 / GROUP]
    const u8 *w3, *s3;
    const u8 *w2, *s2;       // [E, D / 8, F / 128, 8, 64], [E, D / 8, F / 128, 8, 128 / GROUP]
    const float *g1, *g3, *g2;  // [E] global scales or null
    const u16* shared;       // [T, D] BF16 or null
    u16* out;                // [T, D] BF16
    u16* hidden;             // [T K, F] BF16; with SHARED_BLOCKS, then a row for each token
    float* partial;          // [T K, D], and the same rows
    int* counters;           // [COUNTERS], zero before and after
    int T, first;
    float limit;
};

// Experts whose pairs are counted; lists of few pairs are made without.
constexpr int COUNTED = MAX_PAIRS > 32 ? E : 1;

struct Smem {
    int id[MAX_PAIRS];       // expert of a pair, or -1
    float routing[MAX_PAIRS];
    int list[MAX_PAIRS];     // pairs by expert, ascending inside one
    int expert[MAX_PAIRS];   // of a tile: up to TOKENS pairs of one expert, in the order of the list
    int start[MAX_PAIRS + 1];  // of the tiles
    int count[COUNTED], first[COUNTED];
    int tiles;
    bool is_last;
};

// What a warp needs for 128 * U inputs of its 16 rows: U tiles of the first and second eight.
struct Stage {
    uint4 codes[U][2][32];
    u32 scales[2][U][8][SCALE_BYTES / 4];
};

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const u32 at = shared_address(to);
    if constexpr (BYTES == 16)  // codes, past L1
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
                     ::"r"(at), "l"(from), "l"(read_once()));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES));
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u16 to_bf16(float x) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

__device__ __forceinline__ int load_acquire(const int* p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Eight codes, least significant nibble first, as pairs (k, k + 4) in BF16 times `factor`. One
// multiplication shifts a nibble both ways: its sign to bit 15, the rest to bits 8..6.
__device__ __forceinline__ void decode(u32 q, u32 factor, u32 (&r)[4]) {
    const u32 high = q >> 8;
    r[0] = mul2(((q & 0x000F000F) * 0x1040) & (SIGN | CODE), factor);
    r[1] = mul2(((q & 0x00F000F0) * 0x0104) & (SIGN | CODE), factor);
    r[2] = mul2(((high & 0x000F000F) * 0x1040) & (SIGN | CODE), factor);
    r[3] = mul2(((high & 0x00F000F0) * 0x0104) & (SIGN | CODE), factor);
}

// The two factors, 2^62 * scale in both halves, of the lane's codes 0..15 and 16..31.
__device__ __forceinline__ void factors(const u32* scales, int t, u32& low, u32& high) {
    if constexpr (NVFP4) {
        u32 two = (scales[t / 2] >> (16 * (t & 1))) & 0xFFFF;
        // E4M3 at bits 10..4 of a half is its value times 2^-120.
        u32 both = ((two & 0x7F) << 4) | ((two & 0x7F00) << 12);
        both = mul2(mul2(both, 0x7B807B80), 0x5E805E80);  // 2^120, 2^62
        low = __byte_perm(both, 0, 0x1010), high = __byte_perm(both, 0, 0x3232);
    } else {
        low = high = (((scales[0] >> (8 * t)) & 0xFF) + 62) * 0x00800080;
    }
}

// One warp: 16 rows times 128 * U inputs of up to 8 tokens. xs: [k block][word][token][t].
__device__ __forceinline__ void multiply(
    float (&acc)[2][4], const Stage& s, const uint4* xs, int n, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int u = 0; u < U; u++) {
        u32 fa[2], fb[2];
        factors(s.scales[0][u][g], t, fa[0], fa[1]);
        factors(s.scales[1][u][g], t, fb[0], fb[1]);
        const uint4 a = s.codes[u][0][lane], b = s.codes[u][1][lane];
        const u32 qa[4] = {a.x, a.y, a.z, a.w}, qb[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint4 x = xs[((u * 4 + w) * TOKENS + n) * 4 + t];
            u32 ra[4], rb[4];
            decode(qa[w], fa[w / 2], ra);
            decode(qb[w], fb[w / 2], rb);
            mma(acc[0], ra[0], rb[0], ra[1], rb[1], x.x, x.y);
            mma(acc[1], ra[2], rb[2], ra[3], rb[3], x.z, x.w);
        }
    }
}

// Eight inputs, chunk c of token n, to where the B operand has them.
__device__ __forceinline__ void place(uint4* xs, int n, int c, const uint4& v) {
    uint4 p;
    p.x = __byte_perm(v.x, v.z, 0x5410), p.y = __byte_perm(v.x, v.z, 0x7632);
    p.z = __byte_perm(v.y, v.w, 0x5410), p.w = __byte_perm(v.y, v.w, 0x7632);
    int block = c / 16, t = (c % 16) / 4, w = c % 4;
    xs[((block * 4 + w) * TOKENS + n) * 4 + t] = p;
}

// Rows of the tokens into xs.
__device__ __forceinline__ void stage(
    uint4* xs, const u16* x, const int* rows, int count, int divide, int K) {
    const int chunks = K / 8;
    for (int i = threadIdx.x; i < count * chunks; i += THREADS) {
        const int n = i / chunks, c = i % chunks;
        place(xs, n, c, __ldcg(reinterpret_cast<const uint4*>(x + (u64)(rows[n] / divide) * K) + c));
    }
}

// The one token of a call, on its way while the lists are made, whatever they say.
struct OneToken {
    static constexpr int CHUNKS = D / 8, EACH = (CHUNKS + THREADS - 1) / THREADS;
    uint4 v[EACH];

    __device__ __forceinline__ void load(const u16* x) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int c = threadIdx.x + i * THREADS;
            if (c < CHUNKS) v[i] = __ldcg(reinterpret_cast<const uint4*>(x) + c);
        }
    }

    __device__ __forceinline__ void store(uint4* xs) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int c = threadIdx.x + i * THREADS;
            if (c < CHUNKS) place(xs, 0, c, v[i]);
        }
    }
};

// Which experts are hit, and by which pairs, in tiles: a lane a pair, in registers.
__device__ void make_short_lists(Smem& s, const Params& p, int pairs) {
    const int i = threadIdx.x;
    if (i < 32) {
        int e = -1;
        if (i < pairs) {
            e = p.ids[i] - p.first;
            e = e >= 0 && e < E ? e : -1;
            s.id[i] = e, s.routing[i] = p.routing[i];
        }
        int place = 0, rank = 0, tile = 0;
#pragma unroll
        for (int j = 0; j < MAX_PAIRS && j < 32; j++) {
            const int other = __shfl_sync(~0u, e, j);
            const bool is_before = other == e && j < i;
            place += other >= 0 && (other < e || is_before);
            rank += is_before;
        }
        const bool is_first = e >= 0 && rank % TOKENS == 0;
        const u32 firsts = __ballot_sync(~0u, is_first), live = __ballot_sync(~0u, e >= 0);
#pragma unroll
        for (int j = 0; j < MAX_PAIRS && j < 32; j++)
            tile += __shfl_sync(~0u, place, j) < place && (firsts >> j & 1);
        if (e >= 0) s.list[place] = i;
        if (is_first) s.expert[tile] = e, s.start[tile] = place;
        if (i == 0) s.tiles = __popc(firsts), s.start[__popc(firsts)] = __popc(live);
    }
    __syncthreads();
}

// The same of any number of pairs.
__device__ void make_lists(Smem& s, const Params& p, int pairs) {
    const int tid = threadIdx.x;
    for (int e = tid; e < E; e += THREADS) s.count[e] = 0;
    for (int i = tid; i < pairs; i += THREADS) {
        int e = p.ids[i] - p.first;
        s.id[i] = e >= 0 && e < E ? e : -1;
        s.routing[i] = p.routing[i];
    }
    __syncthreads();
    for (int i = tid; i < pairs; i += THREADS)
        if (s.id[i] >= 0) atomicAdd(&s.count[s.id[i]], 1);
    __syncthreads();
    if (tid < 32) {
        int tiles = 0, total = 0;
        for (int base = 0; base < E; base += 32) {
            const int e = base + tid, c = e < E ? s.count[e] : 0, own = (c + TOKENS - 1) / TOKENS;
            int sum = c, before = own;
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(~0u, sum, d), some = __shfl_up_sync(~0u, before, d);
                if (tid >= d) sum += other, before += some;
            }
            if (e < E) s.count[e] = total + sum - c, s.first[e] = tiles + before - own;
            tiles += __shfl_sync(~0u, before, 31);
            total += __shfl_sync(~0u, sum, 31);
        }
        if (tid == 0) s.tiles = tiles, s.start[tiles] = total;
    }
    __syncthreads();
    for (int i = tid; i < pairs; i += THREADS) {  // count: where the expert's list begins
        const int e = s.id[i];
        if (e < 0) continue;
        int rank = 0;
        for (int j = 0; j < i; j++) rank += s.id[j] == e;
        const int place = s.count[e] + rank, tile = s.first[e] + rank / TOKENS;
        s.list[place] = i;
        if (rank % TOKENS == 0) s.expert[tile] = e, s.start[tile] = place;
    }
    __syncthreads();
}

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    gate = fminf(gate, limit), up = fminf(fmaxf(up, -limit), limit);
    return gate / (1.0f + __expf(-gate)) * up;
}

// NaN must stay NaN: fminf and fmaxf drop it.
__device__ __forceinline__ float keep_nan(float value, float a, float b) {
    return (a != a || b != b) ? __uint_as_float(0x7FC00000) : value;
}

// The first unit of block b when `units` are dealt in order to all that have any. In 32 bits: it
// stands between the choice of experts and the first copy, and with 64 a division is a call.
__device__ __forceinline__ int first_unit(int units, int b) {
    return (u32)units * (b - SHARED_BLOCKS) / (gridDim.x - SHARED_BLOCKS);
}

// The units of one block as the copies see them: they run STAGES - 1 stages ahead.
struct Producer {
    const u8 *wa, *wb;  // what the lane copies and decodes next of the first and second eight rows
    const u8* scales;   // what it copies next of either's, if it is one of 16 * U lanes
    int is_down, unit, end, steps;
};

__device__ __forceinline__ void seek(Producer& c, const Params& p, const Smem& s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int per_tile = c.is_down ? DOWN_UNITS : UP_UNITS, K = c.is_down ? F : D;
    const int tile = c.unit / per_tile, block = c.unit % per_tile;
    const int row = c.is_down ? block * ROWS + warp * 16 : block * HIDDEN_ROWS + warp * 8;
    const u64 a = (u64)s.expert[tile] * (c.is_down ? D : F) + row, b = c.is_down ? a + 8 : a;
    const bool is_first = lane < 8 * U;
    c.steps = K / (128 * U);
    c.wa = (c.is_down ? p.w2 : p.w1) + a * (K / 2) + lane * 16;
    c.wb = (c.is_down ? p.w2 : p.w3) + b * (K / 2) + lane * 16;
    c.scales = (c.is_down ? p.s2 : is_first ? p.s1 : p.s3) + (is_first ? a : b) * (K / GROUP) +
               lane % (8 * U) * SCALE_BYTES;
}

// On to the down units once the others are all asked for. Nothing is left if unit == end.
__device__ __forceinline__ void begin(Producer& c, const Params& p, const Smem& s, int is_down) {
    const int units = s.tiles * (is_down ? DOWN_UNITS : UP_UNITS);
    c.is_down = is_down, c.unit = first_unit(units, blockIdx.x);
    c.end = first_unit(units, blockIdx.x + 1);
    if (c.unit < c.end) seek(c, p, s);
}

__device__ __forceinline__ void issue(Producer& c, const Params& p, const Smem& s, Stage& stage) {
    const int lane = threadIdx.x % 32;
    if (c.unit < c.end) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            copy_async<16>(&stage.codes[u][0][lane], c.wa + u * 512);
            copy_async<16>(&stage.codes[u][1][lane], c.wb + u * 512);
        }
        if (lane < 16 * U)
            copy_async<SCALE_BYTES>(reinterpret_cast<u8*>(stage.scales) + lane * SCALE_BYTES, c.scales);
        c.wa += 512 * U, c.wb += 512 * U, c.scales += 8 * U * SCALE_BYTES;
        if (--c.steps == 0) {
            c.unit++;
            if (c.unit < c.end) seek(c, p, s);
            else if (!c.is_down) begin(c, p, s, 1);
        }
    }
    commit_copies();
}

// The sum over a token's experts, ascending; equal ids in the order of their slots.
__device__ __forceinline__ void combine(const Params& p, const Smem& s, int token, int d) {
    int key[K_EXPERTS];
    float part[K_EXPERTS];
#pragma unroll
    for (int k = 0; k < K_EXPERTS; k++) key[k] = s.id[token * K_EXPERTS + k] * K_EXPERTS + k;
#pragma unroll
    for (int i = 1; i < K_EXPERTS; i++)
#pragma unroll
        for (int k = K_EXPERTS - 1; k >= i; k--) {
            const int low = min(key[k - 1], key[k]), high = max(key[k - 1], key[k]);
            key[k - 1] = low, key[k] = high;
        }
#pragma unroll
    for (int k = 0; k < K_EXPERTS; k++) {
        // Ids of other devices are -1, and their keys negative.
        const float* from = p.partial + (u64)(token * K_EXPERTS + key[k] % K_EXPERTS) * D + d;
        part[k] = key[k] >= 0 ? __ldcg(from) : 0.0f;
    }
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < K_EXPERTS; k++) total += part[k];
    if (SHARED_BLOCKS) total += __ldcg(p.partial + (u64)(p.T * K_EXPERTS + token) * D + d);
    else if (p.shared) total += from_bf16(p.shared[(u64)token * D + d]);
    p.out[(u64)token * D + d] = to_bf16(total);
}

// The output in pieces of ROWS channels of up to two tokens, dealt to all blocks.
__device__ void combine_all(const Params& p, const Smem& s) {
    constexpr int AT_ONCE = THREADS / ROWS;  // 2
    const int groups = (p.T + AT_ONCE - 1) / AT_ONCE;
    for (int piece = blockIdx.x; piece < DOWN_UNITS * groups; piece += gridDim.x) {
        const int block = piece / groups, token = piece % groups * AT_ONCE + threadIdx.x / ROWS;
        const int parts = s.tiles + SHARED_PARTS;
        if (parts) {
            if (threadIdx.x == 0)
                while (load_acquire(p.counters + OF_DOWN + block) < parts) __nanosleep(20);
            __syncthreads();
        }
        if (token < p.T) combine(p, s, token, block * ROWS + threadIdx.x % ROWS);
    }
}

// Hidden rows of a unit: gate in sum[0..1], up in sum[2..3], of tokens 2t and 2t + 1.
__device__ __forceinline__ void store_hidden(
    const Params& p, const Smem& s, const float (&sum)[4], int expert, int begin, int count,
    int row) {
    const int t = threadIdx.x % 4;
    const float ga = p.g1 ? p.g1[expert] : 1.0f, gb = p.g3 ? p.g3[expert] : 1.0f;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const int token = 2 * t + c;
        if (token >= count) continue;
        const int pair = s.list[begin + token];
        const float gate = sum[c] * ga, up = sum[2 + c] * gb;
        const float value = keep_nan(swiglu(gate, up, p.limit), gate, up);
        p.hidden[(u64)pair * F + row] = to_bf16(value * s.routing[pair]);
    }
}

// Rows `row` and `row + 8` of down.
__device__ __forceinline__ void store_partial(
    const Params& p, const Smem& s, const float (&sum)[4], int expert, int begin, int count,
    int row) {
    const int t = threadIdx.x % 4;
    const float scale = p.g2 ? p.g2[expert] : 1.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int token = 2 * t + c % 2;
        if (token < count)
            __stcg(p.partial + (u64)s.list[begin + token] * D + row + 8 * (c / 2), sum[c] * scale);
    }
}

// One more unit that others wait for.
__device__ __forceinline__ void finish(int* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
    }
}

__device__ __forceinline__ void run_units(
    const Params& p, Smem& s, Producer& c, Stage* ring, int& slot, uint4* xs, int is_down) {
    const int K = is_down ? F : D, per_tile = is_down ? DOWN_UNITS : UP_UNITS;
    const int steps = K / (128 * U);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const int units = s.tiles * per_tile, end = first_unit(units, blockIdx.x + 1);
    int staged = -1;
#pragma unroll 1
    for (int unit = first_unit(units, blockIdx.x); unit < end; unit++) {
        const int tile = unit / per_tile, block = unit % per_tile;
        const int begin = s.start[tile], count = s.start[tile + 1] - begin;
        if (staged != tile && (is_down || TOKENS > 1)) {
            if (is_down && threadIdx.x == 0)
                while (load_acquire(p.counters + 1 + tile) < UP_UNITS) __nanosleep(20);
            __syncthreads();
            stage(xs, is_down ? p.hidden : p.x, s.list + begin, count, is_down ? 1 : K_EXPERTS, K);
            __syncthreads();
            staged = tile;
        }
        float acc[2][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            await_copies<STAGES - 2>();
            __syncwarp();  // lanes copy scales for each other, and into what others have read
            multiply(acc, ring[slot], xs + step * U * 16 * TOKENS, g % TOKENS, lane);
            issue(c, p, s, ring[slot == 0 ? STAGES - 1 : slot - 1]);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = (acc[0][i] + acc[1][i]) * 1.8446744073709552e19f;
        const int expert = s.expert[tile];
        if (is_down)
            store_partial(p, s, sum, expert, begin, count, block * ROWS + warp * 16 + g);
        else
            store_hidden(p, s, sum, expert, begin, count, block * HIDDEN_ROWS + warp * 8 + g);
        finish(p.counters + (is_down ? OF_DOWN + block : 1 + tile));
    }
}

// All units of a block; a token that is the only one has been loaded.
__device__ __forceinline__ void run_routed(
    const Params& p, Smem& s, Stage* ring, uint4* xs, OneToken& token) {
    Producer c;
    begin(c, p, s, 0);
    if (c.unit == c.end) begin(c, p, s, 1);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) issue(c, p, s, ring[i]);
    if (TOKENS == 1) {
        token.store(xs);
        __syncthreads();
    }
    int slot = 0;
#pragma unroll 1
    for (int is_down = 0; is_down < 2; is_down++) {
        run_units(p, s, c, ring, slot, xs, is_down);
    }
}

// The sums, and counters that are zero again.
__device__ __forceinline__ void leave(const Params& p, Smem& s) {
    combine_all(p, s);
    __syncthreads();
    if (threadIdx.x == 0) s.is_last = atomicAdd(p.counters, 1) == gridDim.x - 1;
    __syncthreads();
    if (s.is_last)  // nobody reads the counters any more
        for (int i = threadIdx.x; i < COUNTERS; i += THREADS) p.counters[i] = 0;
}

__device__ __forceinline__ void make_all_lists(Smem& s, const Params& p) {
    if constexpr (MAX_PAIRS <= 32) make_short_lists(s, p, p.T * K_EXPERTS);
    else make_lists(s, p, p.T * K_EXPERTS);
}

constexpr int WIDEST = D > F ? D : F;

// What warps copy into, behind the tokens, and the part of the caller's.
__device__ __forceinline__ Stage* rings_of(uint4* xs) {
    return reinterpret_cast<Stage*>(xs + TOKENS * WIDEST / 8);
}

__device__ __forceinline__ Stage* ring_of(uint4* xs) {
    return rings_of(xs) + threadIdx.x / 32 * STAGES;
}

#if !SHARED_BLOCKS
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
moe_routed_kernel(
    const u16* x, const int* ids, const float* routing, const u8* w1, const u8* s1, const u8* w3,
    const u8* s3, const u8* w2, const u8* s2, const float* g1, const float* g3, const float* g2,
    const u16* shared, u16* out, u16* hidden, float* partial, int* counters, int T, int first,
    float limit) {
    extern __shared__ uint4 xs[];  // tokens, then the rings of the warps
    __shared__ Smem s;
    const Params p = {x, ids, routing, w1, s1, w3, s3, w2, s2, g1, g3, g2, shared, out, hidden,
                      partial, counters, T, first, limit};
    let_next_start();
    wait_for_previous();
    OneToken token;
    if (TOKENS == 1) token.load(p.x);
    make_all_lists(s, p);
    if (s.tiles == 0) return combine_all(p, s);  // the shared expert alone
    run_routed(p, s, ring_of(xs), xs, token);
    leave(p, s);
}
#endif
