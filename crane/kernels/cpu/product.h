/* y = x @ weight.T + bias: what its ways share. */
#pragma once
#include "weight.h"

/* 32 values of x in 8 bits: q = round(x / scale). For each group of the weight: what its offset multiplies,
scale * sum(q), or without offsets the integer that stands for them, -shift * sum(q). */
typedef struct { float scale, sum[2]; int32_t start[2]; } Round;

enum { INTEGERS = 0, AMX = 1 }; /* methods */

typedef struct {
    const Weight *w;
    const void *x;
    void *out;
    int64_t num_rows, out_stride, panels_per_task;
    int32_t dtype, out_dtype, method;
    int8_t *q;     /* [num_columns / 32, num_rows, 32] */
    Round *rounds; /* [num_columns / 32, num_rows] */
} Product;

int32_t crane_product(const void *product); /* linear.c: by its method; 0 */
void crane_integer_product(Product *p); /* integer.c */
void crane_amx_product(Product *p);     /* amx.c, where HAVE_AMX */

/* Stores 16 sums of a row of x, with the bias. */
INLINE void finish(const Product *p, int64_t row, int64_t panel, vf sum) {
    const Weight *w = p->w;
    int64_t first = panel * LANES, at = row * p->out_stride + first;
    if (first + LANES <= w->num_rows) {
        store_as(p->out, at, w->bias ? sum + load_f(w->bias + first) : sum, p->out_dtype);
        return;
    }
    for (int i = 0; first + i < w->num_rows; i++)
        store_as1(p->out, at + i, sum[i] + (w->bias ? w->bias[first + i] : 0), p->out_dtype);
}
