/* Linear layers and norms of a few rows. */

#pragma once
#include "model.h"

static inline void dot_4(const stored *w, int64_t stride, const real *x, int64_t n, real *y) {
    real a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < n; i++) {
        a += wide(w[i]) * x[i];
        b += wide(w[stride + i]) * x[i];
        c += wide(w[2 * stride + i]) * x[i];
        d += wide(w[3 * stride + i]) * x[i];
    }
    y[0] = a, y[1] = b, y[2] = c, y[3] = d;
}

static inline void dot_4_of_2(const stored *w, int64_t stride, const real *x, const real *z, int64_t n, real *y, real *v) {
    real a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
    for (int64_t i = 0; i < n; i++) {
        real p = wide(w[i]), q = wide(w[stride + i]), r = wide(w[2 * stride + i]), s = wide(w[3 * stride + i]);
        a += p * x[i], b += q * x[i], c += r * x[i], d += s * x[i];
        e += p * z[i], f += q * z[i], g += r * z[i], h += s * z[i];
    }
    y[0] = a, y[1] = b, y[2] = c, y[3] = d, v[0] = e, v[1] = f, v[2] = g, v[3] = h;
}

static inline real dot_1(const stored *w, const real *x, int64_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += wide(w[i]) * x[i];
    return sum;
}

/* Outputs [begin, end) of a linear layer for all rows, row r's first one at out[r * out_stride]. Four weights' rows are read at a time and
   used for all rows while they are in the nearest cache. */
static void product(const Linear *layer, const real *in, int64_t in_stride, real *out, int64_t out_stride, int64_t rows, int64_t begin,
                    int64_t end) {
    int64_t n = layer->inputs, o = begin;
    for (; o + 4 <= end; o += 4) {
        const stored *w = layer->weight + o * n;
        real *y = out + o - begin;
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2, y += 2 * out_stride)
            dot_4_of_2(w, n, in + r * in_stride, in + (r + 1) * in_stride, n, y, y + out_stride);
        if (r < rows) dot_4(w, n, in + r * in_stride, n, y);
    }
    for (; o < end; o++)
        for (int64_t r = 0; r < rows; r++) out[r * out_stride + o - begin] = dot_1(layer->weight + o * n, in + r * in_stride, n);
    if (layer->bias)
        for (int64_t r = 0; r < rows; r++)
            for (o = begin; o < end; o++) out[r * out_stride + o - begin] += wide(layer->bias[o]);
}

/* A thread's range of the outputs, for buffers of one row after another. */
static void product_of_thread(const Linear *layer, const real *in, real *out, int64_t rows, const Thread *thread) {
    int64_t begin = from(layer->outputs, thread), end = to(layer->outputs, thread);
    product(layer, in, layer->inputs, out + begin, layer->outputs, rows, begin, end);
}

static void layer_norm(const Norm *norm, const real *in, real *out, int64_t n) {
    real mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; i++) mean += in[i];
    mean /= n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += (in[i] - mean) * (in[i] - mean);
    real factor = 1 / (real)sqrt(square / n + norm->epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = (in[i] - mean) * factor * (norm->weight ? wide(norm->weight[i]) : 1);
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
