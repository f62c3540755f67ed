/* y = x @ weight.T + bias for the weights of weight.h.

Few rows of x are rounded to 8 bits, 32 values a scale, and multiplied as integers. More rows are multiplied in
bfloat16 by AMX where the processor has it, after the panels were turned into its tiles; that is exact in x. */
#include "weight.h"
#include <math.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MAX_ROWS 8 /* of x that one pass over the weight serves */

/* ---- unpacking */

typedef struct { vf scale[2], offset[2]; vu quad[8]; } Tile;

/* bits, groups and has_offset are constants wherever this is inlined */
INLINE void unpack(const uint8_t *from, int bits, int groups, int has_offset, float shift, Tile *t) {
    for (int g = 0; g < groups; g++) {
        t->scale[g] = from_f16(from + 32 * g);
        t->offset[g] = has_offset ? from_f16(from + 32 * (groups + g)) : t->scale[g] * SPREAD(-shift);
    }
    const uint8_t *low = from + 32 * groups * (1 + has_offset), *high = low + 256;
    for (int i = 0; i < 4; i++) {
        if (bits == 8) {
            t->quad[i] = load_u(low + 64 * i);
            t->quad[i + 4] = load_u(low + 64 * (i + 4));
            continue;
        }
        vu both = load_u(low + 64 * i);
        t->quad[i] = both & 0x0f0f0f0f;
        t->quad[i + 4] = (both >> 4) & 0x0f0f0f0f;
        if (bits == 5) {
            vu bit = load_u(high);
            t->quad[i] |= (bit << (4 - i)) & 0x10101010;
            t->quad[i + 4] |= (bit >> i) & 0x10101010;
        }
        if (bits == 6) {
            vu first = load_u(high), second = load_u(high + 64);
            t->quad[i] |= (i < 3 ? first << (4 - 2 * i) : first >> (2 * i - 4)) & 0x30303030;
            t->quad[i + 4] |= (i < 3 ? second << (4 - 2 * i) : second >> (2 * i - 4)) & 0x30303030;
        }
    }
}

/* Calls body with constants in place of the weight's description, so that each kind gets its own code. */
#define FOR_KIND(w, body)                                                              \
    switch ((w)->bits * 100 + (w)->groups * 10 + (w)->has_offset) {                    \
        case 410: body(4, 1, 0); break; case 411: body(4, 1, 1); break;                \
        case 420: body(4, 2, 0); break; case 421: body(4, 2, 1); break;                \
        case 510: body(5, 1, 0); break; case 511: body(5, 1, 1); break;                \
        case 610: body(6, 1, 0); break; case 620: body(6, 2, 0); break;                \
        case 810: body(8, 1, 0); break; case 820: body(8, 2, 0); break;                \
    }

/* ---- rows of the weight as they are: an embedding's look-up */

typedef struct { const Weight *w; const int64_t *ids; void *out; int64_t count; int32_t dtype; } Rows;

static void read_row(void *argument, int64_t index) {
    const Rows *p = argument;
    const Weight *w = p->w;
    int64_t row = p->ids[index], lane = row % LANES;
    const uint8_t *from = w->panels + row / LANES * num_tiles(w) * tile_bytes(w);
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

/* ---- few rows: integers */

/* Rows of x in 8 bits: q = round(x / scale), and what offsets multiply: scale * sum(q) over 32, 16 and 16 of them. */
typedef struct { float scale, sum, half[2]; } Round;

typedef struct {
    const Weight *w;
    const void *x;
    void *out;
    int64_t num_rows, out_stride, panels_per_task;
    int32_t dtype, out_dtype, method;
    int8_t *q;     /* [num_rows, num_columns] */
    Round *rounds; /* [num_rows, num_columns / 32] */
} Product;

static void round_row(void *argument, int64_t row) {
    const Product *p = argument;
    int64_t columns = p->w->num_columns;
    int8_t *q = p->q + row * columns;
    Round *rounds = p->rounds + row * columns / TILE;
    for (int64_t k = 0; k < columns; k += TILE) {
        vf half[2] = {load_as_f(p->x, row * columns + k, p->dtype), load_as_f(p->x, row * columns + k + 16, p->dtype)};
        vi size[2] = {(vi)half[0] & 0x7fffffff, (vi)half[1] & 0x7fffffff}; /* order of floats is that of their bits */
        vi larger = size[0] > size[1];
        vi all = (size[0] & larger) | (size[1] & ~larger);
        int32_t most = 0;
        for (int i = 0; i < 16; i++) most = all[i] > most ? all[i] : most;
        float largest;
        memcpy(&largest, &most, 4);
        float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0;
        Round r = {.scale = scale};
        for (int h = 0; h < 2; h++) {
            /* adding 1.5 * 2^23 leaves the nearest integer in the low bits */
            vi rounded = (vi)(half[h] * SPREAD(inverse) + SPREAD(12582912.0f)) - 0x4b400000;
            int32_t sum = 0;
            for (int i = 0; i < 16; i++) {
                sum += rounded[i];
                q[k + h * 16 + i] = (int8_t)rounded[i];
            }
            r.half[h] = scale * sum;
        }
        r.sum = r.half[0] + r.half[1];
        rounds[k / TILE] = r;
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

/* One panel times rows [row, row + count) of x; count is a constant wherever this is inlined. */
INLINE void integer_panel(const Product *p, int64_t panel, int64_t row, int count, int bits, int groups,
                          int has_offset) {
    const Weight *w = p->w;
    int64_t tiles = num_tiles(w), step = tile_bytes(w);
    const uint8_t *from = w->panels + panel * tiles * step;
    const int8_t *q = p->q + row * w->num_columns;
    const Round *rounds = p->rounds + row * tiles;
    vf sum[MAX_ROWS];
    for (int r = 0; r < count; r++) sum[r] = (vf){};
    for (int64_t tile = 0; tile < tiles; tile++, from += step) {
        for (int line = 0; line < step; line += 64) _mm_prefetch((const char *)from + 2048 + line, _MM_HINT_T0);
        Tile t;
        unpack(from, bits, groups, has_offset, w->shift, &t);
        for (int r = 0; r < count; r++) {
            const int8_t *some = q + r * w->num_columns + tile * TILE;
            const Round *round = rounds + r * tiles + tile;
            for (int g = 0; g < groups; g++) {
                vi whole = {};
                for (int i = g * 8 / groups; i < (g + 1) * 8 / groups; i++) whole = dot4(whole, t.quad[i], some + 4 * i);
                sum[r] += __builtin_convertvector(whole, vf) * t.scale[g] * SPREAD(round->scale);
                sum[r] += t.offset[g] * SPREAD(groups == 1 ? round->sum : round->half[g]);
            }
        }
    }
    for (int r = 0; r < count; r++) finish(p, row + r, panel, sum[r]);
}

#define PANEL(count, bits, groups, has_offset)                                                        \
    __attribute__((noinline)) static void panel_##count##_##bits##groups##has_offset(                  \
        const Product *p, int64_t panel, int64_t row) {                                                \
        integer_panel(p, panel, row, count, bits, groups, has_offset);                                 \
    }
#define PANELS(bits, groups, has_offset)                                                               \
    PANEL(1, bits, groups, has_offset) PANEL(2, bits, groups, has_offset) PANEL(4, bits, groups, has_offset) \
    PANEL(8, bits, groups, has_offset)
PANELS(4, 1, 0) PANELS(4, 1, 1) PANELS(4, 2, 0) PANELS(4, 2, 1) PANELS(5, 1, 0) PANELS(5, 1, 1)
PANELS(6, 1, 0) PANELS(6, 2, 0) PANELS(8, 1, 0) PANELS(8, 2, 0)

static void integer_task(void *argument, int64_t index) {
    const Product *p = argument;
    int64_t end = (index + 1) * p->panels_per_task, last = num_panels(p->w);
    for (int64_t panel = index * p->panels_per_task; panel < (end < last ? end : last); panel++)
        for (int64_t row = 0; row < p->num_rows;) {
            int64_t left = p->num_rows - row;
#define BODY(bits, groups, has_offset)                                                                         \
    if (left >= 8) panel_8_##bits##groups##has_offset(p, panel, row), row += 8;                              \
    else if (left >= 4) panel_4_##bits##groups##has_offset(p, panel, row), row += 4;                         \
    else if (left >= 2) panel_2_##bits##groups##has_offset(p, panel, row), row += 2;                         \
    else panel_1_##bits##groups##has_offset(p, panel, row), row += 1
            FOR_KIND(p->w, BODY)
#undef BODY
        }
}

static void integer_product(Product *p) {
    int64_t columns = p->w->num_columns, share = num_panels(p->w) / (crane_threads() * 8);
    p->panels_per_task = share < 1 ? 1 : share > 16 ? 16 : share;
    p->q = crane_scratch(p->num_rows * (columns + columns / TILE * sizeof(Round)));
    p->rounds = (Round *)(p->q + p->num_rows * columns);
    if (p->num_rows * columns < 8192)
        for (int64_t row = 0; row < p->num_rows; row++) round_row(p, row);
    else crane_parallel(round_row, p, p->num_rows);
    crane_parallel(integer_task, p, (num_panels(p->w) + p->panels_per_task - 1) / p->panels_per_task);
}

/* ---- more rows: bfloat16 on AMX */

#ifdef __AMX_BF16__
#define WIDE 4 /* panels a task turns into tiles and multiplies with all of x */

typedef struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TileConfig;

/* Tiles 0-3 are sums, 4 and 5 rows of x (the first 16, the next), 6 and 7 the weight's panels. */
INLINE void configure(int rows) {
    TileConfig c = {.palette = 1};
    int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 16;
    int tile_rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = tile_rows[i];
    __asm__ volatile("" : : "r"(&c) : "memory"); /* the intrinsic only admits to reading 8 bytes of it */
    _tile_loadconfig(&c);
}

/* One panel's tiles: bfloat16 [num_columns / 2][16][2]. */
INLINE void widen_panel(const Weight *w, int64_t panel, uint8_t *to, int bits, int groups, int has_offset) {
    int64_t step = tile_bytes(w);
    const uint8_t *from = w->panels + panel * num_tiles(w) * step;
    for (int64_t tile = 0; tile < num_tiles(w); tile++, from += step) {
        for (int line = 0; line < step; line += 64) _mm_prefetch((const char *)from + 2048 + line, _MM_HINT_T0);
        Tile t;
        unpack(from, bits, groups, has_offset, w->shift, &t);
        for (int i = 0; i < 8; i++) {
            int g = i * groups / 8;
            for (int pair = 0; pair < 2; pair++, to += 64) {
                vu even = (t.quad[i] >> (16 * pair)) & 255;
                vu odd = pair ? t.quad[i] >> 24 : (t.quad[i] >> 8) & 255;
                vf a = __builtin_convertvector((vi)even, vf) * t.scale[g] + t.offset[g];
                vf b = __builtin_convertvector((vi)odd, vf) * t.scale[g] + t.offset[g];
                store_u(to, (((vu)a + 0x8000) >> 16) | (((vu)b + 0x8000) & 0xffff0000));
            }
        }
    }
}

__attribute__((noinline)) static void widen(const Weight *w, int64_t panel, uint8_t *to) {
#define BODY(bits, groups, has_offset) widen_panel(w, panel, to, bits, groups, has_offset)
    FOR_KIND(w, BODY)
#undef BODY
}

/* Two panels times up to 32 rows of x. both: whether there is a second panel. */
INLINE void amx_block(const Product *p, const uint8_t *a, const uint8_t *b, int64_t panel, int both, int64_t row,
                      int rows) {
    int64_t columns = p->w->num_columns, stride = columns * 2;
    const uint16_t *x = (const uint16_t *)p->x + row * columns;
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (rows > 16)
        for (int64_t k = 0; k < columns; k += TILE, a += 1024, b += 1024) {
            _tile_loadd(4, x + k, stride);
            _tile_loadd(6, a, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, x + 16 * columns + k, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else
        for (int64_t k = 0; k < columns; k += TILE, a += 1024, b += 1024) {
            _tile_loadd(4, x + k, stride);
            _tile_loadd(6, a, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
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

static void amx_task(void *argument, int64_t index) {
    const Product *p = argument;
    const Weight *w = p->w;
    int64_t first = index * WIDE, count = num_panels(w) - first, panel_bytes = w->num_columns * 32;
    count = count < WIDE ? count : WIDE;
    const uint8_t *tiles = w->panels + first * panel_bytes;
    if (w->bits != 16) {
        uint8_t *room = crane_scratch(WIDE * panel_bytes);
        for (int64_t i = 0; i < count; i++) widen(w, first + i, room + i * panel_bytes);
        tiles = room;
    }
    int configured = 0;
    for (int64_t row = 0; row < p->num_rows; row += 32) {
        int rows = p->num_rows - row < 32 ? (int)(p->num_rows - row) : 32;
        if (rows != configured) configure(configured = rows);
        for (int64_t i = 0; i < count; i += 2) {
            int both = i + 1 < count;
            const uint8_t *a = tiles + i * panel_bytes;
            amx_block(p, a, both ? a + panel_bytes : a, first + i, both, row, rows);
        }
    }
    _tile_release();
}

int crane_has_amx(void) {
    static int known = -1;
    if (known < 0) known = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return known;
}
#else
int crane_has_amx(void) { return 0; }
#endif

static int32_t run_linear(const void *argument) {
    Product p = *(const Product *)argument;
#ifdef __AMX_BF16__
    if (p.method && crane_has_amx()) { /* which also asks the system for permission */
        crane_parallel(amx_task, &p, (num_panels(p.w) + WIDE - 1) / WIDE);
        return 0;
    }
#endif
    integer_product(&p);
    return 0;
}

/* x: [num_rows, num_columns] of dtype, contiguous. out: rows of out_dtype, out_stride elements apart, starting at
this weight's first column. method 0: integers; 1: AMX, for bfloat16 x where `crane_has_amx`. */
void crane_linear(const Weight *w, const void *x, int64_t num_rows, int32_t dtype, void *out, int64_t out_stride,
                  int32_t out_dtype, int32_t method) {
    Product p = {.w = w, .x = x, .out = out, .num_rows = num_rows, .out_stride = out_stride, .dtype = dtype,
                 .out_dtype = out_dtype, .method = method};
    crane_call("product", run_linear, &p, sizeof p);
}
