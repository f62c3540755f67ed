/* Attention of many tokens of a sequence over paged keys and values, which are read where they lie, on AMX.

    out[t, h] = softmax(scale * q[t, h] . K[0..p(t), h / group]) @ V[0..p(t), h / group]

The query heads of one K/V head are rows: row r is head r % group of token r / group. A task is up to MOST_ROWS of them;
it takes the positions a block at a time, and 32 rows, two tiles. Both products are computed with rows as columns,
K @ q^T and V^T @ weights, so that a lane of each vector between them is a row, and nothing is summed across lanes:
keys are used as they lie, and only values are transposed, once for all rows of a task.

Blocks start at multiples of BLOCK positions, a row sees no lane but its own, and a position it may not see adds an
exact zero: its result has the same bits whatever else is computed with it. Weights are rounded to bfloat16, sums are
float32. */
#include "tiles.h"
#include <stdlib.h>

typedef struct { int64_t start, count, table_row, length; } Row; /* its new tokens in q, how many, and all it has */
typedef struct { int32_t entry, head, first, count; int64_t work; } Task; /* rows [first, first + count) */

typedef struct {
    const uint16_t *q;
    uint16_t *out;
    const char *kv;
    const Row *rows;
    const int64_t *table;
    int64_t num_rows, table_width, q_stride, heads, kv_heads, head_dim, page_size, page_stride, layer_start;
    float scale;
    const Task *tasks;
} Prefill;

#ifdef HAVE_AMX
#define BLOCK 256 /* positions */
#define MOST_ROWS 256
#define MAX_DIM 256

/* What a thread computes a task in; rows are counted by tiles. */
typedef struct {
    vf scores[2][BLOCK];             /* by position */
    vu weights[2][BLOCK / 2];        /* [positions / 2][16 rows][2] */
    vu values[BLOCK / 32 * MAX_DIM]; /* [positions / 32][head_dim][32] */
    vi visible[MOST_ROWS / 16];      /* how many positions each row sees */
    vf most[MOST_ROWS / 16], total[MOST_ROWS / 16]; /* largest score before scaling, sum of weights */
    vf sums[MOST_ROWS / 16 * MAX_DIM];              /* [tiles][head_dim][16 rows] */
    vu queries[MOST_ROWS / 16 * MAX_DIM / 2];       /* [tiles][head_dim / 2][16 rows][2] */
} Room;

/* How many positions a row sees. */
INLINE int64_t seen(const Prefill *p, const Task *t, int64_t row) {
    const Row *r = p->rows + t->entry;
    return r->length - r->count + row / (p->heads / p->kv_heads) + 1;
}

/* Where a row is in tensors whose tokens are `stride` elements apart. */
INLINE int64_t element(const Prefill *p, const Task *t, int64_t row, int64_t stride) {
    int64_t group = p->heads / p->kv_heads;
    return (p->rows[t->entry].start + row / group) * stride + (t->head * group + row % group) * p->head_dim;
}

/* Where the keys of a block lie, 16 positions at a time; beyond the end those of the first, of which nothing is used. */
INLINE void find_keys(const Prefill *p, const Task *t, int64_t begin, int64_t end, const char **keys) {
    const int64_t *pages = p->table + p->rows[t->entry].table_row * p->table_width;
    for (int64_t n = 0; n < BLOCK / 16; n++) {
        int64_t at = begin + 16 * n < end ? begin + 16 * n : begin;
        int64_t token = pages[at / p->page_size] * p->page_stride + p->layer_start + at % p->page_size;
        keys[n] = p->kv + (token * p->kv_heads + t->head) * p->head_dim * 2;
    }
}

/* The queries of 16 rows as the second operand of a product. */
INLINE void turn_queries(const Prefill *p, const Task *t, int64_t tile, int64_t dim, vu *queries) {
    vu rows[16];
    for (int64_t i = 0; i < dim; i += 32) {
        for (int64_t r = 0; r < 16; r++) {
            int64_t row = tile * 16 + r;
            rows[r] = row < t->count ? load_u(p->q + element(p, t, t->first + row, p->q_stride) + i) : (vu){};
        }
        transpose(rows, queries + i / 2);
    }
}

/* The values of a block as the first operand, from where its keys lie, 16 positions at a time. */
INLINE void turn_values(const Prefill *p, const char *const *keys, int64_t count, int64_t dim, vu *values) {
    static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i first = _mm512_loadu_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int64_t stride = p->kv_heads * dim * 2, behind = p->page_size * stride;
    for (int64_t t = 0; t < count; t += 32)
        for (int64_t i = 0; i < dim; i += 32) {
            vu pairs[2][16];
            for (int64_t n = 0; n < 16; n++) {
                int64_t at = t + 2 * n;
                const char *from = keys[at / 16] + behind + at % 16 * stride + i * 2;
                __m512i zero = _mm512_setzero_si512(); /* beyond the end there may be anything, NaN as well */
                __m512i a = at < count ? _mm512_loadu_si512(from) : zero;
                __m512i b = at + 1 < count ? _mm512_loadu_si512(from + stride) : zero;
                pairs[0][n] = (vu)_mm512_permutex2var_epi16(a, first, b);
                pairs[1][n] = (vu)_mm512_permutex2var_epi16(a, second, b);
            }
            transpose(pairs[0], values + t / 32 * dim + i);
            transpose(pairs[1], values + t / 32 * dim + i + 16);
        }
}

/* Scores of two tiles of rows and count positions, a multiple of 32; those a row may not see mean nothing. */
INLINE void score(const char *const *keys, int64_t stride, int64_t count, int64_t dim, const vu *queries,
                  vf scores[][BLOCK]) {
    for (int64_t t = 0; t < count; t += 32, keys += 2) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int64_t i = 0; i < dim; i += 32) {
            _tile_loadd(4, queries + i / 2, 64);
            _tile_loadd(5, queries + (dim + i) / 2, 64);
            _tile_loadd(6, keys[0] + i * 2, stride); _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5);
            _tile_loadd(7, keys[1] + i * 2, stride); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5);
        }
        _tile_stored(0, scores[0] + t, 64); _tile_stored(1, scores[1] + t, 64);
        _tile_stored(2, scores[0] + t + 16, 64); _tile_stored(3, scores[1] + t + 16, 64);
    }
}

/* Turns scores of count positions, a multiple of 32, into weights 2^(factor * (score - largest)), and makes the sums of
earlier ones relative to the same largest score. visible: how many of these positions each row sees. */
INLINE void weigh(vf *scores, int64_t count, vi visible, float factor, vu *weights, vf *most, vf *total, vf *sums,
                  int64_t dim) {
    for (int64_t t = visible[0] > 0 ? visible[0] : 0; t < count; t++) { /* the first row sees least */
        vi hidden = SPREAD_I((int32_t)t) >= visible;
        scores[t] = (vf)(((vi)scores[t] & ~hidden) | ((vi)SPREAD(-__builtin_inff()) & hidden));
    }
    vf largest[4] = {*most, *most, *most, *most};
    for (int64_t t = 0; t < count; t += 4)
        for (int64_t i = 0; i < 4; i++) largest[i] = max_v(largest[i], scores[t + i]);
    vf now = max_v(max_v(largest[0], largest[1]), max_v(largest[2], largest[3]));
    vf scale = SPREAD(factor), offset = now * scale, keep = exp2_v((*most - now) * scale), even = {}, odd = {};
    for (int64_t t = 0; t < count; t += 2) {
        vf a = exp2_v(scores[t] * scale - offset), b = exp2_v(scores[t + 1] * scale - offset);
        even += a, odd += b;
        weights[t / 2] = pair_bf16(a, b);
    }
    *total = *total * keep + (even + odd);
    if (_mm512_cmpneq_ps_mask((__m512)now, (__m512)*most))
        for (int64_t i = 0; i < dim; i++) sums[i] *= keep;
    *most = now;
}

/* sums += V^T @ weights, for two tiles of rows; count: positions, a multiple of 32. */
INLINE void add_values(const vu *values, vu weights[][BLOCK / 2], int64_t count, int64_t dim, vf *sums) {
    __asm__ volatile("" : : : "memory"); /* the intrinsics do not admit to reading what was just written */
    for (int64_t i = 0; i < dim; i += 32, sums += 32) {
        _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 16, 64);
        _tile_loadd(2, sums + dim, 64); _tile_loadd(3, sums + dim + 16, 64);
        for (int64_t t = 0; t < count; t += 32) {
            const vu *from = values + t / 32 * dim + i;
            _tile_loadd(4, weights[0] + t / 2, 64);
            _tile_loadd(5, weights[1] + t / 2, 64);
            _tile_loadd(6, from, 64); _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(2, 6, 5);
            _tile_loadd(7, from + 16, 64); _tile_dpbf16ps(1, 7, 4); _tile_dpbf16ps(3, 7, 5);
        }
        _tile_stored(0, sums, 64); _tile_stored(1, sums + 16, 64);
        _tile_stored(2, sums + dim, 64); _tile_stored(3, sums + dim + 16, 64);
    }
}

INLINE void store_tile(const Prefill *p, const Task *t, int64_t tile, int64_t dim, const vf *sums, vf total) {
    vf scaled[16], rows[16];
    for (int64_t i = 0; i < dim; i += 16) {
        for (int64_t n = 0; n < 16; n++) scaled[n] = sums[i + n] / total;
        transpose((const vu *)scaled, (vu *)rows);
        for (int64_t r = 0; r < min(t->count - tile * 16, 16); r++)
            store_h(p->out + element(p, t, t->first + tile * 16 + r, p->heads * dim) + i, to_bf16(rows[r]));
    }
}

/* dim is a constant for the usual ones */
INLINE void prefill(const Prefill *p, const Task *t, int64_t dim) {
    Room *room = crane_scratch(sizeof(Room));
    int64_t tiles = (t->count + 31) / 32 * 2, stride = p->kv_heads * dim * 2;
    int64_t end = seen(p, t, t->first + t->count - 1);
    for (int64_t i = 0; i < tiles; i++) {
        turn_queries(p, t, i, dim, room->queries + i * dim / 2);
        for (int64_t r = 0; r < 16; r++)
            room->visible[i][r] = (int32_t)seen(p, t, t->first + min(16 * i + r, t->count - 1));
        room->most[i] = SPREAD(-1e30f), room->total[i] = (vf){};
        memset(room->sums + i * dim, 0, dim * 64);
    }
    configure_tiles((const int[8]){16, 16, 16, 16, 16, 16, 16, 16});
    for (int64_t begin = 0; begin < end; begin += BLOCK) {
        const char *keys[BLOCK / 16];
        find_keys(p, t, begin, end, keys);
        turn_values(p, keys, min(BLOCK, end - begin), dim, room->values);
        for (int64_t i = 0; i < tiles; i += 2) {
            int64_t count = (min(room->visible[i + 1][15] - begin, BLOCK) + 31) / 32 * 32;
            if (count <= 0) continue;
            score(keys, stride, count, dim, room->queries + i * dim / 2, room->scores);
            for (int64_t j = 0; j < 2; j++)
                weigh(room->scores[j], count, room->visible[i + j] - SPREAD_I((int32_t)begin), p->scale * 1.44269504f,
                      room->weights[j], &room->most[i + j], &room->total[i + j], room->sums + (i + j) * dim, dim);
            add_values(room->values, room->weights, count, dim, room->sums + i * dim);
        }
    }
    _tile_release();
    for (int64_t i = 0; i < tiles; i++) store_tile(p, t, i, dim, room->sums + i * dim, room->total[i]);
}

static void prefill_task(void *argument, int64_t index) {
    const Prefill *p = argument;
    if (p->head_dim == 64) prefill(p, p->tasks + index, 64);
    else if (p->head_dim == 128) prefill(p, p->tasks + index, 128);
    else prefill(p, p->tasks + index, p->head_dim);
}

static int by_work(const void *a, const void *b) {
    int64_t one = ((const Task *)a)->work, other = ((const Task *)b)->work;
    return (one < other) - (one > other);
}

/* Divides the work, the largest parts first, and does it. */
static int32_t run_prefill(const void *argument) {
    Prefill p = *(const Prefill *)argument;
    int64_t group = p.heads / p.kv_heads, most = 0;
    for (int64_t e = 0; e < p.num_rows; e++) most += (p.rows[e].count * group / MOST_ROWS + 1) * p.kv_heads;
    Task *tasks = malloc(most * sizeof(Task)), *task = tasks;
    if (!tasks) return 1;
    for (int64_t e = 0; e < p.num_rows; e++) {
        int64_t rows = p.rows[e].count * group, parts = (rows + MOST_ROWS - 1) / MOST_ROWS;
        int64_t each = ((rows + parts - 1) / parts + 15) / 16 * 16;
        for (int64_t head = 0; head < p.kv_heads; head++)
            for (int64_t first = 0; first < rows; first += each, task++) {
                *task = (Task){.entry = e, .head = head, .first = first, .count = min(each, rows - first)};
                task->work = task->count * seen(&p, task, first + task->count - 1);
            }
    }
    p.tasks = tasks;
    qsort(tasks, task - tasks, sizeof(Task), by_work);
    crane_parallel(prefill_task, &p, task - tasks);
    free(tasks);
    return 0;
}
#else
static int32_t run_prefill(const void *argument) { return argument != NULL; }
#endif

/* Where `crane_has_amx`, of bfloat16 heads of a multiple of 32 elements, up to 256, and pages of a multiple of 16 tokens.
q: tokens q_stride elements apart, [heads, head_dim] each. out: [tokens, heads, head_dim]. kv: see kernels/pages.py.
layer: whose keys and values to read. Returns 0, or 1 when there is no memory. */
int32_t crane_prefill(const void *q, void *out, const void *kv, const int64_t *rows, const int64_t *table,
                      int64_t num_rows, int64_t table_width, int64_t q_stride, int64_t heads, int64_t kv_heads,
                      int64_t head_dim, int64_t page_size, int64_t num_layers, int64_t layer, float scale) {
    Prefill p = {.q = q, .out = out, .kv = kv, .rows = (const Row *)rows, .table = table, .num_rows = num_rows,
                 .table_width = table_width, .q_stride = q_stride, .heads = heads, .kv_heads = kv_heads,
                 .head_dim = head_dim, .page_size = page_size, .page_stride = 2 * num_layers * page_size,
                 .layer_start = 2 * layer * page_size, .scale = scale};
    return crane_call("prompts' attention", run_prefill, &p, sizeof p);
}
