/* The soft token of a few rows: each part of the vocabulary is read once, for its logits and for the average of its embeddings. */

#pragma once
#include "attention.h"

typedef struct { /* one part of the vocabulary and one row: an online softmax, and the average so far */
    Softmax state;
    real *average;
} Part;

static void mix_block(const Head *head, int64_t hidden, int64_t first, int64_t count, real *logits, Part *part) {
    real top = part->state.top, sum = 0, scale = (real)head->scale, softcap = (real)head->softcap;
    for (int64_t b = 0; b < count; b++) {
        real logit = logits[b] * scale;
        logit = softcap ? softcap * (real)tanh(logit / softcap) : logit;
        logits[b] = logit / (real)head->temperature;
        top = logits[b] > top ? logits[b] : top;
    }
    real shrink = exponential(part->state.top - top);
    for (int64_t b = 0; b < count; b++) sum += logits[b] = exponential(logits[b] - top);
    for (int64_t b = count; b < BLOCK; b++) logits[b] = 0;
    if (shrink != 1)
        for (int64_t i = 0; i < hidden; i++) part->average[i] *= shrink;
    for (int64_t b = 0; b < count; b += 4) {
        const stored *e = head->table + (first + b) * hidden;
        const int64_t last = count - b - 1; /* a weight of 0 beyond it, and a row that is there */
        const stored *f = e + (last > 0 ? 1 : 0) * hidden, *g = e + (last > 1 ? 2 : 0) * hidden, *h = e + (last > 2 ? 3 : 0) * hidden;
        real p = logits[b], q = logits[b + 1], r = logits[b + 2], s = logits[b + 3];
        for (int64_t i = 0; i < hidden; i++) part->average[i] += p * wide(e[i]) + q * wide(f[i]) + r * wide(g[i]) + s * wide(h[i]);
    }
    part->state.sum = part->state.sum * shrink + sum, part->state.top = top;
}

static void mix_split(const Model *model, const real *prepared, int64_t rows, int64_t split, Part *parts) {
    const Head *head = &model->head;
    const int64_t vocab = head->vocabulary.outputs, begin = vocab * split / SPLITS, end = vocab * (split + 1) / SPLITS;
    real logits[MOST_ROWS * BLOCK];
    for (int64_t r = 0; r < rows; r++) {
        parts[r].state = (Softmax){-INFINITY, 0};
        memset(parts[r].average, 0, model->hidden * sizeof(real));
    }
    for (int64_t first = begin; first < end; first += BLOCK) {
        int64_t count = end - first < BLOCK ? end - first : BLOCK;
        product(&head->vocabulary, prepared, logits, BLOCK, rows, first, first + count);
        for (int64_t r = 0; r < rows; r++) mix_block(head, model->hidden, first, count, logits + r * BLOCK, &parts[r]);
    }
}

/* Dimensions [begin, end) of a row's soft token, from the parts of the vocabulary in their order. */
static void join_parts(const Model *model, const Part *parts, int64_t rows, int64_t row, int64_t begin, int64_t end, real *out) {
    real top = -INFINITY, sum = 0;
    for (int64_t s = 0; s < SPLITS; s++) top = parts[s * rows + row].state.top > top ? parts[s * rows + row].state.top : top;
    for (int64_t i = begin; i < end; i++) out[i] = 0;
    for (int64_t s = 0; s < SPLITS; s++) {
        const Part *part = &parts[s * rows + row];
        if (part->state.sum == 0) continue;
        real weight = exponential(part->state.top - top);
        sum += part->state.sum * weight;
        for (int64_t i = begin; i < end; i++) out[i] += weight * part->average[i];
    }
    for (int64_t i = begin; i < end; i++) out[i] *= (real)model->head.embedding_scale / sum;
}
