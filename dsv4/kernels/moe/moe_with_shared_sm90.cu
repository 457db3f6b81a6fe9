// Routed experts and the shared one of one token in one launch.
//
// The first SHARED_BLOCKS blocks have the shared expert, in FP8 as the linears have it; the others
// the routed ones, as in moe_routed_sm90.cu. A unit of either has about as many bytes to read. At the
// sizes of V4-Flash each block has one, four on most SMs; the routed experts alone are three.
//
// A unit of the shared expert has half as many rows as one of moe_routed_sm90.cu; half of its warps
// take the first half of the columns, the others the rest. Products, order of sums and roundings are
// those of linear_fp8, gate_up_swiglu, linear_fp8, one after the other, and so are the bits: which
// columns' sums belong together, CHUNK blocks of 128, comes from the plans of the linears.
//
// The kernel before it chooses the experts and may still run: of what that one writes nothing is read
// before the wait, and nothing is written. x and the shared expert's weights are there: the host says
// so by an early start.
//
// Follows linear_device.cu and moe_routed_sm90.cu in one text.

// SCALE_BYTES_FP8  bytes of a scale: 1, UE8M0, or 4, FP32
// UP_CHUNK, DOWN_CHUNK  blocks of 128 columns in a chunk of either linear
constexpr int SHARED_DOWN = 2 * D / ROWS;  // units; of gate and up one a block
constexpr int UP_CHUNKS = D / 256 / UP_CHUNK, DOWN_CHUNKS = F / 256 / DOWN_CHUNK;  // of a half
constexpr int MAX_CHUNKS = UP_CHUNKS > DOWN_CHUNKS ? UP_CHUNKS : DOWN_CHUNKS;
static_assert(SUMS_BYTES == WARPS * MAX_CHUNKS * 32 * 8, "what the host gives");
static_assert(TOKENS == 1 && U == 2 && D % 512 == 0 && F % 512 == 0, "stages of 128 FP8 columns");
static_assert(SHARED_BLOCKS == 2 * F / HIDDEN_ROWS, "a unit of gate and up for each");
static_assert(UP_CHUNKS * UP_CHUNK * 256 == D && DOWN_CHUNKS * DOWN_CHUNK * 256 == F, "whole chunks");

struct SharedWeights {
    const u8 *up, *up_scale;      // [2 F, D] gate and up, [2 F / 128, D / 128]
    const u8 *down, *down_scale;  // [D, F], [D / 128, F / 128]
};

// Which rows of a unit a warp has, and which half of the columns.
__device__ __forceinline__ int row_group() { return threadIdx.x / 32 % (WARPS / 2); }
__device__ __forceinline__ int column_half() { return threadIdx.x / 32 / (WARPS / 2); }

// The first row of a warp in a unit.
__device__ __forceinline__ int first_row(int unit, bool is_down) {
    return is_down ? unit * (ROWS / 2) + row_group() * 16
                   : unit * (HIDDEN_ROWS / 2) + row_group() * 8;
}

// The units of one block as the copies see them: its one of gate and up, then those of down.
struct SharedProducer {
    const u8 *wa, *wb;  // what the lane copies and decodes next of the first and second eight rows
    const u8* scale;    // of lane 0 those of the first, of lane 1 of the second
    int unit, end, steps;
    bool is_down;
};

__device__ __forceinline__ int first_down(int block) { return SHARED_DOWN * block / SHARED_BLOCKS; }

__device__ __forceinline__ void seek(SharedProducer& c, const SharedWeights& w) {
    const int lane = threadIdx.x % 32, K = c.is_down ? F : D, column = column_half() * (K / 2);
    const int a = first_row(c.unit, c.is_down), b = c.is_down ? a + 8 : a + F;
    const u8* weight = (c.is_down ? w.down : w.up) + column + lane % 4 * 16;
    c.wa = weight + (u64)(a + lane / 4) * K;
    c.wb = weight + (u64)(b + lane / 4) * K;
    const int at = ((lane ? b : a) / 128 * K + column) / 128;
    c.scale = (c.is_down ? w.down_scale : w.up_scale) + at * SCALE_BYTES_FP8;
    c.steps = K / 256;
}

// 128 columns of 16 rows: 64 each, and the words that hold the two scales.
__device__ __forceinline__ void issue(SharedProducer& c, const SharedWeights& w, Stage& stage) {
    const int lane = threadIdx.x % 32;
    if (c.unit < c.end) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            copy_async<16>(&stage.codes[half][0][lane], c.wa + half * 64);
            copy_async<16>(&stage.codes[half][1][lane], c.wb + half * 64);
        }
        if (lane < 2)
            copy_async<4>(reinterpret_cast<u32*>(stage.scales) + lane, c.scale - ((u64)c.scale & 3));
        c.wa += 128, c.wb += 128, c.scale += SCALE_BYTES_FP8;
        if (--c.steps == 0) {
            c.unit++;
            if (!c.is_down) {
                c.is_down = true;
                c.unit = first_down(blockIdx.x), c.end = first_down(blockIdx.x + 1);
            }
            if (c.unit < c.end) seek(c, w);
        }
    }
    commit_copies();
}

// One warp: 16 rows times 128 inputs, as linear_fp8_sm90.cu does it.
__device__ __forceinline__ void multiply_fp8(
    float (&part)[4], const Stage& s, const uint4* xs, int lane) {
    const int q = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 a = s.codes[half][0][lane], b = s.codes[half][1][lane];
        const u32 top[4] = {a.x, a.y, a.z, a.w}, low[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 2; j++) {  // eight inputs, as `place` has them: (0, 4), (1, 5), ...
            const uint4 x = xs[(q % 2 * 2 + j) * 4 + half * 2 + q / 2];
            u32 r[4];
            decode_e4m3(top[2 * j], r[0], r[2]);
            decode_e4m3(low[2 * j], r[1], r[3]);
            mma(part, r[0], r[1], r[2], r[3], __byte_perm(x.x, x.z, 0x5410),
                __byte_perm(x.y, x.w, 0x5410));
            decode_e4m3(top[2 * j + 1], r[0], r[2]);
            decode_e4m3(low[2 * j + 1], r[1], r[3]);
            mma(part, r[0], r[1], r[2], r[3], __byte_perm(x.x, x.z, 0x7632),
                __byte_perm(x.y, x.w, 0x7632));
        }
    }
}

// The instructions that Triton makes of gate_up_swiglu; NaN stays NaN.
__device__ __forceinline__ float shared_swiglu(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate, up = up > limit ? limit : up < -limit ? -limit : up;
    float power;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(gate, -1.4426950408889634f)));
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, power)), up);
}

// Products of a unit -> for warps of the first half, rows g and g + 8 of the token, as BF16 holds them.
// Chunks are summed in order, those of the other half behind the own.
__device__ __forceinline__ float2 multiply_unit(
    SharedProducer& c, const SharedWeights& w, Stage* ring, int& slot, const uint4* xs,
    float2* sums, bool is_down) {
    const int lane = threadIdx.x % 32, half = column_half();
    const int chunk = is_down ? DOWN_CHUNK : UP_CHUNK, chunks = is_down ? DOWN_CHUNKS : UP_CHUNKS;
    float2* all = sums + row_group() * (2 * MAX_CHUNKS * 32) + lane;
    int block = half * chunks * chunk;
#pragma unroll 1
    for (int i = half * chunks; i < (half + 1) * chunks; i++) {
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
        for (const int end = block + chunk; block < end; block++) {
            await_copies<STAGES - 2>();
            __syncwarp();  // lanes copy scales for each other, and into what others have read
            const u32* words = reinterpret_cast<const u32*>(ring[slot].scales);
            float part[4] = {}, scale[2];
#pragma unroll
            for (int r = 0; r < 2; r++)
                scale[r] = SCALE_BYTES_FP8 == 4 ? __uint_as_float(words[r])
                                                : e8m0(words[r] >> (block % 4 * 8) & 255);
            multiply_fp8(part, ring[slot], xs + block * 16, lane);
            issue(c, w, ring[slot == 0 ? STAGES - 1 : slot - 1]);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            total.x = __fmaf_rn(part[0], scale[0], total.x);  // all columns are of the one token
            total.y = __fmaf_rn(part[2], scale[1], total.y);
        }
        all[i * 32] = total;
    }
    __syncthreads();
    float2 v = all[0];
    if (half == 0)
        for (int i = 1; i < 2 * chunks; i++) v.x += all[i * 32].x, v.y += all[i * 32].y;
    return make_float2(from_bf16(to_bf16(v.x)), from_bf16(to_bf16(v.y)));
}

// A block of the shared expert, up to its results. The token has been loaded.
__device__ __forceinline__ void run_shared(
    const Params& p, Smem& s, const SharedWeights& w, Stage* ring, uint4* xs, float2* sums,
    OneToken& token) {
    const int lane = threadIdx.x % 32;
    const bool stores = column_half() == 0 && lane % 4 == 0;
    SharedProducer c = {nullptr, nullptr, nullptr, (int)blockIdx.x, (int)blockIdx.x + 1, 0, false};
    seek(c, w);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) issue(c, w, ring[i]);
    token.store(xs);
    __syncthreads();
    int slot = 0;
    const float2 up = multiply_unit(c, w, ring, slot, xs, sums, false);
    wait_for_previous();  // memory may be written, and ids read, from here on
    u16* hidden = p.hidden + (u64)K_EXPERTS * F;
    if (stores)
        hidden[first_row(blockIdx.x, false) + lane / 4] = to_bf16(shared_swiglu(up.x, up.y, p.limit));
    finish(p.counters + OF_SHARED);
    make_all_lists(s, p);
    if (threadIdx.x == 0)
        while (load_acquire(p.counters + OF_SHARED) < SHARED_BLOCKS) __nanosleep(20);
    __syncthreads();
    for (int i = threadIdx.x; i < F / 8; i += THREADS)
        place(xs, 0, i, __ldcg(reinterpret_cast<const uint4*>(hidden) + i));
    __syncthreads();
#pragma unroll 1
    for (int unit = first_down(blockIdx.x); unit < first_down(blockIdx.x + 1); unit++) {
        const float2 y = multiply_unit(c, w, ring, slot, xs, sums, true);
        float* to = p.partial + (u64)K_EXPERTS * D + first_row(unit, true) + lane / 4;
        if (stores) __stcg(to, y.x), __stcg(to + 8, y.y);
        finish(p.counters + OF_DOWN + unit * DOWN_UNITS / SHARED_DOWN);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
moe_with_shared_kernel(
    const u16* x, const int* ids, const float* routing, const u8* w1, const u8* s1, const u8* w3,
    const u8* s3, const u8* w2, const u8* s2, const float* g1, const float* g3, const float* g2,
    const u8* up, const u8* up_scale, const u8* down, const u8* down_scale, u16* out, u16* hidden,
    float* partial, int* counters, int first, float limit) {
    extern __shared__ uint4 xs[];  // the token, the rings of the warps, sums of chunks
    __shared__ Smem s;
    const Params p = {x, ids, routing, w1, s1, w3, s3, w2, s2, g1, g3, g2, nullptr, out, hidden,
                      partial, counters, 1, first, limit};
    let_next_start();
    OneToken token;
    token.load(p.x);
    if (blockIdx.x < SHARED_BLOCKS) {
        const SharedWeights w = {up, up_scale, down, down_scale};
        float2* sums = reinterpret_cast<float2*>(rings_of(xs) + WARPS * STAGES);
        run_shared(p, s, w, ring_of(xs), xs, sums, token);
    } else {
        wait_for_previous();
        make_all_lists(s, p);
        if (s.tiles) run_routed(p, s, ring_of(xs), xs, token);
    }
    leave(p, s);
}
