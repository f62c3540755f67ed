/* A row of logits on the way to a token: what sample.c and logprobs.c look for in it. NaN counts as -inf.

A row is read from memory once, for the largest of every 64 logits and for its mass, exp((x - best) / temperature), by
chunks; what is looked at again is in a near cache. Thresholds are found by halving the range of a list of candidates:
nothing is sorted, equals stay together. */
#pragma once
#include "common.h"
#include <float.h>
#include <math.h>

#define CHUNK 1024
#define NOTHING -87.0f /* the logarithm of a mass that no sum notices */

typedef struct {
    const float *x; /* [vocab] */
    int64_t vocab, num_chunks;
    float best, temperature, inverse; /* the largest logit; inverse: 1 / temperature */
    float low, high;       /* what the last `collect` was asked for; INFINITY before */
    vf *maxima;            /* [num_chunks], of every 16th logit of a chunk */
    float *tops;           /* [num_chunks], the largest of a chunk */
    double *sums;          /* [num_chunks], mass */
    float *list, *weights; /* candidates and their mass, room for all and 16 more */
    float *few, *lighter;  /* the same of what is left of them */
    int32_t *ends;         /* [num_chunks], how long the list is behind a chunk */
    int64_t size;          /* of the list */
    double listed;         /* its mass */
    float last[CHUNK];     /* the last chunk, filled up with -inf */
} Row;

INLINE vf only(vf v, vi lanes) { return (vf)((vi)v & lanes); }
INLINE vf choose(vi lanes, vf v, float other) { return (vf)(((vi)v & lanes) | ((vi)SPREAD(other) & ~lanes)); }

/* Writes the lanes side by side, and whatever behind them, 16 in all; returns how many they are. */
INLINE int64_t append(float *to, vf v, vi lanes) {
#ifdef __AVX512F__
    uint32_t bits = lane_bits(lanes);
    store_f(to, (vf)_mm512_maskz_compress_ps(bits, (__m512)v));
    return __builtin_popcount(bits);
#else
    int64_t count = 0;
    for (int i = 0; i < 16; i++) to[count] = v[i], count -= lanes[i];
    return count;
#endif
}

INLINE const float *chunk_at(const Row *r, int64_t chunk) {
    return (chunk + 1) * CHUNK <= r->vocab ? r->x + chunk * CHUNK : r->last;
}

/* exp((x - best) / temperature) to 2.2e-7 of it, where it is not below `NOTHING`; best is not below x. As a power of 2,
whose fraction r in [-0.5, 0.5] goes into a minimax polynomial. */
INLINE vf mass(const Row *r, vf x, float best) {
    vf t = max_v(x - SPREAD(best), SPREAD(NOTHING * r->temperature)), scale = SPREAD(r->inverse * 1.44269504f);
    vf shifted = t * scale + SPREAD(12582912.0f), n = shifted - SPREAD(12582912.0f); /* 1.5 * 2^23: n in the low bits */
    vf fraction = t * scale - n, p = SPREAD(1.32764717e-3f);
    const float factors[] = {9.67554154e-3f, 5.55071328e-2f, 0.240221197f, 0.693146967f, 1.00000007f};
    for (int i = 0; i < 5; i++) p = p * fraction + SPREAD(factors[i]);
    return (vf)((vi)p + ((vi)shifted << 23));
}
INLINE double total(const Row *r) {
    double sum = 0;
    for (int64_t c = 0; c < r->num_chunks; c++) sum += r->sums[c];
    return sum;
}

/* What a threshold in the middle of a range would do to a list: the mass above it, how many are above, the least of
them and the largest of the others. */
typedef struct { double mass; int64_t count; float above, below; } Split;

/* The memory of a row, and `extra` floats of the caller's. */
float *crane_row(Row *r, const float *x, int64_t vocab, int64_t extra);
/* Maxima, and if wanted the mass of every chunk. */
void crane_scan(Row *r, int with_mass);
/* Puts the tokens from `low` up to `high` on the list, in order, and the mass of those that reach `high` into the sums.
low > -inf. many: most do, and the sums are those of all: then only the others' mass is computed. */
void crane_collect(Row *r, float low, float high, int many);
/* Makes the sums those of the tokens that reach `cut`. */
void crane_sum_up(Row *r, float cut);
Split crane_split(const float *x, const float *weights, int64_t size, float middle);
/* The least value of the list above which less than `need` lies, the list's own mass (with `count` every token's is 1)
and `beyond`. It is in [low, high]. */
float crane_threshold(Row *r, int count, float low, float high, double beyond, double need);
/* A logit that the `count` best reach, and few others. */
float crane_reached(Row *r, int64_t count);
