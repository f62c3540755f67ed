/* Weights of 4, 5, 6 or 8 bits with a scale and an offset per 32 or 16 of them, or of bfloat16 (bits: 16).

    weight[n, k] = scale[n, k / group] * q[n, k] + offset[n, k / group],  q unsigned

Sixteen rows of the weight make a panel; a panel is a run of tiles, each 32 columns wide:

    scale   float16 [32 / group][16]
    offset  float16 [32 / group][16]           only if the panel has offsets, else offset = -shift * scale
    low     uint8 [4][64]     8 bits: [8][64]  byte (16 rows x 4 columns) of quad i; i + 4 in the upper half
    high    uint8 [64] or [2][64]              5 bits: bit i is quad i's; 6 bits: two bits for each of 4 quads

so that one load has what one instruction needs: four neighbouring columns of sixteen rows (a "quad").

A bfloat16 panel is [num_columns / 2][16][2], the tiles of AMX themselves. */
#pragma once
#include "common.h"

#define LANES 16
#define TILE 32

typedef struct {
    uint8_t *panels;
    const float *bias; /* [num_rows], or NULL */
    int64_t num_rows, num_columns;
    int32_t bits, groups, has_offset, shift;
} Weight;

INLINE int64_t tile_bytes(const Weight *w) {
    if (w->bits == 16) return 1024;
    return 32 * w->groups * (1 + w->has_offset) + (w->bits == 8 ? 512 : 256 + 64 * (w->bits - 4));
}
INLINE int64_t num_tiles(const Weight *w) { return w->num_columns / TILE; }
INLINE int64_t num_panels(const Weight *w) { return (w->num_rows + LANES - 1) / LANES; }
