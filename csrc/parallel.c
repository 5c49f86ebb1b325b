#include "parallel.h"

#include "platform.h"

typedef struct {
    se_counter next;
    int n_items;
    se_work work;
    void * context;
} loop;

typedef struct {
    loop * shared;
    int thread;
} worker;

static void run(void * context) {
    const worker * w = context;
    for (;;) {
        const int i = se_count(&w->shared->next);
        if (i >= w->shared->n_items) return;
        w->shared->work(i, w->thread, w->shared->context);
    }
}

void se_parallel(int n_items, int n_threads, se_work work, void * context) {
    loop shared = { .next = 0, .n_items = n_items, .work = work, .context = context };
    if (n_threads > n_items) n_threads = n_items;
    if (n_threads > SE_MAX_THREADS) n_threads = SE_MAX_THREADS;

    se_thread threads[SE_MAX_THREADS];
    worker workers[SE_MAX_THREADS];
    int n = 1; /* 0 is the caller's */
    for (; n < n_threads; n++) {
        workers[n] = (worker) { &shared, n };
        threads[n].run = run;
        threads[n].context = &workers[n];
        if (!se_thread_start(&threads[n])) break;
    }
    workers[0] = (worker) { &shared, 0 };
    run(&workers[0]);
    for (int t = 1; t < n; t++) se_thread_join(&threads[t]);
}
