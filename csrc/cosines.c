/* Products of all pairs of vectors, and means of groups of them.
 *
 * Vectors are packed into panels of 16 (panel, d, 16), and six rows at a time are multiplied with a panel, much as in scores.c: no product
 * is reduced across a vector. Every product adds up in the order of the dimensions, so it is the same from both sides, and equal vectors
 * have equal products with all others.
 */
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "simd.h"
#include "star_edge.h"

enum { PANEL = 16, TILE = 6, ROWS = 4 * TILE };
enum { WORK = 8 << 20, BYTES = 1 << 20 }; /* multiplications, and bytes, that are worth a thread */

/* Threads for an amount of work, of which each of them should have a share. */
static int threads_for(int64_t work, int64_t share, int32_t most) {
    const int64_t n = work / share;
    return n < 1 ? 1 : n < most ? (int) n : (int) most;
}

typedef struct {
    const float * unit;
    const float * panels;
    int n, d;
    float * out;
} product_job;

/* block (ROWS, 16) = rows (ROWS, d) times one panel. Rows past n are the last one again. */
SE_INLINE void multiply_block(const product_job * j, int first, const float * panel, float * block) {
    for (int r0 = 0; r0 < ROWS; r0 += TILE) {
        const float * row[TILE];
        vec acc[TILE][2];
        for (int t = 0; t < TILE; t++) {
            const int r = first + r0 + t;
            row[t] = j->unit + (size_t) (r < j->n ? r : j->n - 1) * (size_t) j->d;
            acc[t][0] = acc[t][1] = vec_splat(0.0f);
        }
        for (int d = 0; d < j->d; d++) {
            const vec k0 = vec_load(panel + (size_t) d * PANEL), k1 = vec_load(panel + (size_t) d * PANEL + LANES);
            for (int t = 0; t < TILE; t++) {
                acc[t][0] = vec_scale_add(row[t][d], k0, acc[t][0]);
                acc[t][1] = vec_scale_add(row[t][d], k1, acc[t][1]);
            }
        }
        for (int t = 0; t < TILE; t++) {
            vec_store(block + (r0 + t) * PANEL, acc[t][0]);
            vec_store(block + (r0 + t) * PANEL + LANES, acc[t][1]);
        }
    }
}

/* One item is ROWS rows, from their own column on, and the same mirrored where it belongs to later rows: each product has one writer. */
SE_CLONES
static void product_rows(int item, int thread, void * context) {
    const product_job * j = context;
    (void) thread;
    const int first = item * ROWS, last = first + ROWS < j->n ? first + ROWS : j->n;
    float block[ROWS * PANEL];
    for (int p = first / PANEL; p * PANEL < j->n; p++) {
        multiply_block(j, first, j->panels + (size_t) p * (size_t) j->d * PANEL, block);
        const int begin = p * PANEL, end = begin + PANEL < j->n ? begin + PANEL : j->n;
        for (int r = first; r < last; r++) {
            const int from = begin > first ? begin : first;
            if (from < end) memcpy(j->out + (size_t) r * (size_t) j->n + from, block + (r - first) * PANEL + from - begin, sizeof(float) * (size_t) (end - from));
        }
        for (int c = begin > last ? begin : last; c < end; c++) {
            float * mirror = j->out + (size_t) c * (size_t) j->n;
            for (int r = first; r < last; r++) mirror[r] = block[(r - first) * PANEL + c - begin];
        }
    }
}

int se_cosines(const float * unit, int32_t n, int32_t d, int32_t n_threads, float * out) {
    if (!unit || !out || n < 1 || d < 1 || n > INT32_MAX - ROWS) return SE_ERR_ARGUMENT;
    const size_t n_panels = ((size_t) n + PANEL - 1) / PANEL, width = (size_t) d;
    float * panels = calloc(n_panels * width * PANEL, sizeof *panels);
    if (!panels) return SE_ERR_MEMORY;
    for (size_t i = 0; i < (size_t) n; i++) {
        float * panel = panels + i / PANEL * width * PANEL + i % PANEL;
        for (size_t k = 0; k < width; k++) panel[k * PANEL] = unit[i * width + k];
    }
    product_job j = { .unit = unit, .panels = panels, .n = n, .d = d, .out = out };
    se_parallel((n + ROWS - 1) / ROWS, threads_for((int64_t) n * n / 2 * d, WORK, n_threads), product_rows, &j);
    free(panels);
    return SE_OK;
}

/* ---- means ---- */

enum { GROUPS = 8 }; /* of one item */

typedef struct {
    const float * vectors;
    int d, k;
    const int32_t * member; /* (n) ordered by group */
    const int32_t * start;  /* (k + 1) where each group begins in it */
    float * out;
} mean_job;

SE_CLONES
static void mean_groups(int item, int thread, void * context) {
    const mean_job * j = context;
    (void) thread;
    const int last = (item + 1) * GROUPS < j->k ? (item + 1) * GROUPS : j->k;
    for (int g = item * GROUPS; g < last; g++) {
        float * out = j->out + (size_t) g * (size_t) j->d;
        const int32_t first = j->start[g], n = j->start[g + 1] - first;
        if (!n) memset(out, 0, sizeof(float) * (size_t) j->d);
        else memcpy(out, j->vectors + (size_t) j->member[first] * (size_t) j->d, sizeof(float) * (size_t) j->d);
        for (int32_t m = 1; m < n; m++) {
            const float * add = j->vectors + (size_t) j->member[first + m] * (size_t) j->d;
            for (int k = 0; k < j->d; k++) out[k] += add[k];
        }
        for (int k = 0; k < j->d && n > 1; k++) out[k] /= (float) n;
    }
}

int se_group_means(const float * vectors, int32_t n, int32_t d, const int32_t * group, int32_t k, int32_t n_threads, float * out) {
    if (!vectors || !group || !out || n < 1 || d < 1 || k < 1 || k > INT32_MAX - GROUPS) return SE_ERR_ARGUMENT;
    for (int32_t i = 0; i < n; i++) {
        if (group[i] < 0 || group[i] >= k) return SE_ERR_ARGUMENT;
    }
    int32_t * start = calloc((size_t) k + 2, sizeof *start), * member = malloc((size_t) n * sizeof *member);
    if (!start || !member) {
        free(start);
        free(member);
        return SE_ERR_MEMORY;
    }
    /* counted two places on, so that filling leaves each group's begin where it belongs */
    for (int32_t i = 0; i < n; i++) start[group[i] + 2]++;
    for (int32_t g = 1; g <= k; g++) start[g + 1] += start[g];
    for (int32_t i = 0; i < n; i++) member[start[group[i] + 1]++] = i;
    mean_job j = { .vectors = vectors, .d = d, .k = k, .member = member, .start = start, .out = out };
    se_parallel((k + GROUPS - 1) / GROUPS, threads_for((int64_t) n * d * (int64_t) sizeof(float), BYTES, n_threads), mean_groups, &j);
    free(start);
    free(member);
    return SE_OK;
}
