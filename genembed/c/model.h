/* A model, its rows and their pool as Python hands them over: pointers into PyTorch's tensors. genembed/native.py has the same structures. */

#pragma once
#include "numbers.h"

enum { NO_NORM, ROOT_MEAN_SQUARE, LAYER_NORM };
enum { MOST_ROWS = 16, MOST_DIM = 512, BLOCK = 16, SPLITS = 32 };

typedef struct { /* y = x W^T + b */
    const stored *weight, *bias;
    int64_t outputs, inputs;
} Linear;

typedef struct {
    const stored *weight, *bias;
    double epsilon;
    int64_t kind;
} Norm;

typedef struct {
    Norm before_attention, before_feed_forward, of_queries, of_keys;
    Linear query, key, value, output, gate, up, down;
    int64_t activation, window;
} Layer;

typedef struct { /* from a state to the next input: T, logits = softcap tanh(scale (W h + b) / softcap), E */
    Linear dense, vocabulary;
    Norm norm;
    const stored *table;
    double temperature, scale, softcap, embedding_scale;
    int64_t activation;
} Head;

typedef struct {
    int64_t hidden, widest, heads, kv_heads, head_dim, num_layers, after_norm;
    double attention_scale;
    const Layer *layers;
    Norm final_norm;
    Head head;
    const real *cosines, *sines;        /* [positions, head_dim], or null */
    const stored *positions, *token_type; /* learned: [positions, hidden] and [hidden], or null */
} Model;

typedef struct { /* keys and values of one layer: [slots, kv_heads, tokens, head_dim], and of the prefix [kv_heads, prefix, head_dim] */
    stored *keys, *values;
    const stored *prefix_keys, *prefix_values;
} Pool;

typedef struct {
    int64_t count, prefix, tokens;
    const int64_t *lengths; /* own positions of each row, without the one being read */
    const Pool *pools;
} Rows;
