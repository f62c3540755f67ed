/* Calls of kernels as data: those of one decode step are kept while it runs, and made again from that list.

A call made again reads and writes the same addresses: whoever records keeps that memory. */
#include "common.h"
#include <stdlib.h>
#include <time.h>

typedef struct Call {
    struct Call *next;
    const char *name;
    int32_t (*run)(const void *);
    _Alignas(16) char argument[];
} Call;

typedef struct {
    Call *first, **end;
    int32_t num_calls, short_of_memory;
} Recording;

static __thread Recording *open_one; /* what this thread records */

int32_t crane_call(const char *name, int32_t (*run)(const void *), const void *argument, size_t size) {
    if (open_one) {
        Call *call = malloc(sizeof(Call) + size);
        if (call) {
            *call = (Call){.name = name, .run = run};
            memcpy(call->argument, argument, size);
            *open_one->end = call;
            open_one->end = &call->next;
            open_one->num_calls++;
        } else open_one->short_of_memory = 1;
    }
    return run(argument);
}

void crane_forget(Recording *r) {
    for (Call *call = r ? r->first : NULL, *next; call; call = next) next = call->next, free(call);
    free(r);
}

/* From now on the calling thread's calls are kept, too. Returns 0, or 1 when there is no memory. */
int32_t crane_record(void) {
    crane_forget(open_one);
    open_one = calloc(1, sizeof(Recording));
    if (!open_one) return 1;
    open_one->end = &open_one->first;
    return 0;
}

/* Ends that. Returns what `crane_replay` takes, to be given to `crane_forget`, or NULL when there was no memory. */
Recording *crane_recorded(void) {
    Recording *r = open_one;
    open_one = NULL;
    if (r && !r->short_of_memory) return r;
    crane_forget(r);
    return NULL;
}

int32_t crane_num_calls(const Recording *r) { return r->num_calls; }

/* Makes all calls again. names, seconds: [num_calls], of each call, or NULL. Returns 0, or a call's failure. */
int32_t crane_replay(const Recording *r, const char **names, double *seconds) {
    struct timespec before, after;
    int32_t failed = 0;
    crane_hold();
    for (const Call *call = r->first; call && !failed; call = call->next) {
        if (seconds) clock_gettime(CLOCK_MONOTONIC, &before);
        failed = call->run(call->argument);
        if (!seconds) continue;
        clock_gettime(CLOCK_MONOTONIC, &after);
        *names++ = call->name;
        *seconds++ = after.tv_sec - before.tv_sec + 1e-9 * (after.tv_nsec - before.tv_nsec);
    }
    crane_release();
    return failed;
}
