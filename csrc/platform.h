/* What differs between operating systems: threads and the clock (POSIX or Win32). */
#ifndef SE_PLATFORM_H
#define SE_PLATFORM_H

#include <stdbool.h>

#ifdef _WIN32
typedef void * se_thread_id;
typedef volatile long se_counter;
#else
#include <pthread.h>
#include <stdatomic.h>
typedef pthread_t se_thread_id;
typedef atomic_int se_counter;
#endif

/* Fill in run and context; both and the struct itself must last until the thread is joined. */
typedef struct {
    void (*run)(void * context);
    void * context;
    se_thread_id id;
} se_thread;

bool se_thread_start(se_thread * thread); /* false: the system has no thread left */
void se_thread_join(se_thread * thread);

/* The counter before one was added, atomically. No order of other memory accesses is implied. A counter starts as {
 * 0 }. */
int se_count(se_counter * counter);

/* Seconds since some moment, from a clock that is never set. */
double se_seconds(void);

#endif
