/* The best columns of few rows of x @ weight.T without reading all of the weight: a copy of it in 4 bits, the screen,
says which columns may be the best, and only these are computed.

A value of the weight is rounded at random to one of two neighbouring multiples of its group's scale s, up with the
probability that makes it right on average. So the difference between a product and its screen's, the sum of
(rounded - exact) * x, is one of independent numbers with mean 0 in ranges of width s * |x|, whatever weight and x are,
because x was computed without the screen. Hoeffding (1963), theorem 2: it is below -z / 2 * sqrt(sum of (s * x)^2)
with a probability of at most exp(-z^2 / 2). A column may be the best if its screen's product plus that is not below
some exact product. The best one, then, is missed with at most that probability, once a row of x; float32 sums of up to
16,384 columns are wrong by less than a hundredth of it.

Products that are changed before they are compared (changes.h) have changed bounds: the larger of two is still the larger
one, or equal. */
#include "product.h"
#include <math.h>
#include <stdlib.h>

#define Z 8.0f /* exp(-32) = 1.3e-14 */
#define MOST_BLOCKS(all) ((all) / 4) /* if more may have the best, all are computed without the screen... */
#define MOST_WAIT 63                 /* ... and then the next 1, 3, 7 ... up to so many times */

typedef struct { const Weight *from; Weight *to; uint64_t seed; } Make;

/* The screen's scale for values between low and high: float16, no smaller than what puts them between -8 and 7 times
it, one way or the other round. Neither finite where `bad` is not. */
static uint16_t screen_scale(float low, float high, float bad) {
    float a = fmaxf(high / 7, low / -8), b = fmaxf(low / -7, high / 8), scale = (a <= b ? a : -b) + bad;
    uint16_t bits = to_f16_1(scale);
    return fabsf(from_f16_1(bits)) < fabsf(scale) ? bits + 1 : bits;
}

/* 16 numbers in [1, 2), by Marsaglia's xorshift. */
INLINE vf dither(vu *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return (vf)(*state >> 9 | 0x3f800000);
}

static void make_tile(const Weight *w, const uint8_t *from, uint8_t *to, vu *random) {
    Tile t;
#define BODY(bits, groups, has_offset) unpack(from, bits, groups, has_offset, w->shift, &t)
    FOR_KIND(w, BODY)
#undef BODY
    vf value[TILE], low = {}, high = {}, bad = {};
    for (int g = 0; g < w->groups; g++) bad += (t.scale[g] + t.offset[g]) * SPREAD(0.0f);
    for (int k = 0; k < TILE; k++) {
        int g = k * w->groups / TILE;
        value[k] = __builtin_convertvector((vi)(t.quad[k / 4] >> 8 * (k % 4) & 255), vf) * t.scale[g] + t.offset[g];
        high = max_v(high, value[k]);
        low = -max_v(-low, -value[k]);
    }
    uint16_t scales[LANES];
    for (int r = 0; r < LANES; r++) scales[r] = screen_scale(low[r], high[r], bad[r]);
    memcpy(to, scales, sizeof scales);
    vf scale = from_f16(to), inverse = SPREAD(1.0f) / scale;
    inverse = (vf)((vi)inverse & (scale != 0));
    vu quad[8] = {};
    for (int k = 0; k < TILE; k++) {
        vi code = __builtin_convertvector(value[k] * inverse + SPREAD(7.0f) + dither(random), vi);
        vi most = SPREAD_I(15);
        code -= (code - most) & (code > most); /* float32 may round up to 16 */
        quad[k / 4] |= (vu)code << 8 * (k % 4);
    }
    for (int i = 0; i < 4; i++) store_u(to + 32 + 64 * i, quad[i] | quad[i + 4] << 4);
}

static void make_panel(void *argument, int64_t panel) {
    const Make *p = argument;
    int64_t from = panel * num_tiles(p->from) * tile_bytes(p->from), to = panel * num_tiles(p->to) * tile_bytes(p->to);
    vu random;
    for (int i = 0; i < LANES; i++) { /* splitmix64's steps, from a place of its own for each row */
        uint64_t z = p->seed + (panel * LANES + i + 1) * 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        random[i] = (uint32_t)(z ^ z >> 31) | 1;
    }
    for (int64_t tile = 0; tile < num_tiles(p->from); tile++)
        make_tile(p->from, p->from->panels + from + tile * tile_bytes(p->from),
                  p->to->panels + to + tile * tile_bytes(p->to), &random);
}

/* Fills the panels of a screen of this weight. seed: of what its values are rounded by. */
void crane_screen(const Weight *w, Screen *screen, uint64_t seed) {
    Make p = {w, &screen->weight, seed};
    crane_parallel(make_panel, &p, num_panels(w));
}

INLINE vf root(vf v) {
#ifdef __AVX512F__
    return (vf)_mm512_sqrt_ps((__m512)v);
#else
    union { vf all; __m256 half[2]; } u = {v};
    for (int h = 0; h < 2; h++) u.half[h] = _mm256_sqrt_ps(u.half[h]);
    return u.all;
#endif
}

void crane_bound(const Product *p, int64_t row, int64_t panel, vf sum, vf spread) {
    const Weight *w = p->w;
    int64_t at = row * num_panels(w) + panel, left = w->num_rows - panel * LANES;
    vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, none = lane >= SPREAD_I((int)left);
    if (w->bias)
        for (int i = 0; i < LANES && i < left; i++) sum[i] += w->bias[panel * LANES + i];
    vf upper = sum + SPREAD(Z / 2) * root(spread);
    vi odd = upper != upper; /* what is no number has to be computed */
    vf infinite = SPREAD(INFINITY);
    upper = (vf)(((vi)upper & ~odd) | ((vi)infinite & odd));
    int listed = p->bounds->listed ? p->bounds->listed[at] : 0;
    if (listed) {
        store_f(p->bounds->lanes + at * 2 * LANES, sum), store_f(p->bounds->lanes + at * 2 * LANES + LANES, upper);
        none |= -(SPREAD_I(listed) >> lane & 1);
    }
    p->bounds->upper[at] = largest_f((vf)(((vi)upper & ~none) | ((vi)-infinite & none)));
    p->bounds->middle[at] = largest_f((vf)(((vi)sum & ~none) | ((vi)-infinite & none)));
}

/* What one search works in: bounds, [num_rows, stride] sums in the place of the bounds' lanes, [num_rows], blocks. */
typedef struct {
    Bounds bounds;
    float *sums, *least;
    int32_t *blocks;
    int64_t stride;
} Room;

static int room_for(const Best *p, int64_t panels, Room *room) {
    static __thread float *memory;
    static __thread int64_t size;
    int64_t each = 2 * panels + 2 * panels * LANES + 1 + (panels + 1) / 2, wanted = p->num_rows * each + panels;
    if (size < wanted) {
        free(memory);
        memory = malloc((size = wanted) * sizeof(float));
        if (!memory) return size = 0;
    }
    room->stride = panels * LANES;
    float *middle = memory, *upper = middle + p->num_rows * panels, *lanes = upper + p->num_rows * panels;
    room->sums = lanes;
    room->least = lanes + 2 * p->num_rows * room->stride;
    room->blocks = (int32_t *)(room->least + p->num_rows);
    int any = first_place(p->changes, p->num_rows) > first_place(p->changes, 0);
    room->bounds = (Bounds){middle, upper, lanes, any ? (uint16_t *)(room->blocks + panels) : NULL};
    return 1;
}

typedef struct { const Best *best; const Bounds *bounds; int64_t panels; } Listed;

/* Marks the columns listed for a row. */
static void mark_listed(void *argument, int64_t row) {
    const Listed *p = argument;
    const Changes *c = p->best->changes;
    uint16_t *listed = p->bounds->listed + row * p->panels;
    memset(listed, 0, p->panels * sizeof *listed);
    for (int64_t i = first_place(c, row); i < first_place(c, row + 1); i++)
        if (c->ids[i] >= 0 && c->ids[i] < p->best->columns) listed[c->ids[i] / LANES] |= 1 << c->ids[i] % LANES;
}

/* Lets their bounds, changed, take part in their panels'. What is no number then is not the best one, whatever its sum. */
static void bound_listed(void *argument, int64_t row) {
    const Listed *p = argument;
    const Changes *c = p->best->changes;
    const Bounds *b = p->bounds;
    for (int64_t i = first_place(c, row); i < first_place(c, row + 1); i++) {
        if (c->ids[i] < 0 || c->ids[i] >= p->best->columns) continue;
        int64_t at = row * p->panels + c->ids[i] / LANES;
        const float *lane = b->lanes + at * 2 * LANES + c->ids[i] % LANES;
        b->middle[at] = fmaxf(b->middle[at], changed(c, row, i, lane[0]));
        b->upper[at] = fmaxf(b->upper[at], changed(c, row, i, lane[LANES]));
    }
}

/* What is known of all panels by the screen. */
static void find_bounds(const Best *p, int64_t num_columns, const Bounds *bounds) {
    Weight screen = p->screen->weight;
    screen.num_rows = num_columns;
    Product product = {.w = &screen, .x = p->x, .num_rows = p->num_rows, .dtype = p->dtype, .bounds = bounds};
    Listed listed = {p, bounds, num_panels(&screen)};
    if (bounds->listed) crane_parallel(mark_listed, &listed, p->num_rows);
    crane_integer_product(&product);
    if (bounds->listed) crane_parallel(bound_listed, &listed, p->num_rows);
}

/* Blocks with panels that may have the largest sum of some row. */
static int64_t select_blocks(const Best *p, int64_t panels, Room *room) {
    int64_t count = 0;
    for (int64_t block = 0; block * BLOCK < panels; block++) {
        int may = 0;
        for (int64_t row = 0; row < p->num_rows; row++)
            for (int64_t panel = block * BLOCK; panel < block * BLOCK + BLOCK && panel < panels; panel++)
                may |= !(room->bounds.upper[row * panels + panel] < room->least[row]);
        if (may) room->blocks[count++] = block;
    }
    return count;
}

static void multiply_blocks(const Best *p, const Weight *w, Room *room, int64_t count) {
    Product product = {.w = w, .x = p->x, .out = room->sums, .num_rows = p->num_rows, .out_stride = room->stride,
                       .dtype = p->dtype, .out_dtype = FLOAT32, .blocks = room->blocks, .num_blocks = count};
    crane_integer_product(&product);
}

/* A row's largest sum in a block, after changes; its place, too, if that is larger than `most`. Returns the larger. */
static float search_block(const Best *p, const Room *room, int64_t row, int64_t block, float most, int64_t *id) {
    int64_t first = block * BLOCK * LANES, end = first + BLOCK * LANES < p->columns ? first + BLOCK * LANES : p->columns;
    float *sums = room->sums + row * room->stride;
    crane_change(p->changes, row, sums + first, first, end - first, NULL);
    for (int64_t i = first; i < end; i++)
        if (sums[i] > most) most = sums[i], *id = i;
    return most;
}

/* Finds the ids. Returns how many blocks were computed for that, -1 if it would have been too many. */
static int64_t search(const Best *p, const Weight *w, Room *room) {
    int64_t panels = num_panels(w), id;
    find_bounds(p, w->num_rows, &room->bounds);
    for (int64_t row = 0; row < p->num_rows; row++) {
        const float *middle = room->bounds.middle + row * panels;
        int64_t first = 0;
        for (int64_t panel = 1; panel < panels; panel++) first = middle[panel] > middle[first] ? panel : first;
        room->blocks[row] = first / BLOCK;
    }
    multiply_blocks(p, w, room, p->num_rows);
    for (int64_t row = 0; row < p->num_rows; row++)
        room->least[row] = search_block(p, room, row, room->blocks[row], -INFINITY, &id);
    int64_t count = select_blocks(p, panels, room);
    if (count > MOST_BLOCKS((panels + BLOCK - 1) / BLOCK)) return -1;
    multiply_blocks(p, w, room, count);
    for (int64_t row = 0; row < p->num_rows; row++) {
        float most = -INFINITY;
        p->ids[row] = 0;
        for (int64_t i = 0; i < count; i++) most = search_block(p, room, row, room->blocks[i], most, &p->ids[row]);
    }
    return count;
}

int32_t crane_search_screen(const Best *p) {
    Screen *s = p->screen;
    Weight w = *p->w;
    w.num_rows = p->columns;
    if (s->wait > 0) s->wait--;
    else {
        Room room;
        if (!room_for(p, num_panels(&w), &room)) return 1;
        int64_t count = search(p, &w, &room);
        if (count >= 0) {
            s->num_screened++, s->num_blocks += count, s->last_wait = 0;
            return 0;
        }
        s->wait = s->last_wait = s->last_wait < MOST_WAIT ? 2 * s->last_wait + 1 : MOST_WAIT;
    }
    s->num_whole++;
    return -1;
}
