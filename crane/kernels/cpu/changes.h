/* What is done to logits before a token is taken from them: `Changes` in kernels/sampling.py says what each field is.
starts: NULL where nothing is listed for any row. */
#pragma once
#include "common.h"
#include <math.h>

typedef struct {
    const int32_t *starts, *ids;
    const float *counts, *bias, *repetition, *frequency, *presence;
    const int32_t *mask_of;
    const uint32_t *masks; /* [.., num_words] */
    int64_t num_words;
} Changes;

/* A row's places are from this up to the next row's. */
INLINE int64_t first_place(const Changes *c, int64_t row) { return c->starts ? c->starts[row] : 0; }

/* A logit at a place. It is the same to the bit wherever this is inlined, and no less for a larger logit: the screen
relies on both. So it is said which product is added unrounded. */
INLINE float changed(const Changes *c, int64_t row, int64_t place, float logit) {
    float count = c->counts[place], repetition = c->repetition[row];
    if (count >= 0) {
        logit = fmaf(-c->frequency[row], count, logit > 0 ? logit / repetition : logit * repetition);
        logit -= count > 0 ? c->presence[row] : 0;
    }
    return logit + c->bias[place];
}

/* Changes those of x, a row's logits of `count` tokens from `first` on, that are listed. before: what they were, in
the order of their places; or NULL. */
void crane_change(const Changes *c, int64_t row, float *x, int64_t first, int64_t count, float *before);
