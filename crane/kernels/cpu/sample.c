/* From logits to tokens: penalties, bias, masks, top-k, top-p, min-p, the draw. What each means is said, and computed
in torch, in kernels/sampling.py. A task is a row, so that nothing else has a part in what it gets. */
#include "changes.h"
#include "logits.h"

#define SAMPLE 64 /* of so many vectors one is looked at for a guess of top-p's threshold */

/* Top-k, and top-p among what it keeps: the least logit kept. */
static float threshold_k(Row *r, int64_t k, double top_p) {
    crane_collect(r, crane_reached(r, k), INFINITY, 0);
    float low = crane_threshold(r, 1, r->low, r->best, 0, k);
    if (top_p >= 1) return low;
    Split s = crane_split(r->list, r->weights, r->size, low);
    /* of those tied at the end only as many as fit */
    double mass = s.mass + (k - s.count) * (double)expf((low - r->best) * r->inverse);
    return crane_threshold(r, 0, low, r->best, 0, top_p * mass);
}

/* Between which logits top-p's threshold lies, by a sample of the row, to four standard deviations: without that the
list may be nearly the row. tail: the mass that is not kept. Returns whether most tokens are above. */
static int guess(Row *r, double tail, float *low, float *high) {
    vf sum = {};
    r->size = 0;
    for (int64_t i = 0; i + 16 <= r->vocab; i += 16 * SAMPLE, r->size += 16) {
        vf x = load_f(r->x + i), w = mass(r, x, r->best);
        store_f(r->list + r->size, x), store_f(r->weights + r->size, w);
        sum += w;
    }
    double all = sum_f(sum);
    float middle = crane_threshold(r, 0, -FLT_MAX, r->best, 0, all - tail / SAMPLE);
    double margin = 4 * sqrt(tail / SAMPLE * expf((middle - r->best) * r->inverse));
    if (margin > tail / SAMPLE) return 0;
    *low = fmaxf(*low, crane_threshold(r, 0, -FLT_MAX, middle, 0, all - tail / SAMPLE + margin));
    *high = crane_threshold(r, 0, middle, r->best, 0, all - tail / SAMPLE - margin);
    return crane_split(r->list, NULL, r->size, *high).count > r->size / 2;
}

/* Top-p without top-k: the least logit kept. The sums are those of all tokens. */
static float threshold_p(Row *r, double top_p) {
    double all = total(r), need = top_p * all, tail = all - need;
    /* tokens lighter than an equal share of the tail do not make up the tail: none of them is kept */
    float least = r->best + (logf(tail / r->vocab) - 1e-3f) * r->temperature, low, high = INFINITY;
    low = least = least > -FLT_MAX ? least : -FLT_MAX;
    int many = r->vocab > 512 * SAMPLE && guess(r, tail, &low, &high);
    crane_collect(r, low, high, many);
    double above = total(r);
    if ((high < INFINITY && above >= need) || (low > least && above + r->listed < need)) { /* it is not in between */
        low = least, high = INFINITY, above = 0;
        crane_collect(r, low, high, 0);
    }
    return crane_threshold(r, 0, low, fminf(high, r->best), above, need);
}

/* Floats as integers of the same order, and back. */
INLINE int32_t order(float f) { int32_t i; memcpy(&i, &f, 4); return i ^ ((i >> 31) & 0x7fffffff); }
INLINE float value(int32_t i) { float f; i ^= (i >> 31) & 0x7fffffff; memcpy(&f, &i, 4); return f; }

/* The least logit that over the temperature is not below `scaled`: division may make equals of logits that are not. */
static float least_reaching(float scaled, float temperature, float best) {
    int32_t low = order(-FLT_MAX), high = order(best);
    while (low < high) {
        int32_t middle = low + (int32_t)(((int64_t)high - low) >> 1);
        if (value(middle) / temperature >= scaled) high = middle;
        else low = middle + 1;
    }
    return value(low);
}

/* The first token with the largest logit; 0 where there is no number. */
static int64_t first(const Row *r) {
    for (int64_t c = 0; c < r->num_chunks; c++)
        for (int64_t i = c * CHUNK; r->tops[c] == r->best && i < r->vocab && i < (c + 1) * CHUNK; i++)
            if (r->x[i] == r->best) return i;
    return 0;
}

/* Of the tokens that reach `cut`, whose mass the sums are: where their mass in the order of their ids first exceeds
`uniform` times all of it. */
static int64_t pick(Row *r, float cut, double uniform) {
    double left = uniform * total(r);
    int64_t chunk = 0, token = 0, c = 0;
    for (; c < r->num_chunks; c++) {
        if (!(r->sums[c] > 0)) continue;
        chunk = c;
        if (left < r->sums[c]) break;
        left -= r->sums[c];
    }
    if (c == r->num_chunks) left = INFINITY; /* rounding left a little: the last token takes it */
    const float *x = chunk_at(r, chunk);
    for (int64_t i = 0; i < CHUNK; i += 16) {
        vf v = load_f(x + i), w = only(mass(r, v, r->best), v >= SPREAD(cut));
        for (int j = 0; j < 16; j++) {
            if (!(w[j] > 0)) continue;
            token = chunk * CHUNK + i + j;
            if (left < w[j]) return token;
            left -= w[j];
        }
    }
    return token;
}

typedef struct {
    float *logits; /* rows are stride apart */
    const float *temperature;
    const int32_t *top_k;
    const float *top_p, *min_p;
    const int64_t *seeds;
    const int32_t *choices, *positions;
    Changes changes;
    int64_t *drawn;
    int64_t rows, vocab, stride;
} Sample;

/* A number in [0, 1): 53 bits of Philox4x32-10, as `uniforms` has it. */
static double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
    uint32_t c[4] = {position, choice, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)c[0] * 0xD2511F53u, second = (uint64_t)c[2] * 0xCD9E8D57u;
        c[0] = (uint32_t)(second >> 32) ^ c[1] ^ key[0], c[1] = (uint32_t)second;
        c[2] = (uint32_t)(first >> 32) ^ c[3] ^ key[1], c[3] = (uint32_t)first;
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    return (double)((uint64_t)c[0] << 21 | c[1] >> 11) * 0x1p-53;
}

static void restore(const Changes *c, int64_t row, float *x, int64_t vocab, const float *before) {
    for (int64_t i = first_place(c, row); i < first_place(c, row + 1); i++)
        if (c->ids[i] >= 0 && c->ids[i] < vocab) x[c->ids[i]] = *before++;
}

/* The row without what the mask does not allow. */
static void mask(const float *x, const uint32_t *words, int64_t vocab, float *out) {
    for (int64_t i = 0; i < vocab; i++) out[i] = words[i >> 5] >> (i & 31) & 1 ? x[i] : -INFINITY;
}

/* The token of a row whose logits are changed already. */
static int64_t draw(const Sample *p, int64_t row, Row *r) {
    float temperature = p->temperature[row], top_p = p->top_p[row], min_p = p->min_p[row];
    int64_t k = p->top_k[row] && p->top_k[row] < r->vocab ? p->top_k[row] : r->vocab;
    r->temperature = temperature, r->inverse = 1 / temperature;
    int greedy = temperature == 0 || r->inverse > 1e38f, all = k == r->vocab && (top_p < 1 || min_p == 0);
    crane_scan(r, !greedy && all);
    float scaled = r->best / temperature;
    if (greedy || !(fabsf(scaled) <= FLT_MAX)) return first(r);
    float least = scaled + fmaxf(logf(min_p), NOTHING);
    if (k < r->vocab) least = fmaxf(least, threshold_k(r, k, top_p) / temperature);
    else if (top_p < 1) least = fmaxf(least, threshold_p(r, top_p) / temperature);
    float cut = least_reaching(least, temperature, r->best);
    if (!all || top_p < 1) crane_sum_up(r, cut);
    for (int64_t c = 0; c < r->num_chunks; c++)
        if (r->tops[c] < cut) r->sums[c] = 0;
    return pick(r, cut, uniform(p->seeds[row], p->choices[row], p->positions[row]));
}

static void sample_task(void *argument, int64_t row) {
    const Sample *p = argument;
    const Changes *c = &p->changes;
    Row r;
    float *x = p->logits + row * p->stride;
    int64_t places = first_place(c, row + 1) - first_place(c, row), masked = c->mask_of[row] >= 0 ? p->vocab : 0;
    float *before = crane_row(&r, x, p->vocab, places + masked), *allowed = before + places;
    crane_change(c, row, x, 0, p->vocab, before);
    if (masked) mask(x, c->masks + c->mask_of[row] * c->num_words, p->vocab, allowed), r.x = allowed;
    p->drawn[row] = draw(p, row, &r);
    restore(c, row, x, p->vocab, before);
}

static int32_t run_sample(const void *p) {
    return crane_parallel(sample_task, (void *)p, ((const Sample *)p)->rows), 0;
}

/* As `sample` in kernels/sampling.py; logits are afterwards what they were. drawn: [rows]. */
void crane_sample(float *logits, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
                  const int64_t *seeds, const int32_t *choices, const int32_t *positions, const Changes *changes,
                  int64_t *drawn, int64_t rows, int64_t vocab, int64_t stride) {
    Sample p = {logits, temperature, top_k, top_p, min_p, seeds, choices, positions, *changes, drawn, rows, vocab, stride};
    crane_call("sample", run_sample, &p, sizeof p);
}
