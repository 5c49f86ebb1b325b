#ifndef _WIN32
#define _POSIX_C_SOURCE 199309L /* clock_gettime, which -std=c11 hides */
#endif

#include "platform.h"

#ifdef _WIN32

#define WIN32_LEAN_AND_MEAN
#include <process.h>
#include <windows.h>

static unsigned __stdcall enter(void * arg) {
    const se_thread * thread = arg;
    thread->run(thread->context);
    return 0;
}

bool se_thread_start(se_thread * thread) {
    /* not CreateThread: only _beginthreadex sets up the C runtime for the thread */
    thread->id = (HANDLE) _beginthreadex(NULL, 0, enter, thread, 0, NULL);
    return thread->id != NULL;
}

void se_thread_join(se_thread * thread) {
    WaitForSingleObject(thread->id, INFINITE);
    CloseHandle(thread->id);
}

int se_count(se_counter * counter) { return (int) InterlockedIncrement(counter) - 1; }

double se_seconds(void) {
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    return (double) ticks.QuadPart / (double) per_second.QuadPart;
}

#else

#include <time.h>

static void * enter(void * arg) {
    const se_thread * thread = arg;
    thread->run(thread->context);
    return NULL;
}

bool se_thread_start(se_thread * thread) { return pthread_create(&thread->id, NULL, enter, thread) == 0; }

void se_thread_join(se_thread * thread) { pthread_join(thread->id, NULL); }

int se_count(se_counter * counter) { return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed); }

double se_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

#endif
