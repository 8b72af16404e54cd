/* Attention of one query over what its row may see. */

#pragma once
#include "products.h"

typedef struct { /* an online softmax over tokens, several at a time */
    real top, sum;
} Softmax;

enum { TOKENS = 128 };

static void attend_span(const stored *keys, const stored *values, int64_t tokens, const real *query, int64_t dim, real softcap,
                        Softmax *state, real *out) {
    real scores[TOKENS];
    for (int64_t start = 0; start < tokens; start += TOKENS) {
        int64_t count = tokens - start < TOKENS ? tokens - start : TOKENS;
        const stored *k = keys + start * dim, *v = values + start * dim;
        real top = state->top;
        for (int64_t t = 0; t < count; t++) scores[t] = dot_1(k + t * dim, query, dim);
        if (softcap)
            for (int64_t t = 0; t < count; t++) scores[t] = softcap * (real)tanh(scores[t] / softcap);
        for (int64_t t = 0; t < count; t++) top = scores[t] > top ? scores[t] : top;
        real shrink = exponential(state->top - top), sum = 0;
        for (int64_t t = 0; t < count; t++) scores[t] = exponential(scores[t] - top);
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < count; t++) sum += scores[t];
        for (int64_t i = 0; i < dim; i++) out[i] *= shrink;
        int64_t t = 0;
        for (; t + 4 <= count; t += 4) {
            const stored *a = v + t * dim;
            real p = scores[t], q = scores[t + 1], r = scores[t + 2], s = scores[t + 3];
            for (int64_t i = 0; i < dim; i++)
                out[i] += p * wide(a[i]) + q * wide(a[dim + i]) + r * wide(a[2 * dim + i]) + s * wide(a[3 * dim + i]);
        }
        for (; t < count; t++)
            for (int64_t i = 0; i < dim; i++) out[i] += scores[t] * wide(v[t * dim + i]);
        state->sum = state->sum * shrink + sum, state->top = top;
    }
}

/* One query over what its row may see: the end of the shared prefix, if the window reaches so far, and its own tokens. */
static void attend_query(const Rows *rows, const Pool *pool, int64_t kv_heads, int64_t dim, int64_t row, int64_t kv_head, int64_t window,
                         real softcap, const real *query, real *out) {
    int64_t own = rows->lengths[row] + 1, first = 0, skipped = 0;
    if (window && rows->prefix + own > window) {
        first = rows->prefix + own - window;
        skipped = first > rows->prefix ? first - rows->prefix : 0;
        first = first > rows->prefix ? rows->prefix : first;
    }
    const int64_t slot = ((row * kv_heads + kv_head) * rows->tokens + skipped) * dim, shared = (kv_head * rows->prefix + first) * dim;
    Softmax state = {-INFINITY, 0};
    for (int64_t i = 0; i < dim; i++) out[i] = 0;
    if (rows->prefix > first)
        attend_span(pool->prefix_keys + shared, pool->prefix_values + shared, rows->prefix - first, query, dim, softcap, &state, out);
    attend_span(pool->keys + slot, pool->values + slot, own - skipped, query, dim, softcap, &state, out);
    for (int64_t i = 0; i < dim; i++) out[i] /= state.sum;
}
