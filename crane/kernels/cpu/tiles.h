/* AMX, what products and attention share: tiles of 64 bytes a row, and 16 x 16 numbers transposed on the way. */
#pragma once
#include "common.h"
#ifdef __AMX_BF16__

typedef struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TileConfig;

/* rows: of each of the eight tiles. */
INLINE void configure_tiles(const int *rows) {
    TileConfig c = {.palette = 1};
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = rows[i];
    __asm__ volatile("" : : "r"(&c) : "memory"); /* the intrinsic only admits to reading 8 bytes of it */
    _tile_loadconfig(&c);
}

/* Rounded, side by side in each lane; of ties the larger. */
INLINE vu pair_bf16(vf a, vf b) { return ((vu)a + 0x8000) >> 16 | (((vu)b + 0x8000) & 0xffff0000); }

/* rows and columns of 16 x 16 numbers of 32 bits change places */
INLINE void transpose(const vu *from, vu *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)from[i], (__m512i)from[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)from[i], (__m512i)from[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) { /* b[4 * n + i]: lanes i, i + 4, ... of rows 4n to 4n + 3 */
        __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        to[i] = (vu)_mm512_shuffle_i32x4(low, low2, 0x88);
        to[8 + i] = (vu)_mm512_shuffle_i32x4(low, low2, 0xdd);
        to[4 + i] = (vu)_mm512_shuffle_i32x4(high, high2, 0x88);
        to[12 + i] = (vu)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}
#endif
