/* Attention of single tokens over paged keys and values, which are read where they lie.

    out[h] = softmax(scale * q[h] . K[:, h / group]) @ V[:, h / group]

A task is one K/V head of one token (or MAX_GROUP of its query heads) and up to CHUNK of its positions, so that a long context is shared out; the
parts of one token are put together at the end. Where the chunks lie depends on the token alone, so its result does
not depend on what else is in the batch. The heads of a group share each read of K and V. */
#include "common.h"
#include <math.h>
#include <stdlib.h>

#define CHUNK 512
#define BLOCK 16    /* positions taken together */
#define MAX_DIM 256
#define MAX_GROUP 16

typedef struct {
    const void *q;
    void *out;
    const void *kv;
    const int64_t *tokens, *table_rows, *lengths; /* [count]: place in q, row of table, positions to attend to */
    const int64_t *table;
    int64_t count, table_width, q_stride, heads, kv_heads, head_dim, page_size, page_stride, layer_start;
    float scale;
    int32_t dtype, use_amx;
    const int32_t *task_entry, *task_chunk;
    int64_t splits, split; /* tasks of one K/V head, and query heads of each but the last */
    float *parts; /* [tasks, split, head_dim + 2]: sums of values, largest score, sum of weights */
} Decode;

/* Where position `at` of an entry has its key; its value lies page_size token vectors further. */
INLINE const char *key_at(const Decode *p, int64_t entry, int64_t at, int64_t head, int64_t size) {
    int64_t page = p->table[p->table_rows[entry] * p->table_width + at / p->page_size];
    int64_t token = page * p->page_stride + p->layer_start + at % p->page_size;
    return (const char *)p->kv + (token * p->kv_heads + head) * p->head_dim * size;
}

#ifdef __AMX_BF16__
typedef struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TileConfig;

static void configure(void) {
    TileConfig c = {.palette = 1};
    for (int i = 0; i < 3; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    __asm__ volatile("" : : "r"(&c) : "memory");
    _tile_loadconfig(&c);
}

/* q of a group as AMX wants its second operand: [head_dim / 2][16 heads][2] */
INLINE void spread_q(const uint16_t *q, int64_t group, int64_t dim, uint16_t *to) {
    memset(to, 0, dim * 32);
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < dim; i++) to[i / 2 * 32 + g * 2 + i % 2] = q[g * dim + i];
}

/* scores[position][head] of 16 keys, stride bytes apart */
INLINE void amx_scores(const char *keys, int64_t stride, const uint16_t *q, int64_t dim, vf *scores) {
    _tile_zero(0);
    for (int64_t i = 0; i < dim; i += 32) {
        _tile_loadd(1, keys + i * 2, stride);
        _tile_loadd(2, q + i * 16, 64);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, scores, 64);
}
#endif

/* sums = keep * sums + scores^T @ values, for one head: registers hold 4 * 16 elements of it at a time */
INLINE void add_values(vf *sums, float keep, const vf *scores, int64_t g, const vf values[][MAX_DIM / 16], int64_t count,
                       int64_t lanes) {
    int64_t i = 0;
    for (; i + 4 <= lanes; i += 4) {
        vf k = SPREAD(keep), a = sums[i] * k, b = sums[i + 1] * k, c = sums[i + 2] * k, d = sums[i + 3] * k;
        for (int64_t t = 0; t < count; t++) {
            vf score = SPREAD(((const float *)(scores + t))[g]);
            a += values[t][i] * score, b += values[t][i + 1] * score;
            c += values[t][i + 2] * score, d += values[t][i + 3] * score;
        }
        sums[i] = a, sums[i + 1] = b, sums[i + 2] = c, sums[i + 3] = d;
    }
    for (; i < lanes; i++) {
        vf a = sums[i] * SPREAD(keep);
        for (int64_t t = 0; t < count; t++) a += values[t][i] * SPREAD(((const float *)(scores + t))[g]);
        sums[i] = a;
    }
}

/* Keys and values of the next BLOCK positions: pages lie anywhere, so the processor cannot guess them. */
INLINE void prefetch(const Decode *p, int64_t entry, int64_t at, int64_t head, int64_t bytes) {
    int64_t whole = p->page_size % BLOCK ? 1 : BLOCK, width = p->kv_heads * bytes;
    const char *keys = key_at(p, entry, at, head, bytes / p->head_dim), *values = keys + p->page_size * width;
    for (int64_t t = 0; t < whole; t++)
        for (int64_t i = 0; i < bytes; i += 64) {
            _mm_prefetch(keys + t * width + i, _MM_HINT_T0);
            _mm_prefetch(values + t * width + i, _MM_HINT_T0);
        }
}

/* dim and dtype are constants for the usual ones */
INLINE void decode(const Decode *p, int64_t index, int64_t dim, int dtype) {
    int64_t entry = p->task_entry[index], head = index / p->splits % p->kv_heads;
    int64_t first = index % p->splits * p->split, left = p->heads / p->kv_heads - first;
    int64_t group = left < p->split ? left : p->split, size = dtype == BFLOAT16 ? 2 : 4;
    int64_t begin = (int64_t)p->task_chunk[index] * CHUNK, length = p->lengths[entry];
    int64_t end = begin + CHUNK < length ? begin + CHUNK : length;
    const char *q = (const char *)p->q + (p->tokens[entry] * p->q_stride + (p->heads / p->kv_heads * head + first) * dim) * size;
    vf queries[MAX_GROUP][MAX_DIM / 16], sums[MAX_GROUP][MAX_DIM / 16], values[BLOCK][MAX_DIM / 16], scores[BLOCK];
    vf most = SPREAD(-INFINITY), total = {}, scale = SPREAD(p->scale);
    int64_t lanes = dim / 16;
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < lanes; i++) {
            queries[g][i] = load_as_f(q, g * dim + i * 16, dtype);
            sums[g][i] = (vf){};
        }
#ifdef __AMX_BF16__
    uint16_t spread[MAX_DIM * 16] __attribute__((aligned(64)));
    int amx = p->use_amx && p->page_size % BLOCK == 0;
    if (amx) {
        spread_q((const uint16_t *)q, group, dim, spread);
        configure();
    }
#endif
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        const char *keys[BLOCK];
        keys[0] = key_at(p, entry, at, head, size);
        for (int64_t t = 1; t < count; t++)
            keys[t] = (at + t) % p->page_size ? keys[t - 1] + p->kv_heads * dim * size : key_at(p, entry, at + t, head, size);
#ifdef __AMX_BF16__
        if (amx) amx_scores(keys[0], p->kv_heads * dim * size, spread, dim, scores);
        else
#endif
            for (int64_t t = 0; t < count; t++) {
                float dots[MAX_GROUP] = {0};
                for (int64_t g = 0; g < group; g++) {
                    vf dot = {};
                    for (int64_t i = 0; i < lanes; i++) dot += queries[g][i] * load_as_f(keys[t], i * 16, dtype);
                    dots[g] = sum_f(dot);
                }
                scores[t] = load_f(dots);
            }
        if (at + BLOCK < end) prefetch(p, entry, at + BLOCK, head, dim * size);
        vf now = most;
        for (int64_t t = 0; t < count; t++) now = max_v(now, scores[t] * scale);
        vf keep = exp_v(most - now);
        total *= keep;
        for (int64_t t = 0; t < count; t++) {
            scores[t] = exp_v(scores[t] * scale - now);
            total += scores[t];
            const char *value = keys[t] + p->page_size * p->kv_heads * dim * size;
            for (int64_t i = 0; i < lanes; i++) values[t][i] = load_as_f(value, i * 16, dtype);
        }
        most = now;
        for (int64_t g = 0; g < group; g++) add_values(sums[g], keep[g], scores, g, values, count, lanes);
    }
#ifdef __AMX_BF16__
    if (amx) _tile_release();
#endif
    float *part = p->parts + index * p->split * (dim + 2);
    for (int64_t g = 0; g < group; g++, part += dim + 2) {
        memcpy(part, sums[g], dim * 4);
        part[dim] = most[g];
        part[dim + 1] = total[g];
    }
}

static void decode_task(void *argument, int64_t index) {
    const Decode *p = argument;
    if (p->dtype == BFLOAT16 && p->head_dim == 64) decode(p, index, 64, BFLOAT16);
    else if (p->dtype == BFLOAT16 && p->head_dim == 128) decode(p, index, 128, BFLOAT16);
    else decode(p, index, p->head_dim, p->dtype);
}

/* Puts the parts of one token together, whose first task is this one. */
static void merge(const Decode *p, int64_t entry, int64_t task, int64_t chunks) {
    int64_t dim = p->head_dim, group = p->heads / p->kv_heads, width = dim + 2;
    for (int64_t h = 0; h < p->heads; h++) {
        int64_t first = task + h / group * p->splits + h % group / p->split;
        const float *part = p->parts + (first * p->split + h % group % p->split) * width;
        int64_t step = p->kv_heads * p->splits * p->split * width;
        float most = -INFINITY, total = 0, weights[chunks];
        for (int64_t c = 0; c < chunks; c++) most = fmaxf(most, part[c * step + dim]);
        for (int64_t c = 0; c < chunks; c++) {
            weights[c] = expf(part[c * step + dim] - most);
            total += weights[c] * part[c * step + dim + 1];
        }
        for (int64_t i = 0; i < dim; i += 16) {
            vf sum = {};
            for (int64_t c = 0; c < chunks; c++) sum += load_f(part + c * step + i) * SPREAD(weights[c]);
            store_as(p->out, p->tokens[entry] * p->heads * dim + h * dim + i, sum / SPREAD(total), p->dtype);
        }
    }
}

/* Divides the work and does it; lengths and the table are read now. */
static int32_t run_decode(const void *argument) {
    Decode p = *(const Decode *)argument;
    int64_t tasks = 0, heads = p.kv_heads * p.splits;
    for (int64_t i = 0; i < p.count; i++) tasks += (p.lengths[i] + CHUNK - 1) / CHUNK * heads;
    char *room = malloc(tasks * (8 + p.split * (p.head_dim + 2) * 4) + 64);
    if (!room) return 1;
    int32_t *entry = (int32_t *)room, *chunk = entry + tasks, *at = entry;
    for (int64_t i = 0; i < p.count; i++)
        for (int64_t c = 0; c < (p.lengths[i] + CHUNK - 1) / CHUNK; c++)
            for (int64_t h = 0; h < heads; h++, at++) *at = (int32_t)i, at[tasks] = (int32_t)c;
    p.task_entry = entry, p.task_chunk = chunk, p.parts = (float *)(room + (tasks * 8 + 63) / 64 * 64);
    crane_parallel(decode_task, &p, tasks);
    for (int64_t i = 0, task = 0; i < p.count; i++) {
        int64_t chunks = (p.lengths[i] + CHUNK - 1) / CHUNK;
        merge(&p, i, task, chunks);
        task += chunks * heads;
    }
    free(room);
    return 0;
}

/* q: tokens q_stride elements apart, [heads, head_dim] each. out: [tokens, heads, head_dim]. kv: see kernels/pages.py.
layer: whose keys and values to read. Returns 0, or 1 when there is no memory. */
int32_t crane_decode(const void *q, void *out, const void *kv, const int64_t *tokens, const int64_t *table_rows,
                     const int64_t *lengths, const int64_t *table, int64_t count, int64_t table_width,
                     int64_t q_stride, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t page_size,
                     int64_t num_layers, int64_t layer, float scale, int32_t dtype) {
    int64_t group = heads / kv_heads, split = group < MAX_GROUP ? group : MAX_GROUP;
    Decode p = {.q = q, .out = out, .kv = kv, .tokens = tokens, .table_rows = table_rows, .lengths = lengths,
                .table = table, .count = count, .table_width = table_width, .q_stride = q_stride, .heads = heads,
                .kv_heads = kv_heads, .head_dim = head_dim, .page_size = page_size,
                .page_stride = 2 * num_layers * page_size, .layer_start = 2 * layer * page_size, .scale = scale,
                .dtype = dtype, .use_amx = dtype == BFLOAT16 && head_dim % 32 == 0 && crane_has_amx(),
                .split = split, .splits = (group + split - 1) / split};
    return crane_call("attention", run_decode, &p, sizeof p);
}
