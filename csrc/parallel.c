#include "parallel.h"

#ifdef _WIN32

void se_parallel(int n_items, int n_threads, se_work work, void * context) {
    (void) n_threads;
    for (int i = 0; i < n_items; i++) work(i, 0, context);
}

#else

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_THREADS = 64 };

typedef struct {
    atomic_int next;
    int n_items;
    se_work work;
    void * context;
} loop;

typedef struct {
    loop * shared;
    int thread;
} worker;

static void * run(void * arg) {
    worker * w = arg;
    for (;;) {
        int i = atomic_fetch_add_explicit(&w->shared->next, 1, memory_order_relaxed);
        if (i >= w->shared->n_items) return NULL;
        w->shared->work(i, w->thread, w->shared->context);
    }
}

void se_parallel(int n_items, int n_threads, se_work work, void * context) {
    loop shared = { .n_items = n_items, .work = work, .context = context };
    atomic_init(&shared.next, 0);
    if (n_threads > n_items) n_threads = n_items;
    if (n_threads > MAX_THREADS) n_threads = MAX_THREADS;

    pthread_t threads[MAX_THREADS];
    worker workers[MAX_THREADS];
    int started = 0;
    for (int t = 1; t < n_threads; t++) {
        workers[t] = (worker) { &shared, t };
        if (pthread_create(&threads[started], NULL, run, &workers[t]) != 0) break;
        started++;
    }
    workers[0] = (worker) { &shared, 0 };
    run(&workers[0]);
    for (int t = 0; t < started; t++) pthread_join(threads[t], NULL);
}

#endif
