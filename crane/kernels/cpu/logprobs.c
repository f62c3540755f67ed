/* Log-probabilities of some rows of logits: of listed tokens, and the best ones. A task is a row. */
#include "logits.h"
#include <stdlib.h>

typedef struct {
    const float *logits;
    const int32_t *rows;
    const int64_t *tokens;
    const int32_t *listed;
    float *picked;
    int64_t *top_ids;
    float *top;
    int64_t count, num_listed, num_top, vocab, stride;
} Logprobs;

typedef struct { float x; int32_t id; } Candidate;

static int better(const void *a, const void *b) {
    const Candidate *first = a, *second = b;
    if (first->x != second->x) return first->x > second->x ? -1 : 1;
    return first->id < second->id ? -1 : 1;
}

/* The best ones of a row, of equals the first first. */
static void best_ones(Row *r, const Logprobs *p, int64_t index, float norm) {
    float low = crane_reached(r, p->num_top);
    if (low == -FLT_MAX) low = -INFINITY;
    int64_t size = 0;
    Candidate *found = (Candidate *)r->list;
    for (int64_t c = 0; c < r->num_chunks; c++)
        for (int64_t i = c * CHUNK; r->tops[c] >= low && i < r->vocab && i < (c + 1) * CHUNK; i++) {
            float x = r->x[i] > -INFINITY ? r->x[i] : -INFINITY;
            if (x >= low) found[size++] = (Candidate){x, i};
        }
    qsort(found, size, sizeof *found, better);
    for (int64_t i = 0; i < p->num_top; i++) {
        p->top_ids[index * p->num_top + i] = found[i].id;
        p->top[index * p->num_top + i] = found[i].x - norm;
    }
}

static void logprobs_task(void *argument, int64_t index) {
    const Logprobs *p = argument;
    int64_t row = p->rows[index];
    Row r;
    crane_row(&r, p->logits + row * p->stride, p->vocab, 0);
    r.temperature = r.inverse = 1;
    crane_scan(&r, 1);
    float norm = fabsf(r.best) <= FLT_MAX ? r.best + log(total(&r)) : r.best;
    float *picked = p->picked + index * (1 + p->num_listed);
    picked[0] = r.x[p->tokens[row]] - norm;
    for (int64_t i = 0; i < p->num_listed; i++) picked[1 + i] = r.x[p->listed[index * p->num_listed + i]] - norm;
    if (p->num_top) best_ones(&r, p, index, norm);
}

static int32_t run_logprobs(const void *p) {
    return crane_parallel(logprobs_task, (void *)p, ((const Logprobs *)p)->count), 0;
}

/* As `log_probabilities` in kernels/sampling.py. picked: [count, 1 + num_listed]; top_ids, top: [count, num_top]. */
void crane_log_probabilities(const float *logits, const int32_t *rows, const int64_t *tokens, const int32_t *listed,
                             float *picked, int64_t *top_ids, float *top, int64_t count, int64_t num_listed,
                             int64_t num_top, int64_t vocab, int64_t stride) {
    Logprobs p = {logits, rows, tokens, listed, picked, top_ids, top, count, num_listed, num_top, vocab, stride};
    crane_call("log-probabilities", run_logprobs, &p, sizeof p);
}
