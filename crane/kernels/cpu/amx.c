/* Products on AMX, the matrix unit: bfloat16 x with a weight that is bfloat16, or is turned into it on the way. */
#include "product.h"
#ifdef HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>

typedef struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TileConfig;

/* Tiles 0-3 are sums, 4 and 5 rows of x (the first 16, the next), 6 and 7 the weight's panels. */
static void configure(int rows) {
    TileConfig c = {.palette = 1};
    int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 16;
    int tile_rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = tile_rows[i];
    __asm__ volatile("" : : "r"(&c) : "memory"); /* the intrinsic only admits to reading 8 bytes of it */
    _tile_loadconfig(&c);
}

#define WIDE 4 /* panels a task takes; for more than 32 rows of x it widens all of them first */

/* One quad's columns 2 * pair and 2 * pair + 1 as bfloat16 [16][2]; scale and offset are those of each half's lanes.
Codes become the mantissas of floats from 2 on: no integers are converted. */
INLINE __m512i widen_pair(vu quad, int pair, int bits, const vf *scale, const vf *offset) {
    vf half[2];
    for (int h = 0; h < 2; h++) {
        /* lane: row 8 h + lane / 2, column lane % 2 */
        vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        vu byte = (8 * h + lane / 2) * 4 + 2 * pair + lane % 2;
        __mmask64 place = bits == 8 ? 0x2222222222222222 : 0x4444444444444444;
        __m512i index = (__m512i)(byte * 0x01010101), two = _mm512_set1_epi32(0x40000000);
        vf number = (vf)_mm512_mask_permutexvar_epi8(two, place, index, (__m512i)quad);
        half[h] = number * scale[h] + offset[h];
    }
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)half[1], (__m512)half[0]);
}

/* One tile of a panel in bfloat16, [16 pairs of columns][16 rows][2]. next: as `ahead` gives it. */
INLINE void widen_tile(const uint8_t *from, int64_t next, float shift, uint8_t *to, int bits, int groups,
                       int has_offset) {
    const float unit = bits == 8 ? 16384 : 64; /* 2 + code / unit is what widen_pair makes of a code */
    const vi lanes = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
    Tile t;
    fetch(from + next, tile_size(bits, groups, has_offset));
    unpack(from, bits, groups, has_offset, shift, &t);
    for (int i = 0; i < 8; i++) {
        vf each = t.scale[i * groups / 8] * SPREAD(unit);
        vf rest = t.offset[i * groups / 8] - 2 * each; /* exact where there are no offsets */
        vf scale[2], offset[2];
        for (int h = 0; h < 2; h++) {
            scale[h] = (vf)_mm512_permutexvar_ps((__m512i)(lanes + 8 * h), (__m512)each);
            offset[h] = (vf)_mm512_permutexvar_ps((__m512i)(lanes + 8 * h), (__m512)rest);
        }
        for (int pair = 0; pair < 2; pair++)
            store_u(to + (2 * i + pair) * 64, (vu)widen_pair(t.quad[i], pair, bits, scale, offset));
    }
}

/* Adds the products of 32 columns of up to 32 rows of x with a tile of each of two panels. stride: bytes between rows. */
INLINE void multiply(const uint16_t *x, int64_t stride, int rows, const uint8_t *a, const uint8_t *b) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (rows <= 16) return;
    _tile_loadd(5, (const uint8_t *)x + 16 * stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Stores the sums of `multiply`. both: whether there is a second panel. */
static void store_sums(const Product *p, int64_t panel, int both, int64_t row, int rows) {
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (rows > 16) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half <= both; half++)
            finish(p, row + r, panel + half, load_f(sums[r / 16 * 2 + half][r % 16]));
}

INLINE void clear_sums(void) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }

/* Panels whose tiles are bfloat16 already, with rows [row, row + rows) of x. */
static void multiply_panels(const Product *p, const uint8_t *tiles, int64_t first, int64_t count, int64_t row,
                            int rows) {
    int64_t columns = p->w->num_columns, panel_bytes = columns * 32;
    const uint16_t *x = (const uint16_t *)p->x + row * columns;
    for (int64_t i = 0; i < count; i += 2) {
        int both = i + 1 < count;
        const uint8_t *a = tiles + i * panel_bytes, *b = both ? a + panel_bytes : a;
        clear_sums();
        for (int64_t k = 0; k < columns; k += TILE) {
            if (rows <= 16) { /* with more, memory is not what takes time */
                int64_t next = k * 32 + ahead(k / TILE, columns / TILE, 2, 1024);
                fetch(a + next, 1024);
                fetch(b + next, 1024);
            }
            multiply(x + k, columns * 2, rows, a + k * 32, b + k * 32);
        }
        store_sums(p, first + i, both, row, rows);
    }
}

/* Up to 32 rows of x: a tile is multiplied as soon as it is wide, and never leaves the nearest cache. */
INLINE void widen_and_multiply(const Product *p, int64_t panel, int both, int rows, int bits, int groups,
                               int has_offset) {
    const Weight *w = p->w;
    int64_t columns = w->num_columns, step = tile_size(bits, groups, has_offset);
    const uint16_t *x = p->x;
    const uint8_t *a = w->panels + panel * num_tiles(w) * step, *b = both ? a + num_tiles(w) * step : a;
    uint8_t wide[2][2][1024] __attribute__((aligned(64)));
    clear_sums();
    for (int64_t k = 0; k < columns; k += TILE, a += step, b += step) {
        uint8_t (*to)[1024] = wide[k / TILE % 2];
        int64_t next = ahead(k / TILE, num_tiles(w), 2, step);
        widen_tile(a, next, w->shift, to[0], bits, groups, has_offset);
        widen_tile(b, next, w->shift, to[1], bits, groups, has_offset);
        multiply(x + k, columns * 2, rows, to[0], to[1]);
    }
    store_sums(p, panel, both, 0, rows);
}

INLINE void widen_panel(const Weight *w, int64_t panel, uint8_t *to, int bits, int groups, int has_offset) {
    int64_t step = tile_size(bits, groups, has_offset);
    const uint8_t *from = w->panels + panel * num_tiles(w) * step;
    for (int64_t tile = 0; tile < num_tiles(w); tile++)
        widen_tile(from + tile * step, ahead(tile, num_tiles(w), 1, step), w->shift, to + tile * 1024, bits, groups,
                   has_offset);
}

#define KIND(bits, groups, has_offset)                                                                            \
    __attribute__((noinline)) static void fused_##bits##groups##has_offset(const Product *p, int64_t panel,       \
                                                                           int both, int rows) {                  \
        widen_and_multiply(p, panel, both, rows, bits, groups, has_offset);                                       \
    }                                                                                                             \
    __attribute__((noinline)) static void widen_##bits##groups##has_offset(const Weight *w, int64_t panel,        \
                                                                           uint8_t *to) {                         \
        widen_panel(w, panel, to, bits, groups, has_offset);                                                      \
    }
EACH_KIND(KIND)
#undef KIND

static void amx_task(void *argument, int64_t index) {
    const Product *p = argument;
    const Weight *w = p->w;
    int64_t first = index * WIDE, count = num_panels(w) - first, panel_bytes = w->num_columns * 32;
    count = count < WIDE ? count : WIDE;
    if (w->bits != 16 && p->num_rows <= 32) {
        int rows = p->num_rows;
        configure(rows);
#define BODY(bits, groups, has_offset) \
    for (int64_t i = 0; i < count; i += 2) fused_##bits##groups##has_offset(p, first + i, i + 1 < count, rows)
        FOR_KIND(w, BODY)
#undef BODY
        _tile_release();
        return;
    }
    const uint8_t *tiles = w->panels + first * panel_bytes;
    if (w->bits != 16) {
        uint8_t *room = crane_scratch(WIDE * panel_bytes);
#define BODY(bits, groups, has_offset) \
    for (int64_t i = 0; i < count; i++) widen_##bits##groups##has_offset(w, first + i, room + i * panel_bytes)
        FOR_KIND(w, BODY)
#undef BODY
        tiles = room;
    }
    int configured = 0;
    for (int64_t row = 0; row < p->num_rows; row += 32) {
        int rows = p->num_rows - row < 32 ? (int)(p->num_rows - row) : 32;
        if (rows != configured) configure(configured = rows);
        multiply_panels(p, tiles, first, count, row, rows);
    }
    _tile_release();
}

void crane_amx_product(Product *p) { crane_parallel(amx_task, p, (num_panels(p->w) + WIDE - 1) / WIDE); }

int crane_has_amx(void) {
    static int known = -1;
    if (known < 0) known = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return known;
}
#else
int crane_has_amx(void) { return 0; }
#endif

