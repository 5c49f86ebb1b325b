/* A log callback for libmtmd that keeps the last warnings and errors. It is C because a Python callback swallows Ctrl-C: an
 * interrupt that is pending when the callback is entered is raised inside it, cannot cross C, and is dropped. */
#include <string.h>

#include "ggml.h"
#include "star_edge.h"

enum { LOG_SIZE = 4096 };

/* Both of one thread: libmtmd logs in the thread that called it, and another that logs meanwhile is about another file. */
static _Thread_local char kept[LOG_SIZE];
static _Thread_local size_t length;

void se_log_callback(int level, const char * text, void * user_data) {
    (void) user_data;
    /* the rest is the loader's listing of every tensor */
    if (!text || (level != GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_ERROR)) return;
    const size_t n = strlen(text);
    if (n >= LOG_SIZE - length) return; /* the first lines name the cause */
    memcpy(kept + length, text, n + 1);
    length += n;
}

uintptr_t se_log_callback_address(void) { return (uintptr_t) &se_log_callback; }

void se_log_clear(void) {
    length = 0;
    kept[0] = '\0';
}

const char * se_log_text(void) { return kept; }
