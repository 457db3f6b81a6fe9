// Top k of one block of numbers: a histogram of 2048 bins, then ranks inside one bin.
//
// Constants: ITEMS numbers a thread, K, MERGE. MERGE 0 takes FP32 scores of a row and its block
// `blockIdx % blocks`; 1 takes keys and ids of the winners of all blocks of a row.
//
// A thread holds ITEMS neighbours, so thread order is the order of places. What is chosen is
// { key > last.key or (key == last.key and place <= last.place) }, whatever order atomics ran in.

typedef unsigned int u32;

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048, BLOCK = ITEMS * THREADS;
constexpr int INF_BITS = 0x7F800000;
constexpr u32 ALL = 0xFFFFFFFFu;

struct Args {
    const float* scores;
    const long long* lengths;
    int* out;
    int* keys;
    int* ids;
    long long S;
    int blocks;  // of a row
    int block;   // scores of each
};

struct Shared {
    int bins[BINS];
    int low[WARPS], high[WARPS], totals[WARPS];
    int keys[THREADS], places[THREADS];
    int bin, room, in_bin, num_candidates, last_key, last_place;
};

__device__ __forceinline__ int order_key(float x) {
    const int bits = __float_as_int(x), magnitude = bits & 0x7FFFFFFF;
    return magnitude > INF_BITS ? -INF_BITS : bits < 0 ? -magnitude : magnitude;
}

__device__ __forceinline__ float key_value(int key) {
    return __int_as_float(key < 0 ? -key | (1 << 31) : key);
}

// Sum over the threads before this one; `total` over all. Ends without a barrier.
__device__ __forceinline__ int sum_before(Shared& shared, int x, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(ALL, sum, d);
        sum += lane >= d ? other : 0;
    }
    if (lane == 31) shared.totals[warp] = sum;
    __syncthreads();
    int warps = shared.totals[lane];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(ALL, warps, d);
        warps += lane >= d ? other : 0;
    }
    total = __shfl_sync(ALL, warps, 31);
    const int before = __shfl_sync(ALL, warps, (warp + 31) % 32);
    return sum - x + (warp ? before : 0);
}

// Bins that order as keys do: linear in the value where that is finite, else in the key.
struct Binning {
    int low_key, shift;
    float low, factor;
    bool is_linear;

    __device__ __forceinline__ Binning(int low_key, int high_key) : low_key(low_key) {
        const u32 range = (u32)high_key - (u32)low_key;
        shift = max(0, 21 - __clz(range));  // range >> shift < BINS
        low = key_value(low_key);
        const float width = key_value(high_key) - low;
        factor = (BINS - 1) / width;
        is_linear = width > 0 && width < 3e38f && factor < 3e38f;
    }

    __device__ __forceinline__ int operator()(int key) const {
        if (is_linear) return min(BINS - 1, (int)((key_value(key) - low) * factor));
        return ((u32)key - (u32)low_key) >> shift;
    }
};

__device__ __forceinline__ void find_range(
    Shared& shared, const int (&key)[ITEMS], int live, int& low, int& high) {
    low = 0x7FFFFFFF, high = -0x7FFFFFFF;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (i < live) low = min(low, key[i]), high = max(high, key[i]);
    }
    low = __reduce_min_sync(ALL, low), high = __reduce_max_sync(ALL, high);
    if (threadIdx.x % 32 == 0) {
        shared.low[threadIdx.x / 32] = low, shared.high[threadIdx.x / 32] = high;
    }
    __syncthreads();
    low = __reduce_min_sync(ALL, shared.low[threadIdx.x % 32]);
    high = __reduce_max_sync(ALL, shared.high[threadIdx.x % 32]);
}

// More than THREADS numbers share the bin of the last: halve the interval of keys.
__device__ __forceinline__ void find_last_slowly(
    Shared& shared, const int (&key)[ITEMS], int live, int k, int low, int high) {
    int total;
    while (low < high) {  // the largest key that at least k keys reach
        const int middle = (low | high) - ((low ^ high) >> 1);  // rounded up, no overflow
        int count = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) count += i < live && key[i] >= middle;
        __syncthreads();
        sum_before(shared, count, total);
        if (total >= k) low = middle;
        else high = middle - 1;
    }
    int above = 0, tied = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        above += i < live && key[i] > low;
        tied += i < live && key[i] == low;
    }
    __syncthreads();
    sum_before(shared, above, total);
    int room = k - total;
    __syncthreads();
    room -= sum_before(shared, tied, total);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (i < live && key[i] == low && --room == 0) {
            shared.last_key = low, shared.last_place = threadIdx.x * ITEMS + i;
        }
    }
    __syncthreads();
}

// Key and place of the last chosen number, 1 <= k < num_live.
__device__ __forceinline__ void find_last(
    Shared& shared, const int (&key)[ITEMS], int live, int k) {
    const int tid = threadIdx.x;
    for (int b = tid; b < BINS; b += THREADS) shared.bins[b] = 0;
    if (tid == 0) shared.num_candidates = 0;
    int low, high;
    find_range(shared, key, live, low, high);
    const Binning bin(low, high);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (i < live) atomicAdd(&shared.bins[bin(key[i])], 1);
    }
    __syncthreads();
    const int top = BINS - 1 - 2 * tid;
    const int first = shared.bins[top], second = shared.bins[top - 1];
    int total;
    const int before = sum_before(shared, first + second, total);
    if (before < k && k <= before + first + second) {
        const bool is_second = k > before + first;
        shared.bin = top - is_second;
        shared.room = k - before - (is_second ? first : 0);
        shared.in_bin = is_second ? second : first;
    }
    __syncthreads();
    const int in_bin = shared.in_bin, room = shared.room, last_bin = shared.bin;
    if (in_bin > THREADS) return find_last_slowly(shared, key, live, k, low, high);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (i < live && bin(key[i]) == last_bin) {
            const int n = atomicAdd(&shared.num_candidates, 1);
            shared.keys[n] = key[i], shared.places[n] = tid * ITEMS + i;
        }
    }
    __syncthreads();
    if (tid < in_bin) {
        const int own = shared.keys[tid], place = shared.places[tid];
        int rank = 1;
        for (int n = 0; n < in_bin; n++) {
            const int other = shared.keys[n];
            rank += other > own || (other == own && shared.places[n] < place);
        }
        if (rank == room) shared.last_key = own, shared.last_place = place;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) topk_select_kernel(const Args args) {
    __shared__ Shared shared;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int tid = threadIdx.x;
    const long long t = MERGE ? blockIdx.x : blockIdx.x / args.blocks;
    const int block = MERGE ? 0 : blockIdx.x % args.blocks;
    const int length = (int)max(0ll, min(args.lengths[t], args.S));
    int* out = args.out + t * K;
    if (MERGE ? length <= args.block : length <= K || block * args.block >= length) {
        if (!MERGE && block == 0) {
            for (int j = tid; j < K; j += THREADS) out[j] = j < length ? j : -1;
        }
        return;
    }
    int key[ITEMS], live = 0, num_live;  // live: a leading part of the thread's numbers
    u32 is_live = 0;
    const int first = tid * ITEMS;
    if (MERGE) {
        // Winners of a block lie side by side; only the last block may have fewer than K.
        const int last = length / args.block;
        num_live = last * K + min(length - last * args.block, K);
        const int* keys = args.keys + t * args.blocks * K;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) key[i] = first + i < num_live ? keys[first + i] : 0;
    } else {
        num_live = min(length - block * args.block, args.block);
        const float* scores = args.scores + t * args.S + (long long)block * args.block + first;
        if (ITEMS % 4 == 0 && args.S % 4 == 0) {
#pragma unroll
            for (int i = 0; i < ITEMS / 4; i++) {
                // Rows are whole quadruples, so none reaches past its row.
                float4 x = {0, 0, 0, 0};
                if (first + 4 * i < num_live) x = reinterpret_cast<const float4*>(scores)[i];
                key[4 * i] = order_key(x.x), key[(4 * i + 1) % ITEMS] = order_key(x.y);
                key[(4 * i + 2) % ITEMS] = order_key(x.z), key[(4 * i + 3) % ITEMS] = order_key(x.w);
            }
        } else {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                key[i] = first + i < num_live ? order_key(scores[i]) : 0;
            }
        }
    }
    live = max(0, min(num_live - first, ITEMS));
    const int k = min(K, num_live);
    int last_key = -0x7FFFFFFF, last_place = 0;
    if (k < num_live) {
        find_last(shared, key, live, k);
        last_key = shared.last_key, last_place = shared.last_place;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const bool is_before = key[i] > last_key || (key[i] == last_key && first + i <= last_place);
        is_live |= (u32)(i < live && is_before) << i;
    }
    int total;
    int place = sum_before(shared, __popc(is_live), total);
#ifdef DSV4_DEBUG
    if (total != k) asm volatile("trap;");
#endif
    const bool is_final = MERGE || length <= args.block;
    const long long at = (t * args.blocks + block) * K;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (is_live >> i & 1) {
            const int id = MERGE ? args.ids[t * args.blocks * K + first + i]
                                 : block * args.block + first + i;
            if (is_final) {
                out[place] = id;
            } else {
                args.keys[at + place] = key[i], args.ids[at + place] = id;
            }
            place++;
        }
    }
}
