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

