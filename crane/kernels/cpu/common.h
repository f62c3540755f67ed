/* What every file here shares: vectors of 16 lanes, number formats, the thread pool.

Vectors are GCC's and clang's own (`vector_size`): +, *, & and >> work on them, and the compiler makes one
AVX-512 register of each, or two AVX2 ones. Only what has no operator is written per instruction set. */
#pragma once
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this processor lacks AVX2, FMA or F16C"
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAVE_AMX
#endif
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef float vf __attribute__((vector_size(64)));    /* 16 float */
typedef int32_t vi __attribute__((vector_size(64)));  /* 16 int32 */
typedef uint32_t vu __attribute__((vector_size(64))); /* 16 uint32 */
typedef int8_t vb __attribute__((vector_size(16)));    /* 16 int8 */
typedef uint16_t vh __attribute__((vector_size(32))); /* 16 bfloat16 or float16, as bits */

#define INLINE static inline __attribute__((always_inline))
#define SPREAD(x) ((x) - (vf){}) /* 16 times the float x */
#define SPREAD_I(x) ((x) - (vi){}) /* 16 times the int32 x */

INLINE vu load_u(const void *p) { vu v; memcpy(&v, p, 64); return v; }
INLINE vf load_f(const void *p) { vf v; memcpy(&v, p, 64); return v; }
INLINE vh load_h(const void *p) { vh v; memcpy(&v, p, 32); return v; }
INLINE void store_f(void *p, vf v) { memcpy(p, &v, 64); }
INLINE void store_u(void *p, vu v) { memcpy(p, &v, 64); }
INLINE void store_h(void *p, vh v) { memcpy(p, &v, 32); }
INLINE void store_b(void *p, vi v) { vb b = __builtin_convertvector(v, vb); memcpy(p, &b, 16); }

INLINE vf from_bf16(vh v) { return (vf)(__builtin_convertvector(v, vu) << 16); }
/* round to nearest even, as torch does */
INLINE vu round_bf16(vf v) { vu u = (vu)v; return u + 0x7fff + ((u >> 16) & 1); }
INLINE vh to_bf16(vf v) {
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh((__m512)v); /* what is below 1e-38 becomes 0 */
#else
    return __builtin_convertvector(round_bf16(v) >> 16, vh);
#endif
}
INLINE float from_bf16_1(uint16_t v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t to_bf16_1(float f) { uint32_t u; memcpy(&u, &f, 4); return (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
INLINE float from_f16_1(uint16_t v) { return _cvtsh_ss(v); }
INLINE uint16_t to_f16_1(float f) { return _cvtss_sh(f, 0); }

INLINE vf from_f16(const void *p) {
#ifdef __AVX512F__
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#else
    union { vf all; __m256 half[2]; } v;
    v.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(p));
    v.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1));
    return v.all;
#endif
}

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vi max_i(vi a, vi b) { vi larger = a > b; return (a & larger) | (b & ~larger); }
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef int32_t vi8 __attribute__((vector_size(32)));
typedef int32_t vi4 __attribute__((vector_size(16)));
/* Of all lanes, by halves. */
INLINE float sum_f(vf v) {
    union { vf all; vf8 half[2]; } a = {v};
    union { vf8 all; vf4 half[2]; } b = {a.half[0] + a.half[1]};
    vf4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}
INLINE int32_t sum_i(vi v) {
    union { vi all; vi8 half[2]; } a = {v};
    union { vi8 all; vi4 half[2]; } b = {a.half[0] + a.half[1]};
    vi4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}
INLINE int32_t largest_i(vi v) {
    union { vi all; vi8 half[2]; } a = {v};
    vi8 larger = a.half[0] > a.half[1];
    union { vi8 all; vi4 half[2]; } b = {(a.half[0] & larger) | (a.half[1] & ~larger)};
    vi4 more = b.half[0] > b.half[1], c = (b.half[0] & more) | (b.half[1] & ~more);
    int32_t d = c[0] > c[2] ? c[0] : c[2], e = c[1] > c[3] ? c[1] : c[3];
    return d > e ? d : e;
}
/* Of what are numbers; -inf if none is. */
INLINE float largest_f(vf v) {
    union { vf all; float lane[16]; } a = {v};
    float most = -__builtin_inff();
    for (int i = 0; i < 16; i++) most = a.lane[i] > most ? a.lane[i] : most;
    return most;
}
/* A bit for each lane, which are all ones or all zeros. */
INLINE uint32_t lane_bits(vi lanes) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
    union { vi all; __m256 half[2]; } u = {lanes};
    return _mm256_movemask_ps(u.half[0]) | _mm256_movemask_ps(u.half[1]) << 8;
#endif
}
/* The larger one; b where either is no number. */
INLINE vf max_v(vf a, vf b) {
#ifdef __AVX512F__
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    vi larger = a > b;
    return (vf)(((vi)a & larger) | ((vi)b & ~larger));
#endif
}

/* exp to 2 ulp for x <= 88 and down to where it leaves float; -inf gives a number below 1e-37.
x = n ln 2 + r, exp(r) by its Taylor polynomial of degree 7 on |r| <= ln 2 / 2. */
INLINE vf exp_v(vf x) {
    x = max_v(x, SPREAD(-87.0f));
    vf shifted = x * SPREAD(1.44269504f) + SPREAD(12582912.0f); /* 1.5 * 2^23: n in the low bits */
    vf n = shifted - SPREAD(12582912.0f);
    vf r = x - n * SPREAD(0.693359375f) + n * SPREAD(2.12194440e-4f);
    vf p = SPREAD(1.9841270e-4f);
    const float inverse_factorials[] = {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) p = p * r + SPREAD(inverse_factorials[i]);
    return (vf)((vi)p + ((vi)shifted << 23));
}

/* 2^x to 3e-6, for what is rounded to bfloat16, of x < 127; below 1e-38 from -127 down. x = n + r, 2^r by a polynomial
on [0, 1] that is 1 at 0. */
INLINE vf exp2_v(vf x) {
#ifdef __AVX512DQ__
    vf r = (vf)_mm512_reduce_ps((__m512)x, 9); /* what is above the next lower integer */
#else
    x = max_v(x, SPREAD(-126.9f));
    vf shifted = x - SPREAD(0.5f) + SPREAD(12582912.0f), r = x - (shifted - SPREAD(12582912.0f));
#endif
    vf y = SPREAD(1.342675e-2f);
    y = y * r + SPREAD(5.224237e-2f);
    y = y * r + SPREAD(2.4128025e-1f);
    y = y * r + SPREAD(6.9304484e-1f);
    y = y * r + SPREAD(1.0f);
#ifdef __AVX512DQ__
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    return (vf)((vi)y + ((vi)shifted << 23));
#endif
}

/* Activations are bfloat16 or float32. */
enum { FLOAT32 = 0, BFLOAT16 = 1 };
INLINE vf load_as_f(const void *p, int64_t i, int dtype) {
    return dtype == BFLOAT16 ? from_bf16(load_h((const uint16_t *)p + i)) : load_f((const float *)p + i);
}
INLINE float load_as_f1(const void *p, int64_t i, int dtype) {
    return dtype == BFLOAT16 ? from_bf16_1(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}
INLINE void store_as(void *p, int64_t i, vf v, int dtype) {
    if (dtype == BFLOAT16) store_h((uint16_t *)p + i, to_bf16(v));
    else store_f((float *)p + i, v);
}
INLINE void store_as1(void *p, int64_t i, float v, int dtype) {
    if (dtype == BFLOAT16) ((uint16_t *)p)[i] = to_bf16_1(v);
    else ((float *)p)[i] = v;
}

/* 1 / (1 + e^-x), to what dtype can tell apart; x and what it is made of stay numbers */
INLINE vf sigmoid(vf x, int dtype) {
    x = max_v(x, SPREAD(-87.0f));
    vf e = dtype == BFLOAT16 ? exp2_v(x * SPREAD(-1.44269504f)) : exp_v(-x);
#ifdef __AVX512F__ /* a division takes as long as all the rest of the gate */
    vf sum = e + SPREAD(1.0f), y = (vf)_mm512_rcp14_ps((__m512)sum);
    return dtype == BFLOAT16 ? y : y + y * (SPREAD(1.0f) - sum * y);
#else
    return SPREAD(1.0f) / (e + SPREAD(1.0f));
#endif
}

INLINE vf silu_mul(vf gate, vf up, int dtype) { return gate * sigmoid(gate, dtype) * up; }

/* pool.c: calls task(argument, i) once for every i in [0, num_tasks), on all threads. */
void crane_parallel(void (*task)(void *, int64_t), void *argument, int64_t num_tasks);
int crane_threads(void);
/* Between these the pool is the calling thread's, and no thread of it sleeps. */
void crane_hold(void);
void crane_release(void);
/* record.c: run(argument), which returns not 0 when it fails; while the calling thread records, both are kept to be
called again, so argument (size bytes) says all there is to know. name: the kernel's, a literal. */
int32_t crane_call(const char *name, int32_t (*run)(const void *argument), const void *argument, size_t size);
/* amx.c: whether AMX may be used */
int crane_has_amx(void);
/* memory of the calling thread, at least so large, 64-byte aligned; its content is lost at the next call */
void *crane_scratch(size_t bytes);
/* the same once more: for what a job's tasks, which may need scratch of their own, read */
void *crane_input(size_t bytes);
