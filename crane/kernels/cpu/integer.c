/* Products with few rows of x, which are rounded to 8 bits, 32 values a scale, and multiplied as integers. */
#include "product.h"

#define MAX_ROWS 8 /* of x that one pass over the weight serves */

static void round_row(void *argument, int64_t row) {
    const Product *p = argument;
    int8_t *q = p->q + row * TILE;
    Round *round = p->rounds + row;
    int64_t from = row * p->w->num_columns, rows = p->num_rows;
    for (int64_t tile = 0; tile < num_tiles(p->w); tile++, q += rows * TILE, round += rows, from += TILE) {
        vf half[2] = {load_as_f(p->x, from, p->dtype), load_as_f(p->x, from + 16, p->dtype)};
        /* the order of positive floats is that of their bits */
        union { int32_t bits; float value; } most;
        most.bits = largest_i(max_i((vi)half[0] & 0x7fffffff, (vi)half[1] & 0x7fffffff));
        float inverse = most.value > 0 ? 127.0f / most.value : 0;
        round->scale = most.value / 127.0f;
        int32_t sum[2];
        for (int h = 0; h < 2; h++) {
            /* adding 1.5 * 2^23 leaves the nearest integer in the low bits */
            vi rounded = (vi)(half[h] * SPREAD(inverse) + SPREAD(12582912.0f)) - 0x4b400000;
            sum[h] = sum_i(rounded);
            store_b(q + h * 16, rounded);
        }
        if (p->w->groups == 1) sum[0] += sum[1];
        for (int g = 0; g < p->w->groups; g++) {
            round->sum[g] = round->scale * sum[g];
            round->start[g] = p->w->has_offset ? 0 : -p->w->shift * sum[g];
        }
    }
}

static void round_rows(Product *p) {
    int64_t columns = p->w->num_columns;
    p->q = crane_scratch(p->num_rows * (columns + num_tiles(p->w) * (sizeof(Round) + sizeof(float))));
    p->rounds = (Round *)(p->q + p->num_rows * columns);
    p->energy = (float *)(p->rounds + p->num_rows * num_tiles(p->w));
    if (p->num_rows * columns < 16384)
        for (int64_t row = 0; row < p->num_rows; row++) round_row(p, row);
    else crane_parallel(round_row, p, p->num_rows);
    for (int64_t i = 0; p->bounds && i < p->num_rows * num_tiles(p->w); i++) {
        int32_t sum = 0;
        for (int k = 0; k < TILE; k++) sum += p->q[i * TILE + k] * p->q[i * TILE + k];
        p->energy[i] = p->rounds[i].scale * p->rounds[i].scale * sum;
    }
}

/* Adds to each lane the products of its four unsigned bytes with the four signed ones at b. */
INLINE vi dot4(vi sum, vu a, const int8_t *b) {
    int32_t four;
    memcpy(&four, b, 4);
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(four));
#else
    union { vu all; __m256i half[2]; } u = {a};
    union { vi all; __m256i half[2]; } s = {sum};
    __m256i spread = _mm256_set1_epi32(four);
    for (int h = 0; h < 2; h++) {
#if defined(__AVXVNNI__)
        s.half[h] = _mm256_dpbusd_avx_epi32(s.half[h], u.half[h], spread);
#else
        /* pairs are summed in 16 bits, which 8-bit codes would overflow: all but their lowest bit, and that bit */
        __m256i one = _mm256_set1_epi16(1), bit = _mm256_set1_epi8(1), mask = _mm256_set1_epi8(127);
        __m256i upper = _mm256_and_si256(_mm256_srli_epi16(u.half[h], 1), mask);
        __m256i lower = _mm256_and_si256(u.half[h], bit);
        upper = _mm256_madd_epi16(_mm256_maddubs_epi16(upper, spread), one);
        lower = _mm256_madd_epi16(_mm256_maddubs_epi16(lower, spread), one);
        s.half[h] = _mm256_add_epi32(s.half[h], _mm256_add_epi32(_mm256_add_epi32(upper, upper), lower));
#endif
    }
    return s.all;
#endif
}

/* sum: [count, wide] of panels [panel, panel + wide) times rows [row, row + count) of x; all but the first three and
the last two are constants wherever this is inlined. Several panels are as many streams from memory. Past the weight's
end its last panel stands in. spread: for each product the sum of scale^2 * energy, or NULL. */
INLINE void multiply(const Product *p, int64_t panel, int64_t row, int count, int wide, int bits, int groups,
                     int has_offset, vf *sum, vf *spread) {
    const Weight *w = p->w;
    int64_t tiles = num_tiles(w), last = num_panels(w) - 1, step = tile_size(bits, groups, has_offset);
    const uint8_t *from[BLOCK];
    for (int i = 0; i < wide; i++) from[i] = w->panels + (panel + i < last ? panel + i : last) * tiles * step;
    const int8_t *q = p->q + row * TILE;
    const Round *round = p->rounds + row;
    const float *energy = p->energy + row;
    for (int i = 0; i < count * wide; i++) sum[i] = (vf){};
    for (int i = 0; spread && i < count * wide; i++) spread[i] = (vf){};
    for (int64_t tile = 0; tile < tiles; tile++, q += p->num_rows * TILE, round += p->num_rows, energy += p->num_rows) {
        int64_t next = ahead(tile, tiles, wide, step);
        for (int i = 0; i < wide; i++) {
            Tile t;
            fetch(from[i] + next, step);
            unpack(from[i], bits, groups, has_offset, 0, &t);
            from[i] += step;
            for (int r = 0; r < count; r++)
                for (int g = 0; g < groups; g++) {
                    vi whole = has_offset ? (vi){} : SPREAD_I(round[r].start[g]);
                    for (int k = g * 8 / groups; k < (g + 1) * 8 / groups; k++)
                        whole = dot4(whole, t.quad[k], q + r * TILE + 4 * k);
                    vf *to = &sum[r * wide + i];
                    *to += __builtin_convertvector(whole, vf) * (t.scale[g] * SPREAD(round[r].scale));
                    if (has_offset) *to += t.offset[g] * SPREAD(round[r].sum[g]);
                    if (spread) spread[r * wide + i] += t.scale[g] * t.scale[g] * SPREAD(energy[r]);
                }
        }
    }
}

/* gates: [count], sums of a panel of gate until those of up are there. */
INLINE void integer_panels(const Product *p, int64_t panel, int64_t row, int count, int wide, int bits, int groups,
                           int has_offset, vf *gates) {
    vf sum[MAX_ROWS * BLOCK], spread[MAX_ROWS * BLOCK];
    int bounds = SCREEN_KIND(bits, groups, has_offset) && p->bounds;
    if (bounds) multiply(p, panel, row, count, wide, bits, groups, has_offset, sum, spread);
    else multiply(p, panel, row, count, wide, bits, groups, has_offset, sum, NULL);
    for (int64_t i = 0, at = panel; i < wide && at < num_panels(p->w); i++, at++)
        for (int r = 0; r < count; r++)
            if (bounds) crane_bound(p, row + r, at, sum[r * wide + i], spread[r * wide + i]);
            else if (!p->is_gated) finish(p, row + r, at, sum[r * wide + i]);
            else if (at % 2 == 0) gates[r] = sum[r * wide + i];
            else finish_gated(p, row + r, at - 1, gates[r], sum[r * wide + i]);
}

#define PANEL(count, wide, bits, groups, has_offset)                                                   \
    __attribute__((noinline)) static void panels_##count##_##bits##groups##has_offset(                 \
        const Product *p, int64_t first, int64_t end, int64_t row) {                                   \
        vf gates[count];                                                                               \
        for (int64_t panel = first; panel < end; panel += wide)                                        \
            integer_panels(p, panel, row, count, wide, bits, groups, has_offset, gates);               \
    }
#define PANELS(bits, groups, has_offset)                                                               \
    PANEL(1, BLOCK, bits, groups, has_offset) PANEL(2, 2, bits, groups, has_offset)                 \
    PANEL(4, 1, bits, groups, has_offset) PANEL(8, 1, bits, groups, has_offset)
EACH_KIND(PANELS)

/* All rows of x times a block of panels. */
static void multiply_block(const Product *p, int64_t block) {
    int64_t panel = block * BLOCK, last = num_panels(p->w), end = panel + BLOCK < last ? panel + BLOCK : last;
    for (int64_t row = 0; row < p->num_rows;) {
        int64_t left = p->num_rows - row;
#define BODY(bits, groups, has_offset)                                                                     \
    if (left >= 8) panels_8_##bits##groups##has_offset(p, panel, end, row), row += 8;                    \
    else if (left >= 4) panels_4_##bits##groups##has_offset(p, panel, end, row), row += 4;               \
    else if (left >= 2) panels_2_##bits##groups##has_offset(p, panel, end, row), row += 2;               \
    else panels_1_##bits##groups##has_offset(p, panel, end, row), row += 1
        FOR_KIND(p->w, BODY)
#undef BODY
    }
}

static void integer_task(void *argument, int64_t index) {
    const Product *p = argument;
    int64_t block = index * p->blocks_per_task, end = block + p->blocks_per_task;
    for (; block < end && block < p->num_blocks; block++) multiply_block(p, p->blocks ? p->blocks[block] : block);
}

void crane_integer_product(Product *p) {
    if (!p->blocks) p->num_blocks = (num_panels(p->w) + BLOCK - 1) / BLOCK;
    int64_t share = p->num_blocks / (crane_threads() * 8);
    p->blocks_per_task = share < 1 ? 1 : share > 4 ? 4 : share;
    round_rows(p);
    crane_parallel(integer_task, p, (p->num_blocks + p->blocks_per_task - 1) / p->blocks_per_task);
}
