/* Products on AMX, the matrix unit: bfloat16 x with a weight that is bfloat16, or is turned into it on the way. */
#include "product.h"
#include "tiles.h"
#ifdef HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Tiles 0-3 are sums, 4 and 5 rows of x (the first 16, the next), 6 and 7 the weight's panels. */
static void configure(int rows) {
    int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 16;
    configure_tiles((const int[8]){first, first, second, second, first, second, 16, 16});
}

#define WIDE 4 /* panels a task takes of up to 32 rows of x */

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

/* The sums of `multiply` in memory, [2 of 16 rows][2 panels][16][16]. */
INLINE void keep_sums(float *sums, int rows) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (rows <= 16) return;
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

INLINE void load_sums(const float *sums, int rows) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (rows <= 16) return;
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}

#define PAST_CACHES (4 << 20) /* bytes from which sums are written past the caches, which read their places first */

/* Stores a row's sums of one or two panels, as they lie in `keep_sums`. */
INLINE void finish_pair(const Product *p, int64_t row, int64_t panel, int both, const float *sums) {
    int64_t first = panel * LANES;
    vf a = load_f(sums), b = load_f(sums + 256);
    if (p->is_gated) return finish_gated(p, row, panel, a, b);
    if (!both || first + 2 * LANES > p->w->num_rows || p->out_dtype != BFLOAT16 || p->w->is_paired) {
        finish(p, row, panel, a);
        if (both) finish(p, row, panel + 1, b);
        return;
    }
    if (p->w->bias) a += load_f(p->w->bias + first), b += load_f(p->w->bias + first + LANES);
    uint16_t *to = (uint16_t *)p->out + row * p->out_stride + first;
    __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    int past = p->num_rows > 32 && p->num_rows * p->w->num_rows * 2 > PAST_CACHES && (uintptr_t)to % 64 == 0;
    if (past) _mm512_stream_si512((__m512i *)to, rounded); /* `many_rows` waits for all of them */
    else store_u(to, (vu)rounded);
}

static void store_sums(const Product *p, int64_t panel, int both, int rows) {
    float sums[1024] __attribute__((aligned(64)));
    keep_sums(sums, rows);
    for (int r = 0; r < rows; r++) finish_pair(p, r, panel, both, sums + r / 16 * 512 + r % 16 * 16);
}

INLINE void clear_sums(void) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }

/* Panels whose tiles are bfloat16 already, with up to 32 rows of x. */
static void multiply_panels(const Product *p, int64_t first, int64_t count) {
    int64_t columns = p->w->num_columns, panel_bytes = columns * 32, rows = p->num_rows;
    const uint16_t *x = p->x;
    for (int64_t i = first; i < first + count; i += 2) {
        int both = i + 1 < first + count;
        const uint8_t *a = p->w->panels + i * panel_bytes, *b = both ? a + panel_bytes : a;
        clear_sums();
        for (int64_t k = 0; k < columns; k += TILE) {
            if (rows <= 16) { /* with more, memory is not what takes time */
                int64_t next = k * 32 + ahead(k / TILE, columns / TILE, 2, 1024);
                fetch(a + next, 1024);
                fetch(b + next, 1024);
            }
            multiply(x + k, columns * 2, rows, a + k * 32, b + k * 32);
        }
        store_sums(p, i, both, rows);
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
    store_sums(p, panel, both, rows);
}

/* More than 32 rows. x is laid out in tiles first. A task takes some panels, two at a time, and of their columns a
block at a time, so that the nearest cache keeps the block while all rows pass; sums wait in memory for the next block.
Before each step a little of what comes next is fetched and widened, so that memory and vector units work while tiles
are multiplied. A row's products are added up in the same order as with fewer rows: its sums have the same bits. */
#define DEPTH 7         /* tiles of columns in a block */
#define MOST_ROWS 512   /* at a time */
#define MOST_PANELS 16  /* a task's */
#define CACHE (1 << 20) /* bytes of x that stay in the second cache beside the rest */

typedef struct {
    const Product *p;
    uint8_t *x; /* [blocks of columns][blocks of 32 rows][tiles][32][32] */
    int64_t row, rows, row_blocks, panels_per_task;
    int is_large; /* x, for the second cache: each block of columns meets all panels of a task before the next does */
} Many;

/* Tiles [tile, tile + count) of one or two panels from `panel` on. */
typedef struct { int64_t panel, panels, tile, count; } Block;

/* What is done at each step: `lines` of both panels of a block that comes are fetched, `x_lines` of x, and, evenly over
`steps`, the tiles of the next block are widened. */
typedef struct {
    const uint8_t *weight[2], *x;
    int64_t lines, x_lines, steps, due, done;
    Block next;
    uint8_t *room;
} Ahead;

static void lay_out(void *argument, int64_t row_block) {
    const Many *m = argument;
    int64_t columns = m->p->w->num_columns, tiles = columns / TILE, rows = min(m->rows - row_block * 32, 32);
    const uint16_t *from = (const uint16_t *)m->p->x + (m->row + row_block * 32) * columns;
    for (int64_t tile = 0; tile < tiles; tile += DEPTH) {
        int64_t count = min(tiles - tile, DEPTH);
        uint8_t *to = m->x + (tile * m->row_blocks + row_block * count) * 2048;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t t = 0; t < count; t++)
                store_u(to + t * 2048 + r * 64, load_u(from + r * columns + (tile + t) * TILE));
    }
}

/* Block `at` of a task's: all pairs of a group of panels, then the next columns, then the next group; none past the
last, `blocks`. */
INLINE Block block_at(const Weight *w, int64_t first, int64_t panels, int64_t group, int64_t at, int64_t blocks) {
    int64_t column_blocks = (num_tiles(w) + DEPTH - 1) / DEPTH;
    int64_t pair = at / (group * column_blocks) * group + at % group, tile = at / group % column_blocks * DEPTH;
    if (at >= blocks) return (Block){0};
    return (Block){first + 2 * pair, min(panels - 2 * pair, 2), tile, min(num_tiles(w) - tile, DEPTH)};
}

INLINE const uint8_t *block_start(const Weight *w, const Block *block, int64_t step) {
    return w->panels + (block->panel * num_tiles(w) + block->tile) * step;
}

/* Widens the next tile of n->next: those of its first panel, then those of its second. */
INLINE void widen_next(const Weight *w, Ahead *n, int bits, int groups, int has_offset) {
    int64_t step = tile_size(bits, groups, has_offset), at = n->done++, count = n->next.count;
    const uint8_t *from = block_start(w, &n->next, step) + (at < count ? at : at - count + num_tiles(w)) * step;
    widen_tile(from, 0, w->shift, n->room + at * 1024, bits, groups, has_offset);
}

INLINE void look_ahead(const Weight *w, Ahead *n, int bits, int groups, int has_offset) {
    for (int64_t i = 0; i < n->lines; i++) /* in turns, which is clearly faster */
        for (int h = 0; h < 2; n->weight[h++] += 64) _mm_prefetch((const char *)n->weight[h], _MM_HINT_T0);
    for (int64_t i = 0; i < n->x_lines; i++, n->x += 64) _mm_prefetch((const char *)n->x, _MM_HINT_T1);
    if (bits == 16) return;
    for (n->due += n->next.panels * n->next.count; n->due >= n->steps; n->due -= n->steps)
        widen_next(w, n, bits, groups, has_offset);
}

/* Starts to look ahead from block `at`. bytes: of a tile of the weight. */
INLINE void start_ahead(const Many *m, Ahead *n, const Block *block, int64_t pair, int64_t group, const Block *fetched,
                        int64_t bytes) {
    const Weight *w = m->p->w;
    const uint8_t *from = block_start(w, fetched, bytes);
    n->weight[0] = from, n->weight[1] = fetched->panels < 2 ? from : from + num_tiles(w) * bytes;
    n->lines = fetched->count ? (bytes / 64 + m->row_blocks - 1) / m->row_blocks : 0;
    n->steps = m->row_blocks * block->count, n->due = n->done = 0;
    /* every pair of the group fetches its share of the next columns of x */
    n->x_lines = m->is_large && block->tile + block->count < num_tiles(w) ? (32 + group - 1) / group : 0;
    n->x = m->x + (block->tile + block->count) * m->row_blocks * 2048 + pair * n->steps * n->x_lines * 64;
}

/* Stores the sums of panels [first, first + panels), row after row. */
static void finish_rows(const Many *m, int64_t first, int64_t panels, const float *sums) {
    for (int64_t r = 0; r < m->rows; r++)
        for (int64_t i = 0; i < panels; i += 2)
            finish_pair(m->p, m->row + r, first + i, i + 1 < panels,
                        sums + (i / 2 * m->row_blocks + r / 32) * 1024 + r / 16 % 2 * 512 + r % 16 * 16);
}

/* Adds to the sums of two panels and all rows what a block of columns, whose tiles are at a and b, gives. */
INLINE void multiply_block(const Many *m, const Block *block, const uint8_t *a, const uint8_t *b, float *sums,
                           Ahead *ahead, int bits, int groups, int has_offset) {
    const uint8_t *x = m->x + block->tile * m->row_blocks * 2048;
    for (int64_t r = 0; r < m->row_blocks; r++, sums += 1024) {
        int rows = min(m->rows - r * 32, 32);
        if (block->tile) load_sums(sums, rows);
        else clear_sums();
        for (int64_t t = 0; t < block->count; t++, x += 2048) {
            look_ahead(m->p->w, ahead, bits, groups, has_offset);
            multiply((const uint16_t *)x, 64, rows, a + t * 1024, b + t * 1024);
        }
        keep_sums(sums, rows);
    }
}

INLINE void many_rows(const Many *m, int64_t first, int64_t panels, int bits, int groups, int has_offset) {
    const Weight *w = m->p->w;
    int64_t tiles = num_tiles(w), bytes = bits == 16 ? 1024 : tile_size(bits, groups, has_offset);
    int64_t pairs = (panels + 1) / 2, group = m->is_large ? pairs : 1;
    int64_t each = group * ((tiles + DEPTH - 1) / DEPTH), blocks = pairs / group * each;
    uint8_t wide[2][2 * DEPTH * 1024] __attribute__((aligned(64)));
    float *sums = crane_scratch(pairs * m->row_blocks * 4096);
    Ahead ahead = {.next = block_at(w, first, panels, group, 0, blocks), .room = wide[0]};
    if (bits != 16)
        while (ahead.done < ahead.next.panels * ahead.next.count) widen_next(w, &ahead, bits, groups, has_offset);
    for (int64_t at = 0; at < blocks; at++) {
        Block block = ahead.next, after = block_at(w, first, panels, group, at + 2, blocks);
        const uint8_t *a = bits == 16 ? block_start(w, &block, bytes) : wide[at % 2];
        const uint8_t *b = block.panels < 2 ? a : a + (bits == 16 ? tiles : block.count) * 1024;
        ahead.next = block_at(w, first, panels, group, at + 1, blocks), ahead.room = wide[(at + 1) % 2];
        start_ahead(m, &ahead, &block, at % group, group, bits == 16 ? &ahead.next : &after, bytes);
        multiply_block(m, &block, a, b, sums + (block.panel - first) / 2 * m->row_blocks * 1024, &ahead, bits, groups,
                       has_offset);
    }
    finish_rows(m, first, panels, sums);
    _mm_sfence();
}

#define KIND(bits, groups, has_offset)                                                                            \
    __attribute__((noinline)) static void fused_##bits##groups##has_offset(const Product *p, int64_t panel,       \
                                                                           int both, int rows) {                  \
        widen_and_multiply(p, panel, both, rows, bits, groups, has_offset);                                       \
    }                                                                                                             \
    __attribute__((noinline)) static void many_##bits##groups##has_offset(const Many *m, int64_t first,           \
                                                                          int64_t panels) {                       \
        many_rows(m, first, panels, bits, groups, has_offset);                                                    \
    }
EACH_KIND(KIND)
#undef KIND

static void few_task(void *argument, int64_t index) {
    const Product *p = argument;
    const Weight *w = p->w;
    int64_t first = index * WIDE, count = min(num_panels(w) - first, WIDE);
    configure(p->num_rows);
    if (w->bits == 16) multiply_panels(p, first, count);
#define BODY(bits, groups, has_offset) \
    for (int64_t i = 0; i < count; i += 2) fused_##bits##groups##has_offset(p, first + i, i + 1 < count, p->num_rows)
    FOR_KIND(w, BODY)
#undef BODY
    _tile_release();
}

static void many_task(void *argument, int64_t index) {
    const Many *m = argument;
    const Weight *w = m->p->w;
    int64_t first = index * m->panels_per_task, panels = min(num_panels(w) - first, m->panels_per_task);
    configure(32);
    if (w->bits == 16) many_rows(m, first, panels, 16, 0, 0);
#define BODY(bits, groups, has_offset) many_##bits##groups##has_offset(m, first, panels)
    FOR_KIND(w, BODY)
#undef BODY
    _tile_release();
}

void crane_amx_product(Product *p) {
    int64_t panels = num_panels(p->w), most = crane_threads() * MOST_PANELS;
    if (p->num_rows <= 32) {
        crane_parallel(few_task, p, (panels + WIDE - 1) / WIDE);
        return;
    }
    int64_t tasks = (panels + most - 1) / most * crane_threads(), each = (panels + tasks - 1) / tasks;
    Many m = {.p = p, .panels_per_task = (each + 1) / 2 * 2};
    for (; m.row < p->num_rows; m.row += m.rows) {
        m.rows = min(p->num_rows - m.row, MOST_ROWS);
        m.row_blocks = (m.rows + 31) / 32;
        m.is_large = m.rows * p->w->num_columns * 2 > CACHE;
        m.x = crane_input(m.row_blocks * 64 * p->w->num_columns);
        crane_parallel(lay_out, &m, m.row_blocks);
        crane_parallel(many_task, &m, (panels + m.panels_per_task - 1) / m.panels_per_task);
    }
}

int crane_has_amx(void) {
    static int known = -1;
    if (known < 0) known = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return known;
}
#else
int crane_has_amx(void) { return 0; }
#endif

