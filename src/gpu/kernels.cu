// What a GPU computes besides matrix products, forward and backward.
//
// The same source is compiled by NVRTC when a GPU is opened, and by g++ behind emulate.h, where
// tests run it thread by thread. So it includes nothing, and uses of CUDA only what that header
// has: the grid's coordinates, shared memory of fixed size, and barriers.
//
// T is what activations are stored as: float, or bfloat16 as its 16 bits. Sums are float, but for those
// that tokens are drawn by. Work is
// split over outputs and every sum has one order, so bits depend on neither the grid nor the
// clock; nothing is atomic.
//
// Legend of shapes: r rows, d hidden width, q query heads times head width, k key heads times
// head width, i intermediate width, v vocabulary, c rows whose logits are in memory.

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
struct bf16 { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Rounds to nearest, ties to even.
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
    u32 bits = __float_as_uint(x);
    bf16 rounded;
    if (x != x) rounded.bits = (unsigned short)((bits >> 16) | 64);
    else rounded.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return rounded;
}

// Most threads of a block. Blocks that sum have a power of two.
#define THREADS 256

// The sum of the block's values, in a fixed tree, for each of its threads.
template <class S>
__device__ inline S block_sum(S value) {
    __shared__ S parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    S sum = parts[0];
    __syncthreads();
    return sum;
}

__device__ inline float block_max(float value) {
    __shared__ float parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] = fmaxf(parts[threadIdx.x], parts[threadIdx.x + half]);
        __syncthreads();
    }
    float largest = parts[0];
    __syncthreads();
    return largest;
}

__device__ inline u64 global_thread() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

// ---- rows and elements ---------------------------------------------------------------------

// x[r, d] = table[tokens[r], d]; a block a row.
template <class T>
__device__ void embed(const T* table, const u32* tokens, float* x_rd, u32 width) {
    const T* from = table + (u64)tokens[blockIdx.x] * width;
    float* to = x_rd + (u64)blockIdx.x * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = to_float(from[i]);
}

// to[i] = from[rows[i]]; a block a row.
template <class T>
__device__ void gather(const T* from, const u32* rows, T* to, u32 width) {
    const T* source = from + (u64)rows[blockIdx.x] * width;
    T* target = to + (u64)blockIdx.x * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) target[i] = source[i];
}

// to[rows[i]] = from[i]; no row comes twice.
template <class T>
__device__ void scatter(const T* from, const u32* rows, T* to, u32 width) {
    const T* source = from + (u64)blockIdx.x * width;
    T* target = to + (u64)rows[blockIdx.x] * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) target[i] = source[i];
}

template <class T>
__device__ void round_to(const float* x, T* y, u64 n) {
    u64 i = global_thread();
    if (i < n) y[i] = from_float<T>(x[i]);
}

// sum = a + b
template <class T>
__device__ void add(const float* a, const T* b, float* sum, u64 n) {
    u64 i = global_thread();
    if (i < n) sum[i] = a[i] + to_float(b[i]);
}

// y[r, w] += bias[w]
template <class T>
__device__ void add_bias(T* y, const float* bias, u32 width, u64 n) {
    u64 i = global_thread();
    if (i < n) y[i] = from_float<T>(to_float(y[i]) + bias[i % width]);
}

// ---- root-mean-square norm -----------------------------------------------------------------

template <class X>
__device__ inline float inverse_rms(const X* x, u32 width, float eps) {
    float squares = 0;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) squares = fmaf(to_float(x[i]), to_float(x[i]), squares);
    return 1.0f / sqrtf(block_sum(squares) / width + eps);
}

// y = x · w / sqrt(mean(x²) + eps); a block a row.
template <class X, class T>
__device__ void rms_norm(const X* x, const float* weight, T* y, u32 width, float eps) {
    x += (u64)blockIdx.x * width;
    y += (u64)blockIdx.x * width;
    float inverse = inverse_rms(x, width, eps);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) y[i] = from_float<T>(to_float(x[i]) * inverse * weight[i]);
}

// With s = 1 / sqrt(mean(x²) + eps): dx = s·(w∘dy) − x · s³ · mean(x∘w∘dy), added to dx if it
// accumulates.
template <class X, class T>
__device__ void rms_norm_backward(const X* x, const float* weight, const T* dy, X* dx, u32 width, float eps,
                                  u32 accumulates) {
    u64 first = (u64)blockIdx.x * width;
    x += first; dy += first; dx += first;
    float inverse = inverse_rms(x, width, eps);
    float dot = 0;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x)
        dot = fmaf(to_float(x[i]), weight[i] * to_float(dy[i]), dot);
    float along = -block_sum(dot) * inverse * inverse * inverse / width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = fmaf(weight[i] * to_float(dy[i]), inverse, accumulates ? to_float(dx[i]) : 0.0f);
        dx[i] = from_float<X>(fmaf(to_float(x[i]), along, sum));
    }
}

// ---- rotary embedding, gated activation -----------------------------------------------------

// Turns the pairs (x[i], x[i + half]) of every head; sign −1 turns back. A block a row.
template <class T>
__device__ void rotary(T* x, const u32* positions, const float* cosines, const float* sines, u32 heads, u32 half,
                       float sign) {
    x += (u64)blockIdx.x * heads * 2 * half;
    u64 at = (u64)positions[blockIdx.x] * half;
    for (u32 pair = threadIdx.x; pair < heads * half; pair += blockDim.x) {
        u32 i = pair % half;
        T* head = x + (u64)(pair / half) * 2 * half;
        float low = to_float(head[i]), high = to_float(head[i + half]);
        float c = cosines[at + i], s = sign * sines[at + i];
        head[i] = from_float<T>(low * c - high * s);
        head[i + half] = from_float<T>(high * c + low * s);
    }
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = silu(gate) ∘ up
template <class T>
__device__ void swiglu(const T* gate, const T* up, T* y, u64 n) {
    u64 i = global_thread();
    if (i >= n) return;
    float g = to_float(gate[i]);
    y[i] = from_float<T>(g * sigmoid(g) * to_float(up[i]));
}

template <class T>
__device__ void swiglu_backward(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up, u64 n) {
    u64 i = global_thread();
    if (i >= n) return;
    float g = to_float(gate[i]), d = to_float(dy[i]), s = sigmoid(g), silu = g * s;
    d_gate[i] = from_float<T>(d * to_float(up[i]) * fmaf(silu, 1.0f - s, s));
    d_up[i] = from_float<T>(d * silu);
}

// ---- attention ------------------------------------------------------------------------------
//
// Causal, over sequences of different lengths, without a matrix of scores in memory. A block has
// some positions of one sequence and the query heads that share one key head: its rows are
// (position, member of the group). Keys come in tiles counted from the start of the sequence, so a
// row's bits depend on its sequence alone.
//
// Keys and values lie in pages of PAGE positions, [position, k] each: `pages` has, for each
// sequence, where they begin, in elements from `keys` and `values`, which are addresses. Sequences
// without a cache have pages, too: pieces of the batch's own rows.

#define PAGE 32
#define MAX_HEAD 128
// One more, so that neighbours in a column lie in different banks.
#define ROW (MAX_HEAD + 1)
#define FORWARD_ROWS 32
#define BACKWARD_ROWS 16
#define BACKWARD_KEYS 16

// How the rows of a batch belong to sequences; by sequence, and by tile of positions.
struct Spans {
    const u32* first_row;
    const u32* rows;
    const u32* start;
    const u32* tile_sequence;
    // Offset of the tile's first row from the first of its sequence.
    const u32* tile_offset;
};

struct Pages {
    u64 keys;
    u64 values;
    const u64* table;
    u32 per_sequence;
};

struct Heads {
    u32 group;
    u32 keys;
    u32 dim;
};

template <class T> __device__ inline const T* page_at(u64 base, u64 offset) { return (const T*)(base + offset * sizeof(T)); }

// Brings up to `count` positions from `first` on of one key head into shared memory; what is not
// there is zero.
template <class T>
__device__ inline void load_keys(float (*to)[ROW], u32 count, u64 base, const Pages& pages, u32 sequence, u32 first,
                                 u32 end, const Heads& heads, u32 head) {
    for (u32 i = threadIdx.x; i < count * heads.dim; i += blockDim.x) {
        u32 key = i / heads.dim, column = i % heads.dim, position = first + key;
        float value = 0;
        if (position < end) {
            const T* page = page_at<T>(base, pages.table[(u64)sequence * pages.per_sequence + position / PAGE]);
            value = to_float(page[((u64)(position % PAGE) * heads.keys + head) * heads.dim + column]);
        }
        to[key][column] = value;
    }
}

// Where a row of a tile has its query head's values in [r, q]. `first` is the first of its rows
// in the batch, counted in positions.
__device__ inline u64 query_at(u32 first, u32 row, u32 head, const Heads& heads) {
    u64 batch_row = first + row / heads.group;
    return (batch_row * heads.keys * heads.group + (u64)head * heads.group + row % heads.group) * heads.dim;
}

template <class T>
__device__ inline void load_queries(float (*to)[ROW], u32 most, const T* from, u32 first, u32 rows, u32 head,
                                    const Heads& heads, float scale) {
    for (u32 i = threadIdx.x; i < most * heads.dim; i += blockDim.x) {
        u32 row = i / heads.dim, column = i % heads.dim;
        to[row][column] = row < rows ? scale * to_float(from[query_at(first, row, head, heads) + column]) : 0.0f;
    }
}

__device__ inline float dot(const float* a, const float* b, u32 n) {
    float sum = 0;
    for (u32 i = 0; i < n; i++) sum = fmaf(a[i], b[i], sum);
    return sum;
}

// out = softmax(q kᵀ / sqrt(d)) v, and the logarithm of each row's sum of exponentials.
// Blocks: (tiles, key heads) of 256 threads.
template <class T>
__device__ void attention(const T* q, T* out, float* lse, Spans spans, Pages pages, Heads heads) {
    __shared__ float queries[FORWARD_ROWS][ROW];
    __shared__ float tile[PAGE][ROW];
    __shared__ float scores[FORWARD_ROWS][PAGE + 1];
    __shared__ float largest[FORWARD_ROWS], total[FORWARD_ROWS], shrink[FORWARD_ROWS];
    u32 sequence = spans.tile_sequence[blockIdx.x], offset = spans.tile_offset[blockIdx.x], head = blockIdx.y;
    u32 left = spans.rows[sequence] - offset, most = FORWARD_ROWS / heads.group;
    u32 positions = left < most ? left : most, rows = positions * heads.group;
    u32 first = spans.first_row[sequence] + offset, start = spans.start[sequence] + offset;
    u32 end = start + positions;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[4][4] = {};
    if (threadIdx.x < FORWARD_ROWS) {
        largest[threadIdx.x] = -INFINITY;
        total[threadIdx.x] = 0;
    }
    load_queries(queries, FORWARD_ROWS, q, first, rows, head, heads, 1.0f / sqrtf((float)heads.dim));
    for (u32 key = 0; key < end; key += PAGE) {
        __syncthreads();
        load_keys<T>(tile, PAGE, pages.keys, pages, sequence, key, end, heads, head);
        __syncthreads();
        for (u32 row = warp; row < FORWARD_ROWS; row += 8) {
            bool visible = row < rows && key + lane <= start + row / heads.group;
            scores[row][lane] = visible ? dot(queries[row], tile[lane], heads.dim) : -INFINITY;
        }
        __syncthreads();
        if (threadIdx.x < rows) {
            u32 row = threadIdx.x;
            float most_likely = largest[row];
            for (u32 i = 0; i < PAGE; i++) most_likely = fmaxf(most_likely, scores[row][i]);
            shrink[row] = expf(largest[row] - most_likely);
            largest[row] = most_likely;
        }
        load_keys<T>(tile, PAGE, pages.values, pages, sequence, key, end, heads, head);
        __syncthreads();
        for (u32 row = warp; row < rows; row += 8) scores[row][lane] = expf(scores[row][lane] - largest[row]);
        __syncthreads();
        if (threadIdx.x < rows) {
            float sum = 0;
            for (u32 i = 0; i < PAGE; i++) sum += scores[threadIdx.x][i];
            total[threadIdx.x] = fmaf(total[threadIdx.x], shrink[threadIdx.x], sum);
        }
        for (u32 i = 0; i < 4; i++) {
            u32 row = warp + 8 * i;
            if (row >= rows) continue;
            // Later keys have no weight, but no weight times an infinite value is not nothing.
            u32 seen = start + row / heads.group + 1;
            u32 keys = seen <= key ? 0 : (seen - key < PAGE ? seen - key : PAGE);
            for (u32 j = 0; j < 4; j++) {
                u32 column = lane + 32 * j;
                if (column >= heads.dim) continue;
                float sum = sums[i][j] * shrink[row];
                for (u32 n = 0; n < keys; n++) sum = fmaf(scores[row][n], tile[n][column], sum);
                sums[i][j] = sum;
            }
        }
    }
    __syncthreads();
    for (u32 i = 0; i < 4; i++) {
        u32 row = warp + 8 * i;
        if (row >= rows) continue;
        u64 to = query_at(first, row, head, heads);
        for (u32 j = 0; j < 4; j++)
            if (lane + 32 * j < heads.dim) out[to + lane + 32 * j] = from_float<T>(sums[i][j] / total[row]);
        if (lane == 0) lse[to / heads.dim] = largest[row] + logf(total[row]);
    }
}

// delta = Σ out ∘ d_out of each row and query head; a block a row, a thread a head.
template <class T>
__device__ void attention_delta(const T* out, const T* d_out, float* delta, u32 heads, u32 dim) {
    for (u32 head = threadIdx.x; head < heads; head += blockDim.x) {
        u64 at = (u64)blockIdx.x * heads + head;
        float sum = 0;
        for (u32 i = 0; i < dim; i++) sum = fmaf(to_float(out[at * dim + i]), to_float(d_out[at * dim + i]), sum);
        delta[at] = sum;
    }
}

// dq; blocks (tiles of BACKWARD_ROWS rows, key heads) of 256 threads.
template <class T>
__device__ void attention_dq(const T* q, const T* d_out, const float* lse, const float* delta, T* dq, Spans spans,
                             Pages pages, Heads heads) {
    __shared__ float queries[BACKWARD_ROWS][ROW];
    __shared__ float d_rows[BACKWARD_ROWS][ROW];
    __shared__ float tile[PAGE][ROW];
    __shared__ float d_scores[BACKWARD_ROWS][PAGE + 1];
    u32 sequence = spans.tile_sequence[blockIdx.x], offset = spans.tile_offset[blockIdx.x], head = blockIdx.y;
    u32 left = spans.rows[sequence] - offset, most = BACKWARD_ROWS / heads.group;
    u32 positions = left < most ? left : most, rows = positions * heads.group;
    u32 first = spans.first_row[sequence] + offset;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float scale = 1.0f / sqrtf((float)heads.dim);
    float sums[2][4] = {};
    load_queries(queries, BACKWARD_ROWS, q, first, rows, head, heads, scale);
    load_queries(d_rows, BACKWARD_ROWS, d_out, first, rows, head, heads, 1.0f);
    for (u32 key = 0; key < offset + positions; key += PAGE) {
        float d_weights[2];
        __syncthreads();
        load_keys<T>(tile, PAGE, pages.values, pages, sequence, key, offset + positions, heads, head);
        __syncthreads();
        for (u32 i = 0; i < 2; i++) d_weights[i] = dot(d_rows[warp + 8 * i], tile[lane], heads.dim);
        __syncthreads();
        load_keys<T>(tile, PAGE, pages.keys, pages, sequence, key, offset + positions, heads, head);
        __syncthreads();
        for (u32 i = 0; i < 2; i++) {
            u32 row = warp + 8 * i;
            float d_score = 0;
            if (row < rows && key + lane <= offset + row / heads.group) {
                u64 at = query_at(first, row, head, heads) / heads.dim;
                float weight = expf(dot(queries[row], tile[lane], heads.dim) - lse[at]);
                d_score = weight * (d_weights[i] - delta[at]);
            }
            d_scores[row][lane] = d_score;
        }
        __syncthreads();
        for (u32 i = 0; i < 2; i++)
            for (u32 j = 0; j < 4; j++)
                if (lane + 32 * j < heads.dim)
                    for (u32 n = 0; n < PAGE; n++)
                        sums[i][j] = fmaf(d_scores[warp + 8 * i][n], tile[n][lane + 32 * j], sums[i][j]);
    }
    for (u32 i = 0; i < 2; i++) {
        u32 row = warp + 8 * i;
        if (row >= rows) continue;
        u64 to = query_at(first, row, head, heads);
        for (u32 j = 0; j < 4; j++)
            if (lane + 32 * j < heads.dim) dq[to + lane + 32 * j] = from_float<T>(scale * sums[i][j]);
    }
}

// dk and dv, [r, k]; blocks (tiles of BACKWARD_KEYS positions, key heads) of 256 threads. The
// queries that saw a key come in the order of their positions, group by group.
template <class T>
__device__ void attention_dkv(const T* q, const T* d_out, const float* lse, const float* delta, T* dk, T* dv,
                              Spans spans, Pages pages, Heads heads) {
    __shared__ float queries[BACKWARD_ROWS][ROW];
    __shared__ float d_rows[BACKWARD_ROWS][ROW];
    __shared__ float keys[BACKWARD_KEYS][ROW];
    __shared__ float values[BACKWARD_KEYS][ROW];
    __shared__ float weights[BACKWARD_ROWS][BACKWARD_KEYS + 1];
    __shared__ float d_scores[BACKWARD_ROWS][BACKWARD_KEYS + 1];
    u32 sequence = spans.tile_sequence[blockIdx.x], first_key = spans.tile_offset[blockIdx.x], head = blockIdx.y;
    u32 end = spans.rows[sequence], first = spans.first_row[sequence];
    u32 step = BACKWARD_ROWS / heads.group;
    u32 row = threadIdx.x / BACKWARD_KEYS, key = threadIdx.x % BACKWARD_KEYS;
    float scale = 1.0f / sqrtf((float)heads.dim);
    float dk_sums[8] = {}, dv_sums[8] = {};
    load_keys<T>(keys, BACKWARD_KEYS, pages.keys, pages, sequence, first_key, end, heads, head);
    load_keys<T>(values, BACKWARD_KEYS, pages.values, pages, sequence, first_key, end, heads, head);
    for (u32 offset = first_key; offset < end; offset += step) {
        u32 positions = end - offset < step ? end - offset : step, rows = positions * heads.group;
        __syncthreads();
        load_queries(queries, BACKWARD_ROWS, q, first + offset, rows, head, heads, scale);
        load_queries(d_rows, BACKWARD_ROWS, d_out, first + offset, rows, head, heads, 1.0f);
        __syncthreads();
        float weight = 0, d_score = 0;
        if (row < rows && first_key + key <= offset + row / heads.group) {
            u64 at = query_at(first + offset, row, head, heads) / heads.dim;
            weight = expf(dot(queries[row], keys[key], heads.dim) - lse[at]);
            d_score = weight * (dot(d_rows[row], values[key], heads.dim) - delta[at]);
        }
        weights[row][key] = weight;
        d_scores[row][key] = d_score;
        __syncthreads();
        // From here on a thread has the key `row` and every sixteenth column from `key` on.
        for (u32 j = 0; j < 8; j++) {
            u32 column = key + 16 * j;
            if (column >= heads.dim) break;
            for (u32 n = 0; n < rows; n++) {
                dv_sums[j] = fmaf(weights[n][row], d_rows[n][column], dv_sums[j]);
                dk_sums[j] = fmaf(d_scores[n][row], queries[n][column], dk_sums[j]);
            }
        }
    }
    if (first_key + row >= end) return;
    u64 to = ((u64)(first + first_key + row) * heads.keys + head) * heads.dim;
    for (u32 j = 0; j < 8; j++) {
        u32 column = key + 16 * j;
        if (column >= heads.dim) break;
        // The queries were scaled already.
        dk[to + column] = from_float<T>(dk_sums[j]);
        dv[to + column] = from_float<T>(dv_sums[j]);
    }
}

// Puts the batch's keys and values, [r, k], into the pages of their sequences; a block a row.
template <class T>
__device__ void append(const T* k, const T* v, const u32* sequence_of, const u32* positions, Pages pages, u32 width) {
    u32 position = positions[blockIdx.x];
    u64 page = pages.table[(u64)sequence_of[blockIdx.x] * pages.per_sequence + position / PAGE];
    u64 at = (u64)(position % PAGE) * width, from = (u64)blockIdx.x * width;
    T* keys = (T*)page_at<T>(pages.keys, page);
    T* values = (T*)page_at<T>(pages.values, page);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        keys[at + i] = k[from + i];
        values[at + i] = v[from + i];
    }
}

// ---- head -----------------------------------------------------------------------------------
//
// A row of logits comes in chunks of CHUNK, each read by a block of its own, so that a single row gives the
// whole GPU work. What is true of a row is then put together from its chunks, in their order.

#define CHUNK 4096
// Of each thread.
#define SHARE (CHUNK / THREADS)

__device__ inline u32 chunks_of(u32 vocab) { return (vocab + CHUNK - 1) / CHUNK; }

// e^(x − largest); 0 of −∞, also where nothing is larger.
__device__ inline float relative(float x, float largest) { return x == -INFINITY ? 0.0f : expf(x - largest); }

// The largest logit of a chunk, and Σ e^(x − largest); blocks (rows, chunks).
__device__ inline void chunk_statistics(const float* logits_cv, float* largest, float* sum, u32 vocab) {
    u32 first = blockIdx.y * CHUNK + threadIdx.x;
    u64 chunk = (u64)blockIdx.x * chunks_of(vocab) + blockIdx.y;
    logits_cv += (u64)blockIdx.x * vocab;
    float logits[SHARE], chunk_largest = -INFINITY, total = 0;
    for (u32 j = 0; j < SHARE; j++) {
        u32 i = first + j * THREADS;
        logits[j] = i < vocab ? logits_cv[i] : -INFINITY;
        chunk_largest = fmaxf(chunk_largest, logits[j]);
    }
    chunk_largest = block_max(chunk_largest);
    // NaN is not the largest of anything, but no sum is without it.
    for (u32 j = 0; j < SHARE; j++) total += relative(logits[j], chunk_largest);
    total = block_sum(total);
    if (threadIdx.x != 0) return;
    largest[chunk] = chunk_largest;
    sum[chunk] = total;
}

// The largest logit of each row, and ln Σ e^x; a block a row.
__device__ inline void row_statistics(const float* chunk_largest, const float* chunk_sum, float* largest, float* lse,
                                      u32 vocab) {
    u32 chunks = chunks_of(vocab);
    chunk_largest += (u64)blockIdx.x * chunks;
    chunk_sum += (u64)blockIdx.x * chunks;
    float row_largest = -INFINITY, sum = 0;
    for (u32 i = threadIdx.x; i < chunks; i += blockDim.x) row_largest = fmaxf(row_largest, chunk_largest[i]);
    row_largest = block_max(row_largest);
    for (u32 i = threadIdx.x; i < chunks; i += blockDim.x)
        sum = fmaf(chunk_sum[i], relative(chunk_largest[i], row_largest), sum);
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    largest[blockIdx.x] = row_largest;
    lse[blockIdx.x] = row_largest + logf(sum);
}

// −Σ p ln p of each row; a block a row.
__device__ inline void row_entropies(const float* logits_cv, const float* lse, float* entropy, u32 vocab) {
    logits_cv += (u64)blockIdx.x * vocab;
    float row_lse = lse[blockIdx.x], mean = 0;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        float logprob = logits_cv[i] - row_lse;
        // A token that cannot come adds nothing.
        if (logprob > -INFINITY) mean = fmaf(expf(logprob), logprob, mean);
    }
    mean = block_sum(mean);
    if (threadIdx.x == 0) entropy[blockIdx.x] = -mean;
}

// How a row is drawn from: `temperature` divides its logits, 0 takes the largest, less leaves the row.
struct Draw { double uniform; float temperature; u32 unused; };
struct Drawn { u32 token; float logprob; };
#define NO_TOKEN 0xffffffffu

// A token's weight, rounded to float; their sums are double, so that a share of 1 / v is as exact as its weight.
// Below e^-87.3 float has no normal numbers.
__device__ inline double draw_weight(float x, float largest, float temperature) {
    if (temperature == 0) return x == largest ? 1.0f : 0.0f;
    float scaled = (x - largest) / temperature;
    return scaled < -87.3f ? 0.0f : expf(scaled);
}

// Which weight is the first at which their running sum exceeds the aim, from which the sum before it is taken;
// where rounding keeps the sum from it, the last one that is not 0.
__device__ inline u32 first_above(const double* weights, u32 n, double& aim) {
    u32 chosen = 0;
    double before = 0, sum = 0;
    for (u32 i = 0; i < n && !(sum > aim); i++) {
        if (!(weights[i] > 0)) continue;
        chosen = i;
        before = sum;
        sum += weights[i];
    }
    aim -= before;
    return chosen;
}

// The weights of each chunk, summed; blocks (rows, chunks).
__device__ inline void draw_sums(const float* logits_cv, const float* largest, const Draw* draws, double* sums,
                                 u32 vocab) {
    float row_largest = largest[blockIdx.x], temperature = draws[blockIdx.x].temperature;
    if (temperature < 0) return;
    u32 first = blockIdx.y * CHUNK + threadIdx.x;
    logits_cv += (u64)blockIdx.x * vocab;
    double sum = 0;
    for (u32 j = 0; j < SHARE; j++) {
        u32 i = first + j * THREADS;
        if (i < vocab) sum += draw_weight(logits_cv[i], row_largest, temperature);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[(u64)blockIdx.x * chunks_of(vocab) + blockIdx.y] = sum;
}

// Draws from each row: the chunk, then the thread whose share of it has the token, then the token. A block a row.
__device__ inline void draw_tokens(const float* logits_cv, const float* largest, const float* lse, const Draw* draws,
                                   const double* sums, Drawn* drawn, u32 vocab) {
    __shared__ double shares[THREADS], aim;
    __shared__ u32 chunk, owner;
    u32 chunks = chunks_of(vocab);
    float row_largest = largest[blockIdx.x], row_lse = lse[blockIdx.x];
    Draw draw = draws[blockIdx.x];
    logits_cv += (u64)blockIdx.x * vocab;
    sums += (u64)blockIdx.x * chunks;
    if (threadIdx.x == 0) {
        double total = 0;
        if (draw.temperature >= 0 && fabsf(row_lse) < INFINITY)
            for (u32 i = 0; i < chunks; i++) total += sums[i];
        aim = draw.uniform * total;
        // The largest weighs 1: less is no sum, and NaN is not at least 1.
        chunk = total >= 1 && total < INFINITY ? first_above(sums, chunks, aim) : NO_TOKEN;
    }
    __syncthreads();
    if (chunk == NO_TOKEN) {
        if (threadIdx.x == 0) drawn[blockIdx.x] = Drawn { NO_TOKEN, 0 };
        return;
    }
    u32 first = chunk * CHUNK + threadIdx.x * SHARE;
    double weights[SHARE], share = 0;
    for (u32 j = 0; j < SHARE; j++) {
        weights[j] = first + j < vocab ? draw_weight(logits_cv[first + j], row_largest, draw.temperature) : 0;
        share += weights[j];
    }
    shares[threadIdx.x] = share;
    __syncthreads();
    if (threadIdx.x == 0) owner = first_above(shares, THREADS, aim);
    __syncthreads();
    if (threadIdx.x != owner) return;
    u32 token = first + first_above(weights, SHARE, aim);
    drawn[blockIdx.x] = Drawn { token, logits_cv[token] - row_lse };
}

// logprobs[t] = ln softmax(logits of its row)[token]
__device__ inline void target_logprobs(const float* logits_cv, const float* lse, const u32* row_of, const u32* tokens,
                                       float* logprobs, u32 vocab, u64 n) {
    u64 i = global_thread();
    if (i < n) logprobs[i] = logits_cv[(u64)row_of[i] * vocab + tokens[i]] - lse[row_of[i]];
}

// Of each row that has a gradient: Σ factor · (onehot(token) − softmax) over its targets, which are
// first_target[i] .. first_target[i + 1]; a block a row.
template <class T>
__device__ void logits_gradient(const float* logits_cv, const float* lse, const u32* rows, const u32* first_target,
                                const u32* tokens, const float* factors, T* d_logits, u32 vocab) {
    u32 row = rows[blockIdx.x], begin = first_target[blockIdx.x], end = first_target[blockIdx.x + 1];
    logits_cv += (u64)row * vocab;
    d_logits += (u64)blockIdx.x * vocab;
    float row_lse = lse[row], total = 0;
    for (u32 t = begin; t < end; t++) total += factors[t];
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        d_logits[i] = from_float<T>(-total * expf(logits_cv[i] - row_lse));
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 t = begin; t < end; t++) {
        float d = -total * expf(logits_cv[tokens[t]] - row_lse);
        for (u32 other = begin; other < end; other++)
            if (tokens[other] == tokens[t]) d += factors[other];
        d_logits[tokens[t]] = from_float<T>(d);
    }
}

// ---- entry points ---------------------------------------------------------------------------

#define SPANS(rows) Spans { first_row, rows, start, tile_sequence, tile_offset }
#define SPAN_ARGUMENTS const u32* first_row, const u32* span_rows, const u32* start, const u32* tile_sequence, const u32* tile_offset
#define PAGE_ARGUMENTS u64 keys, u64 values, const u64* table, u32 per_sequence
#define PAGES Pages { keys, values, table, per_sequence }

#define KERNELS(T, NAME)                                                                                          \
    extern "C" __global__ void embed_##NAME(const T* table, const u32* tokens, float* x, u32 width) {             \
        embed(table, tokens, x, width);                                                                           \
    }                                                                                                             \
    extern "C" __global__ void gather_##NAME(const T* from, const u32* rows, T* to, u32 width) {                  \
        gather(from, rows, to, width);                                                                            \
    }                                                                                                             \
    extern "C" __global__ void scatter_##NAME(const T* from, const u32* rows, T* to, u32 width) {                 \
        scatter(from, rows, to, width);                                                                           \
    }                                                                                                             \
    extern "C" __global__ void round_##NAME(const float* x, T* y, u64 n) { round_to(x, y, n); }                   \
    extern "C" __global__ void add_##NAME(const float* a, const T* b, float* sum, u64 n) { add(a, b, sum, n); }   \
    extern "C" __global__ void add_bias_##NAME(T* y, const float* bias, u32 width, u64 n) {                       \
        add_bias(y, bias, width, n);                                                                              \
    }                                                                                                             \
    extern "C" __global__ void rms_norm_##NAME(const float* x, const float* weight, T* y, u32 width, float eps) { \
        rms_norm(x, weight, y, width, eps);                                                                       \
    }                                                                                                             \
    extern "C" __global__ void head_norm_##NAME(const T* x, const float* weight, T* y, u32 width, float eps) {    \
        rms_norm(x, weight, y, width, eps);                                                                       \
    }                                                                                                             \
    extern "C" __global__ void rms_norm_backward_##NAME(const float* x, const float* weight, const T* dy,         \
                                                        float* dx, u32 width, float eps, u32 accumulates) {       \
        rms_norm_backward(x, weight, dy, dx, width, eps, accumulates);                                            \
    }                                                                                                             \
    extern "C" __global__ void head_norm_backward_##NAME(const T* x, const float* weight, const T* dy, T* dx,     \
                                                         u32 width, float eps, u32 accumulates) {                 \
        rms_norm_backward(x, weight, dy, dx, width, eps, accumulates);                                            \
    }                                                                                                             \
    extern "C" __global__ void rotary_##NAME(T* x, const u32* positions, const float* cosines,                    \
                                             const float* sines, u32 heads, u32 half, float sign) {               \
        rotary(x, positions, cosines, sines, heads, half, sign);                                                  \
    }                                                                                                             \
    extern "C" __global__ void swiglu_##NAME(const T* gate, const T* up, T* y, u64 n) { swiglu(gate, up, y, n); } \
    extern "C" __global__ void swiglu_backward_##NAME(const T* gate, const T* up, const T* dy, T* d_gate,         \
                                                      T* d_up, u64 n) {                                           \
        swiglu_backward(gate, up, dy, d_gate, d_up, n);                                                           \
    }                                                                                                             \
    extern "C" __global__ void attention_##NAME(const T* q, T* out, float* lse, SPAN_ARGUMENTS, PAGE_ARGUMENTS,   \
                                                u32 group, u32 key_heads, u32 dim) {                              \
        attention(q, out, lse, SPANS(span_rows), PAGES, Heads { group, key_heads, dim });                         \
    }                                                                                                             \
    extern "C" __global__ void attention_delta_##NAME(const T* out, const T* d_out, float* delta, u32 heads,      \
                                                      u32 dim) {                                                  \
        attention_delta(out, d_out, delta, heads, dim);                                                           \
    }                                                                                                             \
    extern "C" __global__ void attention_dq_##NAME(const T* q, const T* d_out, const float* lse,                  \
                                                   const float* delta, T* dq, SPAN_ARGUMENTS, PAGE_ARGUMENTS,     \
                                                   u32 group, u32 key_heads, u32 dim) {                           \
        attention_dq(q, d_out, lse, delta, dq, SPANS(span_rows), PAGES, Heads { group, key_heads, dim });         \
    }                                                                                                             \
    extern "C" __global__ void attention_dkv_##NAME(const T* q, const T* d_out, const float* lse,                 \
                                                    const float* delta, T* dk, T* dv, SPAN_ARGUMENTS,             \
                                                    PAGE_ARGUMENTS, u32 group, u32 key_heads, u32 dim) {          \
        attention_dkv(q, d_out, lse, delta, dk, dv, SPANS(span_rows), PAGES, Heads { group, key_heads, dim });    \
    }                                                                                                             \
    extern "C" __global__ void append_##NAME(const T* k, const T* v, const u32* sequence_of,                      \
                                             const u32* positions, PAGE_ARGUMENTS, u32 width) {                   \
        append(k, v, sequence_of, positions, PAGES, width);                                                       \
    }                                                                                                             \
    extern "C" __global__ void logits_gradient_##NAME(const float* logits, const float* lse, const u32* rows,     \
                                                      const u32* first_target, const u32* tokens,                 \
                                                      const float* factors, T* d_logits, u32 vocab) {             \
        logits_gradient(logits, lse, rows, first_target, tokens, factors, d_logits, vocab);                       \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)

extern "C" __global__ void chunk_statistics_f32(const float* logits, float* largest, float* sum, u32 vocab) {
    chunk_statistics(logits, largest, sum, vocab);
}
extern "C" __global__ void row_statistics_f32(const float* chunk_largest, const float* chunk_sum, float* largest,
                                              float* lse, u32 vocab) {
    row_statistics(chunk_largest, chunk_sum, largest, lse, vocab);
}
extern "C" __global__ void row_entropies_f32(const float* logits, const float* lse, float* entropy, u32 vocab) {
    row_entropies(logits, lse, entropy, vocab);
}
extern "C" __global__ void draw_sums_f32(const float* logits, const float* largest, const Draw* draws, double* sums,
                                         u32 vocab) {
    draw_sums(logits, largest, draws, sums, vocab);
}
extern "C" __global__ void draw_tokens_f32(const float* logits, const float* largest, const float* lse,
                                           const Draw* draws, const double* sums, Drawn* drawn, u32 vocab) {
    draw_tokens(logits, largest, lse, draws, sums, drawn, vocab);
}
extern "C" __global__ void target_logprobs_f32(const float* logits, const float* lse, const u32* row_of,
                                               const u32* tokens, float* logprobs, u32 vocab, u64 n) {
    target_logprobs(logits, lse, row_of, tokens, logprobs, vocab, n);
}
