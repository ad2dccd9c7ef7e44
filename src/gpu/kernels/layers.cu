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

