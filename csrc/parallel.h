/* A parallel loop, for what is computed from many rows. */
#ifndef SE_PARALLEL_H
#define SE_PARALLEL_H

enum { SE_MAX_THREADS = 64 };

typedef void (*se_work)(int item, int thread, void * context);

/* Calls work(i, thread, context) for i in [0, n_items) on up to n_threads threads (at most SE_MAX_THREADS), the
 * caller's among them. Falls back to fewer threads when one cannot be started. */
void se_parallel(int n_items, int n_threads, se_work work, void * context);

#endif
