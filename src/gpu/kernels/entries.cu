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
