/* Attention of single tokens over paged keys and values, which are read where they lie.

    out[h] = softmax(scale * q[h] . K[:, h / group]) @ V[:, h / group]

A task is one K/V head of one token (or MAX_GROUP of its query heads) and up to CHUNK of its positions, so that a long
context is shared out; the parts of one token are put together at the end. Where the chunks lie depends on the token
alone, so its result does not depend on what else is in the batch. The heads of a group share each read of K and V.

AMX does both products in tiles of 16 query heads, which may belong to neighbouring K/V heads: their columns are zero
where keys are another's. Weights are rounded to bfloat16 for it. */
#include "common.h"
#include "tiles.h"
#include <math.h>
#include <stdlib.h>

#define CHUNK 256
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
    int64_t tasks, tasks_per_chunk;
    int64_t bundle, splits, split; /* K/V heads taken together, tasks of them, and query heads of each but the last */
    float *parts; /* [tasks, split, head_dim + 2]: sums of values, largest score, sum of weights */
} Decode;

/* Where position `at` of an entry has its key; its value lies page_size token vectors further. */
INLINE const char *key_at(const Decode *p, int64_t entry, int64_t at, int64_t head, int64_t size) {
    int64_t page = p->table[p->table_rows[entry] * p->table_width + at / p->page_size];
    int64_t token = page * p->page_stride + p->layer_start + at % p->page_size;
    return (const char *)p->kv + (token * p->kv_heads + head) * p->head_dim * size;
}

/* Of a context's positions, in equal parts but for their rounding. */
INLINE int64_t num_chunks(const Decode *p, int64_t entry) { return (p->lengths[entry] + CHUNK - 1) / CHUNK; }
INLINE int64_t chunk_size(const Decode *p, int64_t entry) {
    int64_t chunks = num_chunks(p, entry);
    return (p->lengths[entry] + 32 * chunks - 1) / (32 * chunks) * 32;
}

/* What one task computes: query heads [first, first + heads) of an entry, and positions [begin, end) of it. */
typedef struct { int64_t entry, first, heads, begin, end; } Task;

INLINE Task task_at(const Decode *p, int64_t index) {
    int64_t entry = p->task_entry[index], size = chunk_size(p, entry), length = p->lengths[entry];
    int64_t begin = p->task_chunk[index] * size;
    int64_t place = index % (p->tasks_per_chunk), wide = p->bundle * (p->heads / p->kv_heads);
    int64_t first = place / p->splits * wide + place % p->splits * p->split, last = (place / p->splits + 1) * wide;
    last = last < p->heads ? last : p->heads;
    return (Task){entry, first, last - first < p->split ? last - first : p->split, begin,
                  begin + size < length ? begin + size : length};
}

/* The result of a head whose context is one chunk, else what `merge` needs. */
INLINE void finish(const Decode *p, const Task *t, int64_t index, int64_t slot, const vf *sums, float most,
                   float total) {
    int64_t dim = p->head_dim;
    if (p->lengths[t->entry] <= CHUNK) {
        int64_t at = (p->tokens[t->entry] * p->heads + t->first + slot) * dim;
        for (int64_t i = 0; i < dim; i += 16) store_as(p->out, at + i, sums[i / 16] * SPREAD(1 / total), p->dtype);
        return;
    }
    float *part = p->parts + (index * p->split + slot) * (dim + 2);
    memcpy(part, sums, dim * 4);
    part[dim] = most;
    part[dim + 1] = total;
}

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
    Task task = task_at(p, index);
    int64_t group = task.heads, head = task.first / (p->heads / p->kv_heads), size = dtype == BFLOAT16 ? 2 : 4;
    const char *q = (const char *)p->q + (p->tokens[task.entry] * p->q_stride + task.first * dim) * size;
    vf queries[MAX_GROUP][MAX_DIM / 16], sums[MAX_GROUP][MAX_DIM / 16], values[BLOCK][MAX_DIM / 16], scores[BLOCK];
    vf most = SPREAD(-INFINITY), total = {}, scale = SPREAD(p->scale);
    int64_t lanes = dim / 16;
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < lanes; i++) {
            queries[g][i] = load_as_f(q, g * dim + i * 16, dtype);
            sums[g][i] = (vf){};
        }
    for (int64_t at = task.begin; at < task.end; at += BLOCK) {
        int64_t count = task.end - at < BLOCK ? task.end - at : BLOCK;
        const char *keys[BLOCK];
        keys[0] = key_at(p, task.entry, at, head, size);
        for (int64_t t = 1; t < count; t++)
            keys[t] = (at + t) % p->page_size ? keys[t - 1] + p->kv_heads * dim * size
                                              : key_at(p, task.entry, at + t, head, size);
        for (int64_t t = 0; t < count; t++) {
            float dots[MAX_GROUP] = {0};
            for (int64_t g = 0; g < group; g++) {
                vf dot = {};
                for (int64_t i = 0; i < lanes; i++) dot += queries[g][i] * load_as_f(keys[t], i * 16, dtype);
                dots[g] = sum_f(dot);
            }
            scores[t] = load_f(dots);
        }
        if (at + BLOCK < task.end) prefetch(p, task.entry, at + BLOCK, head, dim * size);
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
    for (int64_t g = 0; g < group; g++) finish(p, &task, index, g, sums[g], most[g], total[g]);
}

#ifdef __AMX_BF16__
/* rows: of tiles 0 to 4, sums and their first operand; the others have 16. */
INLINE void configure(int rows) { configure_tiles((const int[8]){rows, rows, rows, rows, rows, 16, 16, 16}); }

/* Keys and values that shall be in the second cache when the next task wants them, in a block at a time. A burst of
such requests holds up all that follows, so they are made one position's after the other between other work. */
typedef struct { const char *const *keys; int64_t position, left, stride, wide, behind; } Ahead;

INLINE void fetch(Ahead *a) {
    if (a->left <= 0) return;
    const char *from = *a->keys + a->position * a->stride;
    for (int64_t i = 0; i < a->wide; i += 64) {
        _mm_prefetch(from + i, _MM_HINT_T1);
        _mm_prefetch(from + a->behind + i, _MM_HINT_T1);
    }
    a->left--;
    if (++a->position == BLOCK) a->position = 0, a->keys++;
}

/* The weights of all positions, exp(score - largest), rounded to bfloat16, as AMX wants its first operand: for each
32 positions [16 heads][32]. Returns their sums and the largest scores by head. */
INLINE vf weigh(const vf *scores, int64_t count, float scale, vu *weights, vf *most, Ahead *ahead) {
    vf largest = SPREAD(-INFINITY), even = {}, odd = {};
    for (int64_t t = 0; t < count; t++) largest = max_v(largest, scores[t]);
    *most = largest * SPREAD(scale);
    vf factor = SPREAD(scale * 1.44269504f), offset = largest * factor;
    for (int64_t t = 0; t < count; t += 32, weights += 16) {
        vu pairs[16];
        for (int64_t i = 0; i < 16; i++) {
            int64_t at = t + 2 * i;
            if (i % 4 == 0) fetch(ahead);
            vf a = at < count ? exp2_v(scores[at] * factor - offset) : (vf){};
            vf b = at + 1 < count ? exp2_v(scores[at + 1] * factor - offset) : (vf){};
            even += a, odd += b;
            pairs[i] = pair_bf16(a, b);
        }
        transpose(pairs, weights);
    }
    return even + odd;
}

/* Scores of up to 2 * BLOCK positions from keys[0] and keys[1] on: two sums at once hide how long each takes. */
INLINE void amx_scores(const char *const *keys, int64_t stride, int64_t dim, int64_t kv_heads,
                       const vu queries[][MAX_DIM / 2], vf *scores, Ahead *ahead) {
    _tile_zero(0); _tile_zero(1);
    for (int64_t j = 0; j < kv_heads; j++)
        for (int64_t i = 0; i < dim; i += 32) {
            _tile_loadd(4, queries[j] + i / 2, 64);
            _tile_loadd(5, keys[0] + (j * dim + i) * 2, stride); _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, keys[1] + (j * dim + i) * 2, stride); _tile_dpbf16ps(1, 6, 4);
            fetch(ahead); fetch(ahead); fetch(ahead);
        }
    _tile_stored(0, scores, 64); _tile_stored(1, scores + BLOCK, 64);
}

/* to[head][i] = weights @ values over all positions, for up to 64 elements of a K/V head from `values` on, where the
first page has them. */
INLINE void amx_values(const char *const *keys, int64_t behind, int64_t stride, int64_t tiles, int64_t count,
                       const vu *weights, vf *to, Ahead *ahead) {
    static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i first = _mm512_loadu_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __m512i values[4][16]; /* [elements of 16][pairs of positions][16][2] */
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t t = 0; t < count; t += 32, weights += 16) {
        for (int64_t i = 0; i < 16; i++) {
            if (i % 2) fetch(ahead);
            int64_t at = t + 2 * i;
            const char *from = keys[at / BLOCK] + behind + at % BLOCK * stride;
            for (int64_t n = 0; n < tiles; n += 2) {
                __m512i zero = _mm512_setzero_si512(); /* beyond the end there may be anything, NaN as well */
                __m512i a = at < count ? _mm512_loadu_si512(from + n * 32) : zero;
                __m512i b = at + 1 < count ? _mm512_loadu_si512(from + stride + n * 32) : zero;
                values[n][i] = _mm512_permutex2var_epi16(a, first, b);
                values[n + 1][i] = _mm512_permutex2var_epi16(a, second, b);
            }
        }
        _tile_loadd(4, weights, 64);
        _tile_loadd(5, values[0], 64); _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values[1], 64); _tile_dpbf16ps(1, 4, 6);
        if (tiles == 2) continue;
        _tile_loadd(5, values[2], 64); _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, values[3], 64); _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, to, MAX_DIM * 4); _tile_stored(1, to + 1, MAX_DIM * 4);
    if (tiles == 2) return;
    _tile_stored(2, to + 2, MAX_DIM * 4); _tile_stored(3, to + 3, MAX_DIM * 4);
}

/* Where the blocks of a task have their keys. Returns how many. */
INLINE int64_t find_keys(const Decode *p, const Task *t, const char **keys) {
    int64_t head = t->first / (p->heads / p->kv_heads), blocks = 0;
    for (int64_t at = t->begin; at < t->end; at += BLOCK) keys[blocks++] = key_at(p, t->entry, at, head, 2);
    return blocks;
}

INLINE void amx_decode(const Decode *p, int64_t index, int64_t dim) {
    Task task = task_at(p, index);
    int64_t group = p->heads / p->kv_heads, head = task.first / group, count = task.end - task.begin;
    int64_t kv_heads = (task.first + task.heads - 1) / group - head + 1, stride = p->kv_heads * dim * 2;
    int64_t wide = kv_heads * dim * 2, behind = p->page_size * stride, each = task.heads / kv_heads;
    const uint16_t *q = (const uint16_t *)p->q + p->tokens[task.entry] * p->q_stride + task.first * dim;
    vu queries[MAX_GROUP][MAX_DIM / 2], rows[16]; /* as AMX wants its second operand: [head_dim / 2][16 heads][2] */
    const char *keys[CHUNK / BLOCK + 1], *next_keys[CHUNK / BLOCK];
    vf scores[CHUNK + BLOCK], most, sums[MAX_GROUP][MAX_DIM / 16];
    vu weights[CHUNK / 2];
    int64_t blocks = find_keys(p, &task, keys), next = index + crane_threads();
    keys[blocks] = keys[0]; /* of which nothing counts */
    Ahead ahead = {keys, 0, index < crane_threads() ? count : 0, stride, wide, behind};
    while (ahead.left) fetch(&ahead); /* of the first tasks nothing was fetched */
    if (next < p->tasks) {
        Task then = task_at(p, next);
        find_keys(p, &then, next_keys);
        ahead = (Ahead){next_keys, 0, then.end - then.begin, stride, wide, behind};
    }
    for (int64_t j = 0; j < kv_heads; j++)
        for (int64_t i = 0; i < dim; i += 32) {
            for (int64_t h = 0; h < 16; h++)
                rows[h] = h < task.heads && h / each == j ? load_u(q + h * dim + i) : (vu){};
            transpose(rows, queries[j] + i / 2);
        }
    configure(16);
    for (int64_t b = 0; b < blocks; b += 2)
        amx_scores(keys + b, stride, dim, kv_heads, queries, scores + b * BLOCK, &ahead);
    vf total = weigh(scores, count, p->scale, weights, &most, &ahead);
    configure(each);
    for (int64_t j = 0; j < kv_heads; j++)
        for (int64_t i = 0; i < dim; i += 64)
            amx_values(keys, behind + (j * dim + i) * 2, stride, dim - i < 64 ? 2 : 4, count, weights + j * each,
                       &sums[j * each][i / 16], &ahead);
    _tile_release();
    while (ahead.left > 0) fetch(&ahead);
    for (int64_t h = 0; h < task.heads; h++) finish(p, &task, index, h, sums[h], most[h], total[h]);
}
#endif

static void decode_task(void *argument, int64_t index) {
    const Decode *p = argument;
#ifdef __AMX_BF16__
    if (p->use_amx && p->head_dim == 64) amx_decode(p, index, 64);
    else if (p->use_amx && p->head_dim == 128) amx_decode(p, index, 128);
    else if (p->use_amx) amx_decode(p, index, p->head_dim);
    else
#endif
    if (p->dtype == BFLOAT16 && p->head_dim == 64) decode(p, index, 64, BFLOAT16);
    else if (p->dtype == BFLOAT16 && p->head_dim == 128) decode(p, index, 128, BFLOAT16);
    else decode(p, index, p->head_dim, p->dtype);
}

/* Puts the parts of one token together, whose first task is this one. */
static void merge(const Decode *p, int64_t entry, int64_t task, int64_t chunks) {
    int64_t dim = p->head_dim, wide = p->bundle * (p->heads / p->kv_heads), width = dim + 2;
    int64_t step = p->tasks_per_chunk * p->split * width;
    for (int64_t h = 0; h < p->heads; h++) {
        int64_t first = task + h / wide * p->splits + h % wide / p->split;
        const float *part = p->parts + (first * p->split + h % wide % p->split) * width;
        float most = -INFINITY, total = 0, weights[chunks];
        for (int64_t c = 0; c < chunks; c++) most = fmaxf(most, part[c * step + dim]);
        for (int64_t c = 0; c < chunks; c++) {
            weights[c] = expf(part[c * step + dim] - most);
            total += weights[c] * part[c * step + dim + 1];
        }
        for (int64_t i = 0; i < dim; i += 16) {
            vf sum = {};
            for (int64_t c = 0; c < chunks; c++) sum += load_f(part + c * step + i) * SPREAD(weights[c]);
            store_as(p->out, p->tokens[entry] * p->heads * dim + h * dim + i, sum * SPREAD(1 / total), p->dtype);
        }
    }
}

/* Divides the work and does it; lengths and the table are read now. */
static int32_t run_decode(const void *argument) {
    Decode p = *(const Decode *)argument;
    int64_t group = p.heads / p.kv_heads, chunks = 0;
    for (int64_t i = 0; i < p.count; i++) chunks += num_chunks(&p, i);
    p.bundle = p.use_amx && group < MAX_GROUP ? MAX_GROUP / group : 1;
    p.split = p.bundle * group < MAX_GROUP ? p.bundle * group : MAX_GROUP;
    p.splits = (p.bundle * group + p.split - 1) / p.split;
    p.tasks_per_chunk = (p.kv_heads + p.bundle - 1) / p.bundle * p.splits;
    int64_t tasks = p.tasks = chunks * p.tasks_per_chunk;
    char *room = malloc(tasks * (8 + p.split * (p.head_dim + 2) * 4) + 64);
    if (!room) return 1;
    int32_t *entry = (int32_t *)room, *chunk = entry + tasks, *at = entry;
    for (int64_t i = 0; i < p.count; i++)
        for (int64_t c = 0; c < num_chunks(&p, i); c++)
            for (int64_t h = 0; h < p.tasks_per_chunk; h++, at++) *at = (int32_t)i, at[tasks] = (int32_t)c;
    p.task_entry = entry, p.task_chunk = chunk, p.parts = (float *)(room + (tasks * 8 + 63) / 64 * 64);
    crane_parallel(decode_task, &p, tasks);
    for (int64_t i = 0, task = 0; i < p.count; i++) {
        if (num_chunks(&p, i) > 1) merge(&p, i, task, num_chunks(&p, i));
        task += num_chunks(&p, i) * p.tasks_per_chunk;
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
    Decode p = {.q = q, .out = out, .kv = kv, .tokens = tokens, .table_rows = table_rows, .lengths = lengths,
                .table = table, .count = count, .table_width = table_width, .q_stride = q_stride, .heads = heads,
                .kv_heads = kv_heads, .head_dim = head_dim, .page_size = page_size,
                .page_stride = 2 * num_layers * page_size, .layer_start = 2 * layer * page_size, .scale = scale,
                .dtype = dtype, .use_amx = dtype == BFLOAT16 && head_dim % 32 == 0 && page_size % BLOCK == 0 &&
                                           crane_has_amx()};
    return crane_call("attention", run_decode, &p, sizeof p);
}
