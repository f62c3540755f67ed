/* The best column of each row of x @ weight.T + bias: one slice of columns is computed after the other and looked
through while the second cache has it, so that sums are neither written to memory nor read from it. Some are changed
before. */
#include "product.h"
#include <math.h>
#include <stdlib.h>

#define SLICE_BYTES (1 << 20) /* of sums */
#define SLICE_LEAST 1024      /* columns */
#define SCREENED 8            /* rows, at most: as many as one pass over the weight serves */

typedef struct { float *sums; int64_t count, stride, first, *ids; float *most; const Changes *changes; } Slice;

/* The first place of a row's largest sum, if that is larger than those of the slices before. */
static void search_row(void *argument, int64_t row) {
    const Slice *s = argument;
    float *sums = s->sums + row * s->stride;
    int64_t i = 0, at = 0;
    crane_change(s->changes, row, sums, s->first, s->count, NULL);
    vf most[4] = {SPREAD(-INFINITY), SPREAD(-INFINITY), SPREAD(-INFINITY), SPREAD(-INFINITY)};
    for (; i + 64 <= s->count; i += 64)
        for (int n = 0; n < 4; n++) most[n] = max_v(load_f(sums + i + 16 * n), most[n]); /* not NaN */
    float largest = largest_f(max_v(max_v(most[0], most[1]), max_v(most[2], most[3])));
    for (; i < s->count; i++) largest = fmaxf(largest, sums[i]);
    if (!(largest > s->most[row])) return;
    for (int found = 0; at + 64 <= s->count; at += 64) {
        for (int n = 0; n < 64; n++) found |= sums[at + n] == largest;
        if (found) break;
    }
    while (at + 1 < s->count && sums[at] != largest) at++;
    s->most[row] = largest, s->ids[row] = s->first + at;
}

static int32_t run_best(const void *argument) {
    const Best *p = argument;
    int32_t found = p->screen ? crane_search_screen(p) : -1;
    if (found >= 0) return found;
    static __thread float *room;
    static __thread int64_t size;
    int64_t width = SLICE_BYTES / 4 / p->num_rows / 64 * 64;
    width = width < SLICE_LEAST ? SLICE_LEAST : width;
    int64_t stride = width + 16; /* no power of two, or all rows would want the same lines of the first cache */
    if (size < stride * p->num_rows) {
        free(room);
        room = aligned_alloc(64, (size = stride * p->num_rows) * 4);
        if (!room) return size = 0, 1;
    }
    float most[p->num_rows];
    for (int64_t row = 0; row < p->num_rows; row++) most[row] = -INFINITY, p->ids[row] = 0;
    for (int64_t first = 0; first < p->columns; first += width) {
        int64_t count = p->columns - first < width ? p->columns - first : width;
        Weight part = *p->w;
        part.panels += first / LANES * num_tiles(p->w) * tile_bytes(p->w);
        part.bias = part.bias ? part.bias + first : NULL;
        part.num_rows = count;
        Product product = {.w = &part, .x = p->x, .out = room, .num_rows = p->num_rows, .out_stride = stride,
                           .dtype = p->dtype, .out_dtype = FLOAT32};
        crane_product(&product);
        Slice slice = {room, count, stride, first, p->ids, most, p->changes};
        crane_parallel(search_row, &slice, p->num_rows);
    }
    return 0;
}

/* x: [num_rows, num_columns] of dtype, contiguous. ids: [num_rows], where among the first `columns` of the weight's rows
each row of x has its largest product, of equals the lowest. screen: of the weight, or NULL.
changes: of products before they are compared, without masks; read when the call is made, and made again. Returns 0, or
1 when there is no memory. */
int32_t crane_best(const Weight *w, const void *x, int64_t num_rows, int32_t dtype, int64_t columns,
                   Screen *screen, const Changes *changes, int64_t *ids) {
    screen = num_rows <= SCREENED && !is_for_amx(w, num_rows, dtype) ? screen : NULL;
    Best p = {w, x, num_rows, columns, ids, dtype, screen, changes};
    return crane_call("best token", run_best, &p, sizeof p);
}
