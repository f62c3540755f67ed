/* Weights of 4, 5, 6 or 8 bits with a scale and an offset per 32 or 16 of them, or of bfloat16 (bits: 16).

    weight[n, k] = scale[n, k / group] * q[n, k] + offset[n, k / group],  q unsigned

Sixteen rows of the weight make a panel; a panel is a run of tiles, each 32 columns wide:

    scale   float16 [32 / group][16]
    offset  float16 [32 / group][16]           only if the panel has offsets, else offset = -shift * scale
    low     uint8 [4][64]     8 bits: [8][64]  byte (16 rows x 4 columns) of quad i; i + 4 in the upper half
    high    uint8 [64] or [2][64]              5 bits: bit i is quad i's; 6 bits: two bits for each of 4 quads

so that one load has what one instruction needs: four neighbouring columns of sixteen rows (a "quad").

A bfloat16 panel is [num_columns / 2][16][2], the tiles of AMX themselves.

Where the first half of the rows is an MLP's gate and the second its up, the weight may be paired: each panel of gate is
followed by that of the same rows of up, so that who stores their sums has both. */
#pragma once
#include "common.h"

#define LANES 16
#define TILE 32
#define AHEAD 2048 /* bytes between what is fetched of a panel and what is used */

typedef struct {
    uint8_t *panels;
    const float *bias; /* [num_rows], or NULL */
    int64_t num_rows, num_columns;
    int32_t bits, groups, has_offset, shift;
    int32_t is_paired; /* then num_rows is a multiple of 32 */
    int32_t amx_rows;  /* from so many rows of bfloat16 x on AMX multiplies, where there is one; 0: never */
} Weight;

/* whether AMX multiplies so many rows; asks the system for permission, too */
INLINE int is_for_amx(const Weight *w, int64_t num_rows, int32_t dtype) {
    return dtype == BFLOAT16 && w->amx_rows && num_rows >= w->amx_rows && crane_has_amx();
}

INLINE int64_t tile_size(int bits, int groups, int has_offset) {
    return 32 * groups * (1 + has_offset) + (bits == 8 ? 512 : 256 + 64 * (bits - 4));
}
INLINE int64_t tile_bytes(const Weight *w) {
    return w->bits == 16 ? 1024 : tile_size(w->bits, w->groups, w->has_offset);
}
INLINE int64_t num_tiles(const Weight *w) { return w->num_columns / TILE; }
INLINE int64_t num_panels(const Weight *w) { return (w->num_rows + LANES - 1) / LANES; }

/* Where among the panels that of rows [row, row + 16) lies, and the other way round. */
INLINE int64_t panel_of(const Weight *w, int64_t row) {
    int64_t panel = row / LANES, half = w->num_rows / LANES / 2;
    return !w->is_paired ? panel : panel < half ? 2 * panel : 2 * (panel - half) + 1;
}
INLINE int64_t first_row(const Weight *w, int64_t panel) {
    return w->is_paired ? panel / 2 * LANES + panel % 2 * (w->num_rows / 2) : panel * LANES;
}

/* Where the tile is that shall be fetched while `tile` is used, counted from it: tiles ahead, and past the panel's end
in the panel that is read next, `wide` further on. size: bytes of a tile. */
INLINE int64_t ahead(int64_t tile, int64_t tiles, int wide, int64_t size) {
    return AHEAD / size * size + (tile + AHEAD / size < tiles ? 0 : (wide - 1) * tiles * size);
}
INLINE void fetch(const uint8_t *tile, int64_t size) {
    for (int line = 0; line < size; line += 64) _mm_prefetch((const char *)tile + line, _MM_HINT_T0);
}

/* A tile in registers. */
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

/* The kinds of weights: (bits, groups, has_offset). */
#define EACH_KIND(body)                                                          \
    body(4, 1, 0) body(4, 1, 1) body(4, 2, 0) body(4, 2, 1) body(5, 1, 0)        \
    body(5, 1, 1) body(6, 1, 0) body(6, 2, 0) body(8, 1, 0) body(8, 2, 0)

/* Calls body with constants in place of the weight's description, so that each kind gets its own code. */
#define FOR_KIND(w, body)                                                              \
    switch ((w)->bits * 100 + (w)->groups * 10 + (w)->has_offset) {                    \
        case 410: body(4, 1, 0); break; case 411: body(4, 1, 1); break;                \
        case 420: body(4, 2, 0); break; case 421: body(4, 2, 1); break;                \
        case 510: body(5, 1, 0); break; case 511: body(5, 1, 1); break;                \
        case 610: body(6, 1, 0); break; case 620: body(6, 2, 0); break;                \
        case 810: body(8, 1, 0); break; case 820: body(8, 2, 0); break;                \
    }
