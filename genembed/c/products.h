/* Linear layers and norms of a few rows. */

#pragma once
#include "model.h"

enum { LANES = 32 / sizeof(real), OUTPUTS = 4 };

typedef real Lanes __attribute__((vector_size(32), aligned(sizeof(real))));

static inline Lanes load(const real *from) { return *(const Lanes *)from; }

#ifdef BFLOAT16
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));
typedef uint32_t Bits __attribute__((vector_size(32)));
static inline Lanes load_wide(const stored *from) { return (Lanes)(__builtin_convertvector(*(const Halves *)from, Bits) << 16); }
#else
static inline Lanes load_wide(const stored *from) { return load(from); }
#endif

/* The sums of four vectors; added by pairs of neighbours, so that four cost little more than one. */
static inline void sums_of_4(Lanes a, Lanes b, Lanes c, Lanes d, real *y) {
#ifdef DOUBLE
    Lanes ab = SHUFFLE(a, b, 0, 4, 2, 6) + SHUFFLE(a, b, 1, 5, 3, 7), cd = SHUFFLE(c, d, 0, 4, 2, 6) + SHUFFLE(c, d, 1, 5, 3, 7);
    y[0] = ab[0] + ab[2], y[1] = ab[1] + ab[3], y[2] = cd[0] + cd[2], y[3] = cd[1] + cd[3];
#else
    Lanes ab = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    Lanes cd = SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    Lanes all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) y[i] = all[i] + all[i + 4];
#endif
}

/* Four outputs of ROWS rows: w [4, n] times x [ROWS, n], as many sums at a time as there are registers for. */
#define DEFINE_DOTS(ROWS)                                                                                                      \
    static void dots_##ROWS(const stored *w, const real *x, int64_t n, real *y, int64_t y_stride) {                            \
        Lanes sums[ROWS][OUTPUTS] = {0};                                                                                       \
        int64_t i = 0;                                                                                                         \
        for (; i + LANES <= n; i += LANES) {                                                                                   \
            Lanes v[OUTPUTS];                                                                                                  \
            for (int o = 0; o < OUTPUTS; o++) v[o] = load_wide(w + o * n + i);                                                 \
            for (int r = 0; r < ROWS; r++)                                                                                     \
                for (int o = 0; o < OUTPUTS; o++) sums[r][o] += v[o] * load(x + r * n + i);                                    \
        }                                                                                                                      \
        for (int r = 0; r < ROWS; r++) sums_of_4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], y + r * y_stride);            \
        for (; i < n; i++)                                                                                                     \
            for (int r = 0; r < ROWS; r++)                                                                                     \
                for (int o = 0; o < OUTPUTS; o++) y[r * y_stride + o] += wide(w[o * n + i]) * x[r * n + i];                    \
    }
DEFINE_DOTS(1)
DEFINE_DOTS(2)
DEFINE_DOTS(3)

static inline real dot_1(const stored *w, const real *x, int64_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += wide(w[i]) * x[i];
    return sum;
}

/* Outputs [begin, end) of a linear layer for all rows, row r's first one at out[r * out_stride]. Four weights' rows are read at a time and
   used for all rows while they are in the nearest cache. */
static void product(const Linear *layer, const real *in, real *out, int64_t out_stride, int64_t rows, int64_t begin, int64_t end) {
    int64_t n = layer->inputs, o = begin;
    for (; o + OUTPUTS <= end; o += OUTPUTS) {
        const stored *w = layer->weight + o * n;
        real *y = out + o - begin;
        int64_t r = 0;
        for (; r + 3 <= rows; r += 3) dots_3(w, in + r * n, n, y + r * out_stride, out_stride);
        if (rows - r == 2) dots_2(w, in + r * n, n, y + r * out_stride, out_stride);
        if (rows - r == 1) dots_1(w, in + r * n, n, y + r * out_stride, out_stride);
    }
    for (; o < end; o++)
        for (int64_t r = 0; r < rows; r++) out[r * out_stride + o - begin] = dot_1(layer->weight + o * n, in + r * n, n);
    if (layer->bias)
        for (int64_t r = 0; r < rows; r++)
            for (o = begin; o < end; o++) out[r * out_stride + o - begin] += wide(layer->bias[o]);
}

/* A thread's range of the outputs, for buffers of one row after another. */
static void product_of_thread(const Linear *layer, const real *in, real *out, int64_t rows, const Thread *thread) {
    int64_t begin = from(layer->outputs, thread), end = to(layer->outputs, thread);
    product(layer, in, out + begin, layer->outputs, rows, begin, end);
}

static void layer_norm(const Norm *norm, const real *in, real *out, int64_t n) {
    real mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; i++) mean += in[i];
    mean /= n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += (in[i] - mean) * (in[i] - mean);
    real factor = 1 / (real)sqrt(square / n + norm->epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = (in[i] - mean) * factor * wide(norm->weight[i]);
    if (norm->bias)
        for (int64_t i = 0; i < n; i++) out[i] += wide(norm->bias[i]);
}

static void root_mean_square_norm(const Norm *norm, const real *in, real *out, int64_t n) {
    real square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += in[i] * in[i];
    real factor = 1 / (real)sqrt(square / n + norm->epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = wide(norm->weight[i]) * in[i] * factor;
}

static void normalise(const Norm *norm, const real *in, real *out, int64_t n) {
    if (norm->kind == LAYER_NORM)
        layer_norm(norm, in, out, n);
    else
        root_mean_square_norm(norm, in, out, n);
}

static void normalise_rows(const Norm *norm, const real *in, real *out, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) normalise(norm, in + r * n, out + r * n, n);
}
