/* Logits as changes.h says. */
#include "changes.h"

void crane_change(const Changes *c, int64_t row, float *x, int64_t first, int64_t count, float *before) {
    for (int64_t i = first_place(c, row), end = first_place(c, row + 1); i < end; i += 16) {
        vi ids = SPREAD_I(-1);
        if (i + 16 <= end) ids = (vi)load_u(c->ids + i);
        else memcpy(&ids, c->ids + i, (end - i) * sizeof(int32_t));
        vi here = (vu)ids - (vu)SPREAD_I((int32_t)first) < (vu)SPREAD_I((int32_t)count); /* of -1 the distance is large */
        for (uint32_t left = lane_bits(here); left; left &= left - 1) {
            int64_t place = i + __builtin_ctz(left);
            float *logit = x + c->ids[place] - first;
            if (before) *before++ = *logit;
            *logit = changed(c, row, place, *logit);
        }
    }
}
