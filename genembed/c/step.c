/* One refinement step of a few rows, and attention of one query per row, straight over PyTorch's tensors.

   A step of few rows reads every weight once and does little with it, so that its time is the memory's, if nothing is done between two
   readings. Here one parallel region covers the whole step: every thread owns a range of each layer's outputs, and threads meet at a
   barrier between two products. Whatever needs a whole row (a norm) is done by every thread for itself, which is cheaper than meeting.

   Every sum belongs to one row and one output and has a fixed order, so that a row's numbers depend neither on its neighbours nor on
   the number of threads.

   Built three times: STORED is what tensors hold, REAL what is computed with.
       float over float,   float over bfloat16 (-DBFLOAT16),   double over double (-DDOUBLE, for tests) */

#include "attention.h"
#include "soft_token.h"

static void rotate(real *x, const real *cosines, const real *sines, int64_t dim) {
    for (int64_t i = 0; i < dim / 2; i++) {
        real a = x[i], b = x[i + dim / 2];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + dim / 2] = b * cosines[i + dim / 2] + a * sines[i + dim / 2];
    }
}

/* A row's query heads that share one key head: norms, rotation, the new key and value into the pool, attention. */
static void attend_head(const Model *model, const Layer *layer, const Rows *rows, const Pool *pool, int64_t row, int64_t kv_head, real *query,
                        real *key, const real *value, real *out) {
    const int64_t dim = model->head_dim, group = model->heads / model->kv_heads, position = rows->prefix + rows->lengths[row];
    const int64_t place = ((row * model->kv_heads + kv_head) * rows->tokens + rows->lengths[row]) * dim;
    for (int64_t h = 0; h <= group; h++) {
        real *x = h < group ? query + h * dim : key;
        const Norm *norm = h < group ? &layer->of_queries : &layer->of_keys;
        if (norm->kind) normalise(norm, x, x, dim);
        if (model->cosines) rotate(x, model->cosines + position * dim, model->sines + position * dim, dim);
    }
    for (int64_t i = 0; i < dim; i++) {
        pool->keys[place + i] = narrow(key[i]);
        pool->values[place + i] = narrow(value[i]);
    }
    for (int64_t h = 0; h < group; h++) {
        for (int64_t i = 0; i < dim; i++) query[h * dim + i] *= (real)model->attention_scale;
        attend_query(rows, pool, model->kv_heads, dim, row, kv_head, layer->window, 0, query + h * dim, out + h * dim);
    }
}

typedef struct {
    real *state, *middle, *queries, *keys, *values, *mixed, *wide_gate, *wide_up, *averages, *private;
    Part parts[SPLITS * MOST_ROWS];
} Space;

static void soft_token(const Model *model, const stored *hidden, int64_t rows, Space *space, Thread *thread, real *mine) {
    const Head *head = &model->head;
    const int64_t n = model->hidden;
    for (int64_t i = 0; i < rows * n; i++) mine[i] = wide(hidden[i]);
    if (head->dense.weight) {
        product_of_thread(&head->dense, mine, space->middle, rows, thread);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t o = from(n, thread); o < to(n, thread); o++)
                space->middle[r * n + o] = activate(space->middle[r * n + o], head->activation);
        meet(thread);
        normalise_rows(&head->norm, space->middle, mine, rows, n);
    }
    for (int64_t s = thread->index; s < SPLITS; s += thread->count) mix_split(model, mine, rows, s, space->parts + s * rows);
    meet(thread);
    for (int64_t r = 0; r < rows; r++) join_parts(model, space->parts, rows, r, from(n, thread), to(n, thread), space->state + r * n);
}

static void place_tokens(const Model *model, const Rows *rows, Space *space, const Thread *thread) {
    const int64_t n = model->hidden;
    for (int64_t r = 0; r < rows->count; r++)
        for (int64_t i = from(n, thread); i < to(n, thread); i++) {
            if (model->positions) space->state[r * n + i] += wide(model->positions[(rows->prefix + rows->lengths[r]) * n + i]);
            if (model->token_type) space->state[r * n + i] += wide(model->token_type[i]);
        }
}

static void add(real *out, const real *other, int64_t rows, int64_t n, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = begin; i < end; i++) out[r * n + i] += other[r * n + i];
}

/* In: `state`. Out: `state`. A norm stands before each half; with `after_norm` (BERT) what it gives is also what the half is added to. */
static void layer_step(const Model *model, const Layer *layer, const Rows *rows, const Pool *pool, Space *space, Thread *thread, real *mine) {
    const int64_t n = model->hidden, count = rows->count, dim = model->head_dim, group = model->heads / model->kv_heads;
    const int64_t q = model->heads * dim, kv = model->kv_heads * dim, m = layer->up.outputs;
    normalise_rows(&layer->before_attention, space->state, mine, count, n);
    product_of_thread(&layer->query, mine, space->queries, count, thread);
    product_of_thread(&layer->key, mine, space->keys, count, thread);
    product_of_thread(&layer->value, mine, space->values, count, thread);
    meet(thread);
    for (int64_t item = thread->index; item < count * model->kv_heads; item += thread->count) {
        int64_t r = item / model->kv_heads, h = item % model->kv_heads;
        attend_head(model, layer, rows, pool, r, h, space->queries + r * q + h * group * dim, space->keys + r * kv + h * dim,
                    space->values + r * kv + h * dim, space->mixed + r * q + h * group * dim);
    }
    meet(thread);
    product_of_thread(&layer->output, space->mixed, space->middle, count, thread);
    add(space->middle, model->after_norm ? mine : space->state, count, n, from(n, thread), to(n, thread));
    meet(thread);
    normalise_rows(&layer->before_feed_forward, space->middle, mine, count, n);
    product_of_thread(&layer->up, mine, space->wide_up, count, thread);
    if (layer->gate.weight) product_of_thread(&layer->gate, mine, space->wide_gate, count, thread);
    for (int64_t r = 0; r < count; r++) {
        real *up = space->wide_up + r * m, *gate = space->wide_gate + r * m;
        if (layer->gate.weight)
            for (int64_t o = from(m, thread); o < to(m, thread); o++) up[o] *= activate(gate[o], layer->activation);
        else
            for (int64_t o = from(m, thread); o < to(m, thread); o++) up[o] = activate(up[o], layer->activation);
    }
    meet(thread);
    product_of_thread(&layer->down, space->wide_up, space->state, count, thread);
    add(space->state, model->after_norm ? mine : space->middle, count, n, from(n, thread), to(n, thread));
    meet(thread);
}

static int64_t share(real **next, int64_t length) { /* whole cache lines */
    *next += (length + 15) / 16 * 16;
    return (length + 15) / 16 * 16;
}

static int64_t lay_out(const Model *model, int64_t rows, int64_t threads, real *memory, Space *space) {
    const int64_t q = model->heads * model->head_dim, kv = model->kv_heads * model->head_dim;
    real *next = memory, **buffers[] = {&space->state, &space->middle, &space->queries, &space->keys, &space->values, &space->mixed,
                                        &space->wide_gate, &space->wide_up, &space->averages, &space->private};
    int64_t lengths[] = {model->hidden, model->hidden, q, kv, kv, q, model->widest, model->widest, SPLITS * model->hidden,
                         threads * model->hidden};
    int64_t total = 0;
    for (int i = 0; i < 10; i++) {
        *buffers[i] = next;
        total += share(&next, rows * lengths[i]);
    }
    return total;
}

/* How many bytes `step` needs in `memory`. */
int64_t space_of_step(const Model *model, int64_t rows, int64_t threads) {
    Space space;
    return lay_out(model, rows, threads, (real *)0, &space) * (int64_t)sizeof(real);
}

int64_t most_rows(void) { return MOST_ROWS; }

/* Bytes of each structure in the order of model.h, for whoever describes them in another language. */
void sizes(int64_t *bytes) {
    const int64_t found[] = {sizeof(Linear), sizeof(Norm), sizeof(Layer), sizeof(Head), sizeof(Model), sizeof(Pool), sizeof(Rows)};
    memcpy(bytes, found, sizeof found);
}

/* Add a soft token to every row and read it: `hidden` [rows, hidden] holds the newest states, and then the next ones. */
void step(const Model *model, const Rows *rows, stored *hidden, real *memory, int64_t threads) {
    const int64_t n = model->hidden, count = rows->count;
    Space space;
    lay_out(model, count, threads, memory, &space);
    for (int64_t i = 0; i < SPLITS * count; i++) space.parts[i].average = space.averages + i * n;
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)threads)
    {
        Thread thread = {&meeting, omp_get_thread_num(), omp_get_num_threads(), 0};
        real *mine = space.private + thread.index * count * n;
        soft_token(model, hidden, count, &space, &thread, mine);
        place_tokens(model, rows, &space, &thread);
        meet(&thread);
        for (int64_t l = 0; l < model->num_layers; l++)
            layer_step(model, &model->layers[l], rows, &rows->pools[l], &space, &thread, mine);
        for (int64_t r = thread.index; r < count; r += thread.count) {
            normalise(&model->final_norm, space.state + r * n, mine, n);
            for (int64_t i = 0; i < n; i++) hidden[r * n + i] = narrow(mine[i]);
        }
    }
}

/* Attention of one new position per row over the pool of one layer. `query` [rows, heads, head_dim] is scaled; `key` and `value` are
   [rows, kv_heads, head_dim] and are put into the pool first. */
void attend(const Rows *rows, const Pool *pool, const stored *query, const stored *key, const stored *value, stored *out, int64_t heads,
            int64_t kv_heads, int64_t dim, int64_t window, double softcap, int64_t threads) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t item = 0; item < rows->count * kv_heads; item++) {
        const int64_t row = item / kv_heads, kv_head = item % kv_heads, place = (item * rows->tokens + rows->lengths[row]) * dim;
        real wide_query[MOST_DIM], mixed[MOST_DIM];
        memcpy(pool->keys + place, key + item * dim, dim * sizeof(stored));
        memcpy(pool->values + place, value + item * dim, dim * sizeof(stored));
        for (int64_t h = item * group; h < (item + 1) * group; h++) {
            for (int64_t i = 0; i < dim; i++) wide_query[i] = wide(query[h * dim + i]);
            attend_query(rows, pool, kv_heads, dim, row, kv_head, window, (real)softcap, wide_query, mixed);
            for (int64_t i = 0; i < dim; i++) out[h * dim + i] = narrow(mixed[i]);
        }
    }
}
