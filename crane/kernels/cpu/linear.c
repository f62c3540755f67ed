/* Rows of a weight, and products with it. */
#include "product.h"

typedef struct { const Weight *w; const int64_t *ids; void *out; int64_t count; int32_t dtype; } Rows;

static void read_row(void *argument, int64_t index) {
    const Rows *p = argument;
    const Weight *w = p->w;
    int64_t row = p->ids[index], lane = row % LANES;
    const uint8_t *from = w->panels + panel_of(w, row) * num_tiles(w) * tile_bytes(w);
    if (w->bits == 16) {
        const uint16_t *values = (const uint16_t *)from + lane * 2;
        for (int64_t k = 0; k < w->num_columns; k++)
            store_as1(p->out, index * w->num_columns + k, from_bf16_1(values[k / 2 * 32 + k % 2]), p->dtype);
        return;
    }
    for (int64_t tile = 0; tile < num_tiles(w); tile++, from += tile_bytes(w)) {
        Tile t;
#define BODY(bits, groups, has_offset) unpack(from, bits, groups, has_offset, w->shift, &t)
        FOR_KIND(w, BODY)
#undef BODY
        for (int k = 0; k < TILE; k++) {
            int g = k * w->groups / TILE;
            float q = ((const uint8_t *)&t.quad[k / 4])[lane * 4 + k % 4];
            store_as1(p->out, index * w->num_columns + tile * TILE + k, t.scale[g][lane] * q + t.offset[g][lane], p->dtype);
        }
    }
}

static int32_t run_rows(const void *p) { return crane_parallel(read_row, (void *)p, ((const Rows *)p)->count), 0; }

/* ids: [count]. out: [count, num_columns]. */
void crane_rows(const Weight *w, const int64_t *ids, int64_t count, void *out, int32_t dtype) {
    Rows p = {w, ids, out, count, dtype};
    crane_call("embedding", run_rows, &p, sizeof p);
}

int32_t crane_product(const void *argument) {
    Product p = *(const Product *)argument;
#ifdef HAVE_AMX
    if (is_for_amx(p.w, p.num_rows, p.dtype)) {
        crane_amx_product(&p);
        return 0;
    }
#endif
    crane_integer_product(&p);
    return 0;
}

/* x: [num_rows, num_columns] of dtype, contiguous. out: rows of out_dtype, out_stride elements apart, starting at
this weight's first column. */
void crane_linear(const Weight *w, const void *x, int64_t num_rows, int32_t dtype, void *out, int64_t out_stride,
                  int32_t out_dtype) {
    Product p = {.w = w, .x = x, .out = out, .num_rows = num_rows, .out_stride = out_stride, .dtype = dtype,
                 .out_dtype = out_dtype};
    crane_call("product", crane_product, &p, sizeof p);
}

/* silu(gate) * up with the gate and up of a paired weight. out: [num_rows, half of the weight's rows] of dtype. */
void crane_gated(const Weight *w, const void *x, int64_t num_rows, int32_t dtype, void *out) {
    Product p = {.w = w, .x = x, .out = out, .num_rows = num_rows, .out_stride = w->num_rows / 2, .dtype = dtype,
                 .out_dtype = dtype, .is_gated = 1};
    crane_call("product", crane_product, &p, sizeof p);
}
