/* A pool of threads that share out tasks by a counter: a thread that was interrupted takes fewer of them.

A waiting thread watches for work for a moment, then sleeps: the gaps inside a step are shorter than that
moment, those between steps are not, so an idle engine uses no CPU. */
#define _GNU_SOURCE
#include "common.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#define MAX_THREADS 256
#define CLOSED 0xffffffffu

static struct {
    pthread_mutex_t busy; /* held by the thread whose job runs */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int num_threads, num_started;
    _Atomic int spins, num_asleep, is_held;
    /* job number << 32 | next task. CLOSED: no task may be taken. */
    _Atomic uint64_t state;
    _Atomic int64_t num_done;
    void (*task)(void *, int64_t);
    void *argument;
    int64_t num_tasks;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
          .num_threads = 1, .spins = 2000, .state = CLOSED};

static __thread int holds; /* the calling thread has `busy` for several jobs */

/* Takes tasks of job `number` until none is left. A successful exchange proves that the job is still open, and it
stays open until the task is done: so the fields read before belong to it. */
static void work(uint32_t number) {
    for (;;) {
        uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
        uint32_t next = (uint32_t)state;
        if ((uint32_t)(state >> 32) != number || next == CLOSED || next >= pool.num_tasks) return;
        void (*task)(void *, int64_t) = pool.task;
        void *argument = pool.argument;
        if (!atomic_compare_exchange_weak(&pool.state, &state, state + 1)) continue;
        task(argument, next);
        atomic_fetch_add_explicit(&pool.num_done, 1, memory_order_release);
    }
}

static void *serve(void *unused) {
    uint32_t seen = 0;
    for (;;) {
        uint32_t number;
        int left = atomic_load_explicit(&pool.spins, memory_order_relaxed);
        while ((number = atomic_load_explicit(&pool.state, memory_order_acquire) >> 32) == seen &&
               (left-- > 0 || atomic_load_explicit(&pool.is_held, memory_order_relaxed)))
            _mm_pause();
        if (number == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.num_asleep, 1);
            while ((number = atomic_load(&pool.state) >> 32) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.num_asleep, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = number;
        work(number);
    }
    return unused;
}

static void start_threads(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals belong to the interpreter's threads */
    while (pool.num_started < pool.num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, NULL)) break;
        pthread_detach(thread);
        pool.num_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void forget_threads(void) { /* a fork has none of them, and works alone */
    pool.num_started = pool.num_threads = 1;
    atomic_store(&pool.is_held, holds = 0);
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
}

void crane_set_threads(int count, int spins) {
    static int once;
    if (!once++) pthread_atfork(NULL, NULL, forget_threads);
    pool.num_threads = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
    atomic_store(&pool.spins, spins);
}

int crane_threads(void) { return pool.num_threads; }

void crane_hold(void) {
    holds = pool.num_threads > 1 && !pthread_mutex_trylock(&pool.busy);
    if (holds) atomic_store(&pool.is_held, 1);
}

void crane_release(void) {
    if (!holds) return;
    holds = 0;
    atomic_store(&pool.is_held, 0);
    pthread_mutex_unlock(&pool.busy);
}

void crane_parallel(void (*task)(void *, int64_t), void *argument, int64_t num_tasks) {
    /* alone: nothing to share, or another thread's job has the pool */
    if (num_tasks < 2 || pool.num_threads < 2 || (!holds && pthread_mutex_trylock(&pool.busy))) {
        for (int64_t i = 0; i < num_tasks; i++) task(argument, i);
        return;
    }
    if (pool.num_started < pool.num_threads - 1) start_threads();
    pool.task = task, pool.argument = argument, pool.num_tasks = num_tasks;
    atomic_store(&pool.num_done, 0);
    uint32_t number = (uint32_t)(atomic_load(&pool.state) >> 32) + 1;
    atomic_store(&pool.state, (uint64_t)number << 32);
    if (atomic_load(&pool.num_asleep)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work(number);
    for (int turns = 0; atomic_load_explicit(&pool.num_done, memory_order_acquire) < num_tasks; turns++) {
        if (turns < 20000) _mm_pause();
        else sched_yield(); /* the thread that has the last task is not running: let it */
    }
    atomic_store(&pool.state, (uint64_t)number << 32 | CLOSED);
    if (!holds) pthread_mutex_unlock(&pool.busy);
}

typedef struct { void *memory; size_t size; } Room;

static void *grow(Room *room, size_t bytes) {
    if (bytes > room->size) {
        free(room->memory);
        room->size = (bytes + 4095) & ~(size_t)4095;
        room->memory = aligned_alloc(4096, room->size);
        if (!room->memory) abort();
    }
    return room->memory;
}

void *crane_scratch(size_t bytes) {
    static __thread Room room;
    return grow(&room, bytes);
}

void *crane_input(size_t bytes) {
    static __thread Room room;
    return grow(&room, bytes);
}
