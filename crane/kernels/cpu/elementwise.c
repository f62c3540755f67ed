/* The small operators of a layer: RMS norm, the rotation of q and k, the gate of the MLP. Computed in float32. */
#define _GNU_SOURCE
#include "common.h"
#include <math.h>

/* rows of one task: enough work to be worth sharing */
#define TASK_ELEMENTS 4096
#define MAX_HEAD_DIM 1024

INLINE int64_t rows_per_task(int64_t elements) { return 1 + TASK_ELEMENTS / (elements + 1); }
#define RUN_ROWS(p, task) \
    (crane_parallel(task, (void *)(p), ((p)->rows + (p)->rows_per_task - 1) / (p)->rows_per_task), 0)
#define FOR_ROWS(p, index, row)                                                                      \
    for (int64_t row = (index) * (p)->rows_per_task, end_ = row + (p)->rows_per_task;                \
         row < (end_ < (p)->rows ? end_ : (p)->rows); row++)

typedef struct {
    const void *x, *weight;
    void *residual, *out;
    int64_t rows, size, stride, rows_per_task;
    float eps;
    int32_t dtype;
} Norm;

/* dtype is a constant */
INLINE void norm_row(const Norm *p, int64_t row, int dtype) {
    vf squares = {};
    float tail = 0;
    int64_t i = 0, from = row * p->stride, to = row * p->size;
    const void *x = p->residual ? p->residual : p->x;
    for (; i + 16 <= p->size; i += 16) {
        vf v = load_as_f(p->x, from + i, dtype);
        if (p->residual) { /* what is normalised is the rounded sum */
            v += load_as_f(p->residual, to + i, dtype);
            store_as(p->residual, to + i, v, dtype);
            if (dtype == BFLOAT16) v = from_bf16(to_bf16(v));
        }
        squares += v * v;
    }
    for (; i < p->size; i++) {
        float v = load_as_f1(p->x, from + i, dtype);
        if (p->residual) {
            store_as1(p->residual, to + i, load_as_f1(p->residual, to + i, dtype) + v, dtype);
            v = load_as_f1(p->residual, to + i, dtype);
        }
        tail += v * v;
    }
    from = p->residual ? to : from;
    float scale = 1 / sqrtf((sum_f(squares) + tail) / p->size + p->eps);
    for (i = 0; i + 16 <= p->size; i += 16)
        store_as(p->out, to + i, load_as_f(x, from + i, dtype) * SPREAD(scale) * load_as_f(p->weight, i, dtype), dtype);
    for (; i < p->size; i++)
        store_as1(p->out, to + i, load_as_f1(x, from + i, dtype) * scale * load_as_f1(p->weight, i, dtype), dtype);
}

static void norm_task(void *argument, int64_t index) {
    const Norm *p = argument;
    FOR_ROWS(p, index, row) {
        if (p->dtype == BFLOAT16) norm_row(p, row, BFLOAT16);
        else norm_row(p, row, FLOAT32);
    }
}

static int32_t run_norm(const void *p) { return RUN_ROWS((const Norm *)p, norm_task); }

/* x: rows of size elements, stride apart; residual (or NULL), out: [rows, size]; weight: [size]. All of one dtype. */
void crane_rms_norm(const void *x, const void *weight, float eps, void *residual, void *out, int64_t rows,
                    int64_t size, int64_t stride, int32_t dtype) {
    Norm p = {x, weight, residual, out, rows, size, stride, rows_per_task(size), eps, dtype};
    crane_call("norm", run_norm, &p, sizeof p);
}

typedef struct {
    const void *gate_up;
    void *out;
    int64_t rows, size, rows_per_task;
    int32_t dtype;
} Gate;

INLINE void gate_row(const Gate *p, int64_t row, int dtype) {
    int64_t from = row * 2 * p->size, to = row * p->size, i = 0;
    for (; i + 16 <= p->size; i += 16) {
        vf gate = load_as_f(p->gate_up, from + i, dtype), up = load_as_f(p->gate_up, from + p->size + i, dtype);
        store_as(p->out, to + i, silu_mul(gate, up, dtype), dtype);
    }
    for (; i < p->size; i++) {
        float gate = load_as_f1(p->gate_up, from + i, dtype);
        store_as1(p->out, to + i, gate / (1 + expf(-gate)) * load_as_f1(p->gate_up, from + p->size + i, dtype), dtype);
    }
}

static void gate_task(void *argument, int64_t index) {
    const Gate *p = argument;
    FOR_ROWS(p, index, row) {
        if (p->dtype == BFLOAT16) gate_row(p, row, BFLOAT16);
        else gate_row(p, row, FLOAT32);
    }
}

static int32_t run_gate(const void *p) { return RUN_ROWS((const Gate *)p, gate_task); }

/* gate_up: [rows, 2 * size]; out: [rows, size]. */
void crane_silu_mul(const void *gate_up, void *out, int64_t rows, int64_t size, int32_t dtype) {
    Gate p = {gate_up, out, rows, size, rows_per_task(size * 4), dtype};
    crane_call("gate", run_gate, &p, sizeof p);
}

typedef struct {
    void *qkv, *kv;
    const float *cos, *sin;      /* [rows, head_dim], the sine's first half negated */
    const void *norm_weight;     /* [heads + kv_heads, head_dim] of dtype, or NULL */
    const int64_t *index;        /* [rows], where keys go: in token vectors of layer 0 */
    int64_t rows, heads, kv_heads, head_dim, key_start, page_size, rows_per_task;
    float eps;
    int32_t norm_first, dtype;
} Rotate;

INLINE void normalise_head(float *x, const Rotate *p, int64_t head) {
    float sum = 0;
    for (int64_t i = 0; i < p->head_dim; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / p->head_dim + p->eps);
    for (int64_t i = 0; i < p->head_dim; i++)
        x[i] *= scale * load_as_f1(p->norm_weight, head * p->head_dim + i, p->dtype);
}

/* dim and dtype are constants for the usual ones */
INLINE void rotate_row(const Rotate *p, int64_t row, int64_t dim, int dtype) {
    int64_t half = dim / 2, size = dtype == BFLOAT16 ? 2 : 4;
    int64_t width = (p->heads + 2 * p->kv_heads) * dim, kv_width = p->kv_heads * dim;
    const float *cos = p->cos + row * dim, *sin = p->sin + row * dim;
    float x[MAX_HEAD_DIM], y[MAX_HEAD_DIM];
    char *q = (char *)p->qkv + row * width * size;
    for (int64_t head = 0; head < p->heads + p->kv_heads; head++) {
        int64_t at = head * dim;
        for (int64_t i = 0; i < dim; i++) x[i] = load_as_f1(q, at + i, dtype);
        if (p->norm_weight && p->norm_first) normalise_head(x, p, head);
        for (int64_t i = 0; i < half; i++) y[i] = x[i] * cos[i] + x[i + half] * sin[i];
        for (int64_t i = 0; i < half; i++) y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
        if (p->norm_weight && !p->norm_first) normalise_head(y, p, head);
        for (int64_t i = 0; i < dim; i++) store_as1(q, at + i, y[i], dtype);
    }
    char *k = q + p->heads * dim * size, *to = (char *)p->kv + (p->index[row] + p->key_start) * kv_width * size;
    memcpy(to, k, kv_width * size);
    memcpy(to + p->page_size * kv_width * size, k + kv_width * size, kv_width * size);
}

static void rotate_task(void *argument, int64_t index) {
    const Rotate *p = argument;
    FOR_ROWS(p, index, row) {
        if (p->dtype == BFLOAT16 && p->head_dim == 64) rotate_row(p, row, 64, BFLOAT16);
        else if (p->dtype == BFLOAT16 && p->head_dim == 128) rotate_row(p, row, 128, BFLOAT16);
        else rotate_row(p, row, p->head_dim, p->dtype);
    }
}

static int32_t run_rotate(const void *p) { return RUN_ROWS((const Rotate *)p, rotate_task); }

/* Heads of q and k are normalised if there is a weight, rotated in place, and k and v written to their pages.
qkv: [rows, heads + 2 * kv_heads, head_dim]. key_start: where the layer's keys start, in token vectors. */
void crane_qkv_post(void *qkv, void *kv, const float *cos, const float *sin, const void *norm_weight,
                  const int64_t *index, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  int64_t key_start, int64_t page_size, float eps, int32_t norm_first, int32_t dtype) {
    Rotate p = {qkv, kv, cos, sin, norm_weight, index, rows, heads, kv_heads, head_dim,
                key_start, page_size, rows_per_task((heads + kv_heads) * head_dim), eps, norm_first, dtype};
    crane_call("rotation", run_rotate, &p, sizeof p);
}

typedef struct {
    const int64_t *positions;
    const float *frequencies;
    float *cos, *sin;
    int64_t rows, half, rows_per_task;
    float scale;
} Angles;

static void angles_task(void *argument, int64_t index) {
    const Angles *p = argument;
    FOR_ROWS(p, index, row)
        for (int64_t i = 0; i < p->half; i++) {
            float sine, cosine, *cos = p->cos + row * 2 * p->half + i, *sin = p->sin + row * 2 * p->half + i;
            sincosf((float)p->positions[row] * p->frequencies[i], &sine, &cosine);
            cos[0] = cos[p->half] = cosine * p->scale;
            sin[p->half] = sine * p->scale;
            sin[0] = -sin[p->half];
        }
}

static int32_t run_angles(const void *p) { return RUN_ROWS((const Angles *)p, angles_task); }

/* What rotates each position: cos, sin: [rows, 2 * half]; frequencies: [half]. See `rope_tables` in kernels/rope.py. */
void crane_angles(const int64_t *positions, const float *frequencies, float *cos, float *sin, int64_t rows,
                  int64_t half, float scale) {
    Angles p = {positions, frequencies, cos, sin, rows, half, rows_per_task(half * 16), scale};
    crane_call("angles", run_angles, &p, sizeof p);
}
