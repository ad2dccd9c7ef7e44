// Entry points of the emulated kernels, and matrix products in the place of cuBLAS's.

#define EMULATE_BOTH(NAME) EMULATE(NAME##_f32) EMULATE(NAME##_bf16)

EMULATE_BOTH(embed)
EMULATE_BOTH(gather)
EMULATE_BOTH(scatter)
EMULATE_BOTH(round)
EMULATE_BOTH(add)
EMULATE_BOTH(add_bias)
EMULATE_BOTH(rms_norm)
EMULATE_BOTH(head_norm)
EMULATE_BOTH(rms_norm_backward)
EMULATE_BOTH(head_norm_backward)
EMULATE_BOTH(rotary)
EMULATE_BOTH(swiglu)
EMULATE_BOTH(swiglu_backward)
EMULATE_BOTH(attention)
EMULATE_BOTH(attention_delta)
EMULATE_BOTH(attention_dq)
EMULATE_BOTH(attention_dkv)
EMULATE_BOTH(append)
EMULATE_BOTH(logits_gradient)
EMULATE(chunk_statistics_f32)
EMULATE(row_statistics_f32)
EMULATE(row_entropies_f32)
EMULATE(draw_sums_f32)
EMULATE(draw_tokens_f32)
EMULATE(target_logprobs_f32)

// c[m, n] = alpha · a[m, k] · b[k, n] + beta · c, each row by row with strides of its own, f32 sums.
template <class In, class Out>
static void product(unsigned m, unsigned n, unsigned k, float alpha, const In* a, u64 a_row, u64 a_column, const In* b,
                    u64 b_row, u64 b_column, float beta, Out* c, u64 c_row) {
    for (unsigned i = 0; i < m; i++)
        for (unsigned j = 0; j < n; j++) {
            float sum = 0;
            for (unsigned l = 0; l < k; l++)
                sum = fmaf(to_float(a[i * a_row + l * a_column]), to_float(b[l * b_row + j * b_column]), sum);
            Out& to = c[i * c_row + j];
            to = from_float<Out>(beta == 0 ? alpha * sum : fmaf(beta, to_float(to), alpha * sum));
        }
}

#define EMULATE_PRODUCT(NAME, IN, OUT)                                                                               \
    extern "C" void emulate_product_##NAME(unsigned m, unsigned n, unsigned k, float alpha, const IN* a, u64 a_row, \
                                           u64 a_column, const IN* b, u64 b_row, u64 b_column, float beta, OUT* c,  \
                                           u64 c_row) {                                                              \
        product(m, n, k, alpha, a, a_row, a_column, b, b_row, b_column, beta, c, c_row);                            \
    }

EMULATE_PRODUCT(f32_f32, float, float)
EMULATE_PRODUCT(bf16_bf16, bf16, bf16)
EMULATE_PRODUCT(bf16_f32, bf16, float)
