/* Searches in a row of logits; what each does is said in logits.h. */
#include "logits.h"

float *crane_row(Row *r, const float *x, int64_t vocab, int64_t extra) {
    int64_t chunks = r->num_chunks = (vocab + CHUNK - 1) / CHUNK, room = chunks * CHUNK + 16;
    r->x = x, r->vocab = vocab;
    r->maxima = crane_scratch(chunks * (sizeof(vf) + sizeof(double) + 8) + (4 * room + extra) * sizeof(float));
    r->list = (float *)(r->maxima + chunks), r->weights = r->list + room;
    r->few = r->weights + room, r->lighter = r->few + room;
    r->sums = (double *)(r->lighter + room), r->tops = (float *)(r->sums + chunks);
    r->ends = (int32_t *)(r->tops + chunks);
    r->low = r->high = INFINITY;
    return r->tops + 2 * chunks;
}

void crane_scan(Row *r, int with_mass) {
    r->best = -INFINITY;
    for (int64_t i = r->vocab / CHUNK * CHUNK, j = 0; j < CHUNK; i++, j++)
        r->last[j] = i < r->vocab ? r->x[i] : -INFINITY;
    for (int64_t c = 0; c < r->num_chunks; c++) {
        const float *x = chunk_at(r, c);
        vf a = SPREAD(-INFINITY), b = a, sum = {}, more = {};
        for (int64_t i = 0; i < CHUNK; i += 32) a = max_v(load_f(x + i), a), b = max_v(load_f(x + i + 16), b);
        float top = r->tops[c] = largest_f(r->maxima[c] = max_v(a, b));
        r->best = top > r->best ? top : r->best;
        for (int64_t i = 0; with_mass && i < CHUNK; i += 32)
            sum += mass(r, load_f(x + i), top), more += mass(r, load_f(x + i + 16), top);
        r->sums[c] = top > -INFINITY ? sum_f(sum + more) : 0;
    }
    for (int64_t c = 0; with_mass && c < r->num_chunks; c++)
        r->sums[c] *= exp((double)(r->tops[c] - r->best) * r->inverse);
}

void crane_collect(Row *r, float low, float high, int many) {
    r->size = 0, r->listed = 0, r->low = low, r->high = high;
    for (int64_t c = 0; c < r->num_chunks; c++) {
        const float *x = chunk_at(r, c);
        float found[CHUNK + 16];
        int64_t size = 0;
        for (int64_t i = 0; (many || r->tops[c] >= low) && i < CHUNK; i += 16) {
            vf v = load_f(x + i);
            size += append(found + size, v, many ? v < SPREAD(high) : v >= SPREAD(low));
        }
        store_f(found + size, SPREAD(-INFINITY));
        vf sum = {};
        for (int64_t i = 0; i < size; i += 16) {
            vf v = load_f(found + i);
            vi higher = v >= SPREAD(high);
            if (many) sum += mass(r, v, r->best); /* behind the end it is nothing */
            else if (high < INFINITY) sum += only(mass(r, v, r->best), higher);
            r->size += append(r->list + r->size, v, (v >= SPREAD(low)) & ~higher);
        }
        r->sums[c] = many ? fmax(r->sums[c] - sum_f(sum), 0) : sum_f(sum), r->ends[c] = r->size;
    }
    store_f(r->list + r->size, SPREAD(-INFINITY));
    for (int64_t i = 0; i < r->size; i += CHUNK) {
        vf sum = {};
        for (int64_t j = i; j < i + CHUNK && j < r->size; j += 16) {
            vf v = load_f(r->list + j), w = mass(r, v, r->best);
            store_f(r->weights + j, w);
            sum += w;
        }
        r->listed += sum_f(sum);
    }
}

void crane_sum_up(Row *r, float cut) {
    if (!(r->low <= cut && cut <= r->high)) return crane_collect(r, cut, cut, 0);
    for (int64_t c = 0, i = 0; c < r->num_chunks; i = r->ends[c++]) {
        vf sum = {};
        for (; i < r->ends[c]; i += 16) {
            const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            vi inside = lanes < SPREAD_I((int32_t)(r->ends[c] - i));
            sum += only(load_f(r->weights + i), (load_f(r->list + i) >= SPREAD(cut)) & inside);
        }
        r->sums[c] += sum_f(sum);
    }
}

Split crane_split(const float *x, const float *weights, int64_t size, float middle) {
    Split s = {.above = INFINITY, .below = -INFINITY};
    vf above = SPREAD(INFINITY), below = SPREAD(-INFINITY);
    for (int64_t start = 0; start < size; start += CHUNK) {
        vf mass = {};
        vi count = {};
        for (int64_t i = start; i < size && i < start + CHUNK; i += 16) {
            vf v = load_f(x + i);
            vi higher = v > SPREAD(middle);
            mass += only(weights ? load_f(weights + i) : SPREAD(1.0f), higher);
            count -= higher;
            above = -max_v(-choose(higher, v, INFINITY), -above);
            below = max_v(choose(~higher, v, -INFINITY), below);
        }
        s.mass += sum_f(mass), s.count += sum_i(count);
    }
    s.above = -largest_f(-above), s.below = largest_f(below);
    return s;
}

float crane_threshold(Row *r, int count, float low, float high, double beyond, double need) {
    float *x = r->list, *weights = count ? NULL : r->weights;
    int64_t size = r->size;
    while (low < high) {
        store_f(x + size, SPREAD(-INFINITY));
        float middle = low / 2 + high / 2;
        if (!(middle < high)) middle = low;
        Split s = crane_split(x, weights, size, middle);
        int lower = beyond + s.mass < need;
        if (lower) high = s.below;
        else low = s.above;
        if ((lower ? size - s.count : s.count) > size / 2) continue;
        int64_t kept = 0;
        for (int64_t i = 0; i < size; i += 16) {
            vf v = load_f(x + i);
            vi stays = lower ? v <= SPREAD(middle) : v > SPREAD(middle);
            if (weights) append(r->lighter + kept, load_f(weights + i), stays);
            kept += append(r->few + kept, v, stays);
        }
        x = r->few, weights = count ? NULL : r->lighter, size = kept;
        if (lower) beyond += s.mass;
    }
    return low;
}

float crane_reached(Row *r, int64_t count) {
    r->size = r->num_chunks * 16;
    if (count > r->size) return -FLT_MAX;
    memcpy(r->list, r->maxima, r->size * sizeof(float));
    return crane_threshold(r, 1, -FLT_MAX, r->best, 0, count);
}
