/* y = x @ weight.T + bias: what its ways share. */
#pragma once
#include "changes.h"
#include "weight.h"

/* 32 values of x in 8 bits: q = round(x / scale). For each group of the weight: what its offset multiplies,
scale * sum(q), or without offsets the integer that stands for them, -shift * sum(q). */
typedef struct { float scale, sum[2]; int32_t start[2]; } Round;

/* What is known of 16 rows of a screen's products (screen.c) with each row of x: [num_rows, num_panels] each.
listed: bits of those that are left out, since they are to be changed; NULL: none. lanes: [.., 2, 16], middle and upper
of each by itself where there are such. */
typedef struct { float *middle, *upper, *lanes; uint16_t *listed; } Bounds;

typedef struct {
    const Weight *w;
    const void *x;
    void *out;
    int64_t num_rows, out_stride, blocks_per_task;
    int32_t dtype, out_dtype, is_gated;
    int8_t *q;     /* [num_columns / 32, num_rows, 32] */
    Round *rounds; /* [num_columns / 32, num_rows] */
    /* Integers only. blocks: the blocks of panels to multiply, or NULL: all. bounds: what to find instead of out. */
    const int32_t *blocks;
    int64_t num_blocks;
    const Bounds *bounds;
    float *energy; /* [num_columns / 32, num_rows], sums of squares of x as it is rounded, if there are bounds */
} Product;

#define BLOCK 4 /* panels */

int32_t crane_product(const void *product); /* linear.c: on AMX or with integers; 0 */
void crane_integer_product(Product *p); /* integer.c */
void crane_amx_product(Product *p);     /* amx.c, where HAVE_AMX */

/* screen.c: what a weight must be to have bounds; into p->bounds, what is known of a panel's products with a row. */
#define SCREEN_KIND(bits, groups, has_offset) ((bits) == 4 && (groups) == 1 && !(has_offset))
void crane_bound(const Product *p, int64_t row, int64_t panel, vf sum, vf spread);

/* A weight's copy in 4 bits, and how often it was of use: see screen.c. */
typedef struct {
    Weight weight;
    int64_t num_screened, num_blocks, num_whole; /* times, blocks computed in them, times without the screen */
    int32_t wait, last_wait;                     /* times that the screen shall not be tried */
} Screen;

/* A search for the largest sum of each row among the first `columns`: see `crane_best`. */
typedef struct {
    const Weight *w;
    const void *x;
    int64_t num_rows, columns;
    int64_t *ids;
    int32_t dtype;
    Screen *screen; /* of w, or NULL */
    const Changes *changes; /* of sums, without masks */
} Best;
/* screen.c: looks for it with the screen. Returns 0, 1 when there is no memory, or -1 when all have to be computed. */
int32_t crane_search_screen(const Best *p);

/* Stores 16 sums of a row of x, with the bias. */
INLINE void finish(const Product *p, int64_t row, int64_t panel, vf sum) {
    const Weight *w = p->w;
    int64_t first = first_row(w, panel), at = row * p->out_stride + first;
    if (first + LANES <= w->num_rows) {
        store_as(p->out, at, w->bias ? sum + load_f(w->bias + first) : sum, p->out_dtype);
        return;
    }
    for (int i = 0; first + i < w->num_rows; i++)
        store_as1(p->out, at + i, sum[i] + (w->bias ? w->bias[first + i] : 0), p->out_dtype);
}

/* Stores silu(gate) * up of 16 sums each, of a panel of gate and the one that follows it. */
INLINE void finish_gated(const Product *p, int64_t row, int64_t panel, vf gate, vf up) {
    int64_t first = first_row(p->w, panel);
    if (p->w->bias) gate += load_f(p->w->bias + first), up += load_f(p->w->bias + first_row(p->w, panel + 1));
    if (p->out_dtype == BFLOAT16) gate = from_bf16(to_bf16(gate)), up = from_bf16(to_bf16(up)); /* as if stored */
    store_as(p->out, row * p->out_stride + first, silu_mul(gate, up, p->out_dtype), p->out_dtype);
}
