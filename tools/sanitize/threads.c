/* The core from several threads at once, for ThreadSanitizer: logs, scores, choices, and a tap for each thread. Exit status 0: all results are right,
 * and no race was seen. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "star_edge.h"

enum { N_THREADS = 8, N_ROUNDS = 200, N_ROWS = 24, N_HEAD = 4, D = 16, N_KV = 32, N_CELLS = 64 };

static float q[N_ROWS * N_HEAD * D], k[N_KV * N_HEAD * D], expected[N_HEAD * N_ROWS * N_KV];

static se_attention attention(void) {
    return (se_attention) {
        .q = q, .q_row_stride = sizeof(float) * N_HEAD * D, .q_head_stride = sizeof(float) * D,
        .n_rows = N_ROWS, .n_head = N_HEAD, .head_dim = D,
        .k = k, .k_type = GGML_TYPE_F32, .k_row_stride = sizeof(float) * N_HEAD * D, .k_head_stride = sizeof(float) * D,
        .n_kv = N_KV, .n_head_kv = N_HEAD, .scale = 0.25f,
    };
}

static void fail(const char * what, int code) {
    fprintf(stderr, "%s: %d (%s)\n", what, code, se_error_text(code));
    exit(1);
}

/* Every thread has a log of its own: what another says does not show, and is not cleared. */
static void * use_log(void * arg) {
    char text[64];
    snprintf(text, sizeof text, "thread %d says so\n", *(int *) arg);
    for (int i = 0; i < N_ROUNDS; i++) {
        se_log_clear();
        se_log_callback(GGML_LOG_LEVEL_WARN, text, NULL);
        if (strcmp(se_log_text(), text) != 0) fail("another thread's log", 0);
    }
    return NULL;
}

/* The kernel divides its work among threads of its own. */
static void * use_scores(void * arg) {
    (void) arg;
    float * out = malloc(sizeof expected);
    se_attention a = attention();
    for (int i = 0; i < N_ROUNDS / 4; i++) {
        int error = se_attention_scores(&a, SE_KEEP, 1 + i % 4, out, N_HEAD * N_ROWS * N_KV);
        if (error) fail("scores", error);
        for (size_t j = 0; j < sizeof expected / sizeof *expected; j++) {
            if (fabsf(out[j] - expected[j]) > 1e-6f) fail("a score differs", 0);
        }
    }
    free(out);
    return NULL;
}

/* Several images are chosen from at once, each on threads of its own. */
static void * use_cluster(void * arg) {
    (void) arg;
    enum { N = 640, WIDTH = 128, KEPT = 40 };
    float * unit = malloc(sizeof(float) * N * WIDTH), * means = malloc(sizeof(float) * KEPT * WIDTH), * products = malloc(sizeof(float) * N * N);
    double mass[N];
    int32_t kept[N], group[N], first[2][N], n_kept, too_few;
    for (int i = 0; i < N; i++) {
        mass[i] = 1.0;
        for (int j = 0; j < WIDTH; j++) unit[i * WIDTH + j] = (i * 31 + j * 17) % 64 > 31 ? 0.088388348f : -0.088388348f;
        unit[i * WIDTH + i % WIDTH] *= -1.0f;
    }
    for (int i = 0; i < 8; i++) {
        se_points points = { .products = products, .n = N };
        se_groups groups = { .mass = mass, .k = KEPT, .most = N, .bound = INFINITY, .medoids = 1, .rounding = 1e-5f };
        int error = se_cosines(unit, N, WIDTH, 1 + i % 4, products);
        if (!error) error = se_cluster(&points, &groups, kept, &n_kept, group, &too_few);
        if (!error) error = se_group_means(unit, N, WIDTH, group, KEPT, 1 + i % 4, means);
        if (!error) error = se_farthest(&points, KEPT, first[i > 0]);
        if (error) fail("cluster", error);
        if (n_kept != KEPT || (i && memcmp(first[0], first[1], sizeof(int32_t) * KEPT) != 0)) fail("a choice differs", 0);
    }
    free(unit);
    free(means);
    free(products);
    return NULL;
}

static void * use_tap(void * arg) {
    (void) arg;
    float bias[N_CELLS] = { 0 };
    int32_t data[4] = { 1, 2, 3, 4 };
    for (int i = 0; i < N_ROUNDS; i++) {
        se_tap * tap = se_tap_new();
        se_result result;
        se_plan plan = { 0 };
        if (!tap) fail("se_tap_new", SE_ERR_MEMORY);
        int error = se_tap_set_position_shift(tap, 3, 5);
        if (!error) error = se_tap_set_cell_bias(tap, bias, N_CELLS);
        if (!error) error = se_tap_set_input(tap, "positions", data, sizeof data);
        if (!error) error = se_tap_arm(tap, &plan);
        se_tap_finish(tap, &result);
        if (error) fail("tap", error);
        se_tap_free(tap);
    }
    return NULL;
}

static void together(void * (*function)(void *)) {
    pthread_t threads[N_THREADS];
    int numbers[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, function, &numbers[i])) fail("pthread_create", 0);
    }
    for (int i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
}

int main(void) {
    se_bind("ggml_backend_tensor_get", (uintptr_t) &ggml_backend_tensor_get);
    se_bind("ggml_backend_tensor_set", (uintptr_t) &ggml_backend_tensor_set);
    se_bind("ggml_backend_buffer_is_host", (uintptr_t) &ggml_backend_buffer_is_host);
    se_bind("ggml_backend_buffer_get_type", (uintptr_t) &ggml_backend_buffer_get_type);
    se_bind("ggml_backend_buft_get_device", (uintptr_t) &ggml_backend_buft_get_device);
    se_bind("ggml_backend_dev_supports_op", (uintptr_t) &ggml_backend_dev_supports_op);
    se_bind("ggml_nbytes", (uintptr_t) &ggml_nbytes);
    se_bind("ggml_get_type_traits", (uintptr_t) &ggml_get_type_traits);
    if (se_bind_missing()) {
        fprintf(stderr, "unbound: %s\n", se_bind_missing());
        return 1;
    }
    srand(1);
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = (float) rand() / (float) RAND_MAX - 0.5f;
    for (size_t i = 0; i < sizeof k / sizeof *k; i++) k[i] = (float) rand() / (float) RAND_MAX - 0.5f;
    for (int h = 0; h < N_HEAD; h++) {
        for (int r = 0; r < N_ROWS; r++) {
            double row[N_KV], sum = 0;
            for (int j = 0; j < N_KV; j++) {
                double dot = 0;
                for (int d = 0; d < D; d++) dot += (double) q[(r * N_HEAD + h) * D + d] * (double) k[(j * N_HEAD + h) * D + d];
                sum += row[j] = exp(0.25 * dot);
            }
            for (int j = 0; j < N_KV; j++) expected[(h * N_ROWS + r) * N_KV + j] = (float) (row[j] / sum);
        }
    }
    together(use_log);
    together(use_scores);
    together(use_cluster);
    together(use_tap);
    puts("threads: log, scores, choices and taps are right, and no race was seen");
    return 0;
}
