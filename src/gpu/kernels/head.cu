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

