/* Packing: from GGUF blocks, from codes taken apart elsewhere, or from bfloat16 into the panels of weight.h. */
#define _GNU_SOURCE
#include "weight.h"
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

/* 32 columns of one row. A second scale and offset only where groups are 16 columns wide. */
typedef struct { uint8_t q[TILE]; float scale[2], offset[2]; } Group;

typedef struct {
    const Weight *w;
    int32_t kind;                /* of blocks, see read_group */
    int32_t file;                /* where codes are read from, unless they are in memory */
    int64_t place;               /* of the first row in the file */
    _Atomic int *error;          /* what went wrong in reading: errno, or -1 where the file ends too early */
    const uint8_t *codes;        /* blocks; or [count, num_columns], signed ones are moved up by shift */
    const float *scale, *offset; /* of codes: [count, num_columns / group] */
    int64_t first, count, row_bytes;
} Pack;

enum { CODES, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 }; /* as in kernels/packed.py */

INLINE float half_at(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return from_f16_1(v); }

/* Scale and minimum i of a Q4_K or Q5_K block: six bits each in twelve bytes. */
INLINE void k_scale(const uint8_t *block, int i, Group *g) {
    const uint8_t *s = block + 4;
    int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    int minimum = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4;
    g->scale[0] = half_at(block) * scale;
    g->offset[0] = -(half_at(block + 2) * minimum);
}

/* Group `at` of a row in blocks. What the types mean is written out in kernels/blocks.py, the tests' reference. */
INLINE void read_group(int kind, const uint8_t *row, int64_t at, Group *g) {
    if (kind <= Q5_1) {
        int has_offset = kind == Q4_1 || kind == Q5_1, five = kind >= Q5_0, head = 2 + 2 * has_offset;
        const uint8_t *block = row + at * (head + 4 * five + 16), *low = block + head + 4 * five;
        g->scale[0] = half_at(block);
        if (has_offset) g->offset[0] = half_at(block + 2);
        uint32_t high = 0;
        if (five) memcpy(&high, block + head, 4);
        for (int k = 0; k < 16; k++) {
            g->q[k] = (low[k] & 15) | (high >> k & 1) << 4;
            g->q[k + 16] = low[k] >> 4 | (high >> (k + 16) & 1) << 4;
        }
    } else if (kind == Q8_0) {
        const uint8_t *block = row + at * 34;
        g->scale[0] = half_at(block);
        for (int k = 0; k < 32; k++) g->q[k] = block[2 + k] ^ 128;
    } else if (kind == Q6_K) {
        const uint8_t *block = row + at / 8 * 210;
        int i = at % 8, part = i % 4;
        const uint8_t *low = block + i / 4 * 64 + part % 2 * 32, *high = block + 128 + i / 4 * 32;
        const int8_t *scales = (const int8_t *)block + 192 + 2 * i;
        for (int h = 0; h < 2; h++) g->scale[h] = half_at(block + 208) * scales[h];
        for (int k = 0; k < 32; k++) g->q[k] = (low[k] >> part / 2 * 4 & 15) | (high[k] >> 2 * part & 3) << 4;
    } else {
        const uint8_t *block = row + at / 8 * (kind == Q4_K ? 144 : 176);
        int i = at % 8;
        const uint8_t *low = block + (kind == Q4_K ? 16 : 48) + i / 2 * 32;
        k_scale(block, i, g);
        for (int k = 0; k < 32; k++) {
            g->q[k] = low[k] >> i % 2 * 4 & 15;
            if (kind == Q5_K) g->q[k] |= (block[16 + k] >> i & 1) << 4;
        }
    }
}

INLINE void take_codes(const Pack *p, int64_t row, int64_t at, Group *g) {
    const uint8_t *from = p->codes + row * p->w->num_columns + at * TILE;
    int64_t groups = p->w->groups, first = (row * num_tiles(p->w) + at) * groups;
    for (int k = 0; k < TILE; k++) g->q[k] = from[k] + p->w->shift;
    for (int i = 0; i < groups; i++) {
        g->scale[i] = p->scale[first + i];
        if (p->w->has_offset) g->offset[i] = p->offset[first + i];
    }
}

/* kind is a constant wherever this is inlined */
INLINE void pack_panel(const Pack *p, int64_t index, int kind) {
    const Weight *w = p->w;
    int64_t groups = w->groups, left = p->count - index * LANES, rows = left < LANES ? left : LANES;
    uint8_t *to = w->panels + panel_of(w, p->first + index * LANES) * num_tiles(w) * tile_bytes(w);
    for (int64_t tile = 0; tile < num_tiles(w); tile++, to += tile_bytes(w)) {
        uint8_t quads[8][64] = {{0}};
        memset(to, 0, tile_bytes(w));
        uint16_t *scale = (uint16_t *)to, *offset = scale + LANES * groups;
        for (int64_t r = 0; r < rows; r++) {
            Group g = {0};
            if (kind == CODES) take_codes(p, index * LANES + r, tile, &g);
            else read_group(kind, p->codes + (index * LANES + r) * p->row_bytes, tile, &g);
            for (int i = 0; i < 8; i++) memcpy(&quads[i][r * 4], g.q + i * 4, 4);
            for (int i = 0; i < groups; i++) {
                scale[i * LANES + r] = to_f16_1(g.scale[i]);
                if (w->has_offset) offset[i * LANES + r] = to_f16_1(g.offset[i]);
            }
        }
        uint8_t *low = to + 32 * groups * (1 + w->has_offset), *high = low + 256;
        if (w->bits == 8) {
            memcpy(low, quads, 512);
            continue;
        }
        for (int i = 0; i < 4; i++)
            for (int b = 0; b < 64; b++) low[i * 64 + b] = (quads[i][b] & 15) | (quads[i + 4][b] & 15) << 4;
        for (int i = 0; i < 8 && w->bits == 5; i++)
            for (int b = 0; b < 64; b++) high[b] |= (quads[i][b] >> 4) << i;
        for (int i = 0; i < 8 && w->bits == 6; i++)
            for (int b = 0; b < 64; b++) high[i / 4 * 64 + b] |= (quads[i][b] >> 4) << 2 * (i % 4);
    }
}

/* A bfloat16 panel: AMX's tiles themselves, pairs of columns of sixteen rows side by side. */
static void pack_bf16_panel(const Pack *p, int64_t index) {
    int64_t pairs = p->w->num_columns / 2, left = p->count - index * LANES;
    uint32_t *to = (uint32_t *)p->w->panels + panel_of(p->w, p->first + index * LANES) * pairs * LANES;
    for (int64_t tile = 0; tile < pairs; tile += LANES)
        for (int64_t r = 0; r < LANES; r++) {
            const uint8_t *from = p->codes + ((index * LANES + r) * pairs + tile) * 4;
            for (int64_t k = 0; k < LANES; k++) {
                uint32_t pair = 0;
                if (r < left) memcpy(&pair, from + 4 * k, 4);
                to[(tile + k) * LANES + r] = pair;
            }
        }
}

static void pack_one(const Pack *p, int64_t index) {
#define KIND(kind) case kind: pack_panel(p, index, kind); break
    switch (p->kind) {
        KIND(CODES); KIND(Q4_0); KIND(Q4_1); KIND(Q5_0); KIND(Q5_1); KIND(Q8_0); KIND(Q4_K); KIND(Q5_K); KIND(Q6_K);
        case BF16: pack_bf16_panel(p, index);
    }
#undef KIND
}

static int read_bytes(int file, uint8_t *to, int64_t count, int64_t offset) {
    while (count) {
        int64_t got = pread(file, to, count, offset);
        if (!got) return -1;
        if (got < 0 && errno != EINTR) return errno;
        if (got > 0) to += got, offset += got, count -= got;
    }
    return 0;
}

static void pack_task(void *argument, int64_t index) {
    const Pack *p = argument;
    if (!p->error) return pack_one(p, index);
    Pack own = *p;
    own.first += index * LANES;
    own.count -= index * LANES;
    int64_t bytes = (own.count < LANES ? own.count : LANES) * p->row_bytes;
    uint8_t *rows = crane_scratch(bytes);
    int error = read_bytes(p->file, rows, bytes, p->place + index * LANES * p->row_bytes);
    own.codes = rows;
    if (error) atomic_store(p->error, error);
    else pack_one(&own, 0);
}

static void pack_all(const Pack *p) { crane_parallel(pack_task, (void *)p, (p->count + LANES - 1) / LANES); }

/* Rows [first, first + count) of a weight, first a multiple of 16. kind CODES: codes are [count, num_columns], scale
and offset [count, num_columns / group]; else codes are blocks, row_bytes a row, or bfloat16 [count, num_columns]. */
void crane_pack(const Weight *w, int32_t kind, const uint8_t *codes, int64_t row_bytes, const float *scale,
                const float *offset, int64_t first, int64_t count) {
    Pack p = {.w = w, .kind = kind, .codes = codes, .scale = scale, .offset = offset, .first = first, .count = count,
              .row_bytes = row_bytes};
    pack_all(&p);
}

/* The same from an open file, where the rows begin at `place`. Returns 0, errno, or -1 where it ends too early. */
int32_t crane_pack_file(const Weight *w, int32_t kind, int32_t file, int64_t place, int64_t row_bytes, int64_t first,
                        int64_t count) {
    _Atomic int error = 0;
    Pack p = {.w = w, .kind = kind, .file = file, .place = place, .error = &error, .first = first, .count = count,
              .row_bytes = row_bytes};
    pack_all(&p);
    return error;
}

int64_t crane_weight_bytes(const Weight *w) { return num_panels(w) * num_tiles(w) * tile_bytes(w); }
