/* Attention probabilities of some query rows, from q and k: softmax(scale * q k^T + mask).
 *
 * With flash attention the graph never holds the probabilities, so they are computed here for the rows that are asked for.
 * K of one KV head is packed once into panels of 16 keys (panel, head_dim, 16), then four query rows at a time are multiplied
 * with it: both loops run along memory, and no product is reduced across a vector, so plain vector types suffice (simd.h).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ggml_api.h"
#include "parallel.h"
#include "simd.h"
#include "star_edge.h"

enum { PANEL = 16, TILE = 4 };

static float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1Fu, fraction = h & 0x3FFu;
    union { uint32_t u; float f; } out;
    if (exponent == 0x1F) {
        out.u = sign | 0x7F800000u | (fraction << 13);
    } else if (exponent) {
        out.u = sign | ((exponent + 112u) << 23) | (fraction << 13);
    } else {
        out.f = (float) fraction * 0x1p-24f;
        out.u |= sign;
    }
    return out.f;
}

typedef struct {
    const se_attention * a;
    ggml_to_float_t to_float; /* NULL: k is float32 */
    int reduce;
    int n_pad;                /* n_kv rounded up to whole panels */
    int group;                /* query heads for each KV head */
    float * out;
    float * scratch;          /* one slice for each thread */
    size_t slice;             /* floats in it */
    float slope_base[2];      /* ALiBi, as ggml_compute_forward_soft_max_f32 */
    int slope_split;
} job;

/* (n_pad / 16, head_dim, 16); keys past n_kv are zero */
SE_INLINE void pack_keys(const job * j, int kv_head, float * panels, float * row) {
    const se_attention * a = j->a;
    const char * base = (const char *) a->k + (int64_t) kv_head * a->k_head_stride;
    for (int n = 0; n < j->n_pad; n++) {
        float * panel = panels + (size_t) (n / PANEL) * (size_t) a->head_dim * PANEL + n % PANEL;
        const float * key = row;
        if (n >= a->n_kv) {
            memset(row, 0, sizeof(float) * (size_t) a->head_dim);
        } else if (j->to_float) {
            j->to_float(base + n * a->k_row_stride, row, a->head_dim);
        } else {
            key = (const float *) (base + n * a->k_row_stride);
        }
        for (int d = 0; d < a->head_dim; d++) panel[(size_t) d * PANEL] = key[d];
    }
}

/* logits (TILE, n_pad) = q (TILE, head_dim) times the packed keys */
SE_INLINE void multiply(const job * j, const float * q, const float * panels, float * logits) {
    const int dim = j->a->head_dim;
    for (int p = 0; p < j->n_pad / PANEL; p++) {
        const float * panel = panels + (size_t) p * (size_t) dim * PANEL;
        vec acc[TILE][2];
        for (int t = 0; t < TILE; t++) acc[t][0] = acc[t][1] = vec_splat(0.0f);
        for (int d = 0; d < dim; d++) {
            const vec k0 = vec_load(panel + (size_t) d * PANEL), k1 = vec_load(panel + (size_t) d * PANEL + LANES);
            for (int t = 0; t < TILE; t++) {
                acc[t][0] = vec_scale_add(q[t * dim + d], k0, acc[t][0]);
                acc[t][1] = vec_scale_add(q[t * dim + d], k1, acc[t][1]);
            }
        }
        for (int t = 0; t < TILE; t++) {
            vec_store(logits + (size_t) t * (size_t) j->n_pad + p * PANEL, acc[t][0]);
            vec_store(logits + (size_t) t * (size_t) j->n_pad + p * PANEL + LANES, acc[t][1]);
        }
    }
}

static float alibi_slope(const job * j, int head) {
    if (j->a->max_bias <= 0.0f) return 1.0f;
    return head < j->slope_split ? powf(j->slope_base[0], (float) (head + 1))
                                 : powf(j->slope_base[1], (float) (2 * (head - j->slope_split) + 1));
}

/* In place: logits of one row become probabilities times `weight`. Columns past n_kv become 0. */
SE_INLINE void softmax(const job * j, int head, int row, float * x, float weight) {
    const se_attention * a = j->a;
    if (a->softcap > 0.0f) {
        for (int n = 0; n < a->n_kv; n++) x[n] = a->softcap * tanhf(x[n] / a->softcap);
    }
    if (a->mask) {
        const char * mask = (const char *) a->mask + (int64_t) row * a->mask_row_stride;
        const float slope = alibi_slope(j, head);
        if (a->mask_is_f16) {
            for (int n = 0; n < a->n_kv; n++) {
                const uint16_t h = ((const uint16_t *) mask)[n];
                if (h) x[n] += slope * half_to_float(h);
            }
        } else {
            for (int n = 0; n < a->n_kv; n++) x[n] += slope * ((const float *) mask)[n];
        }
    }
    for (int n = a->n_kv; n < j->n_pad; n++) x[n] = -INFINITY;
    float top = a->sinks ? a->sinks[head] : -INFINITY;
    for (int n = 0; n < a->n_kv; n++) top = x[n] > top ? x[n] : top;
    if (top == -INFINITY) { /* every column is masked: nothing receives attention */
        memset(x, 0, sizeof(float) * (size_t) j->n_pad);
        return;
    }
    vec total = vec_splat(0.0f);
    for (int n = 0; n < j->n_pad; n += LANES) {
        const vec e = vec_exp_negative(vec_sub(vec_load(x + n), vec_splat(top)));
        vec_store(x + n, e);
        total = vec_add(total, e);
    }
    float sum = a->sinks ? expf(a->sinks[head] - top) : 0.0f;
    for (int i = 0; i < LANES; i++) sum += vec_lane(total, i);
    const vec scale = vec_splat(weight / sum);
    for (int n = 0; n < j->n_pad; n += LANES) vec_store(x + n, vec_mul(vec_load(x + n), scale));
}

/* One item is one KV head: its keys are packed once for all query heads that share it. */
SE_CLONES
static void kv_head(int item, int thread, void * context) {
    const job * j = context;
    const se_attention * a = j->a;
    const size_t dim = (size_t) a->head_dim, pad = (size_t) j->n_pad;
    float * panels = j->scratch + (size_t) thread * j->slice;
    float * logits = panels + pad * dim;
    float * q = logits + TILE * pad;
    float * row = q + TILE * dim;
    float * sums = row + dim; /* (n_pad), when rows are averaged */

    pack_keys(j, item, panels, row);
    const bool mean_heads = j->reduce & SE_MEAN_HEADS, mean_rows = j->reduce & SE_MEAN_ROWS;
    const float weight = (mean_heads ? 1.0f / (float) a->n_head : 1.0f) * (mean_rows ? 1.0f / (float) a->n_rows : 1.0f);
    for (int h = item * j->group; h < (item + 1) * j->group; h++) {
        if (mean_rows) memset(sums, 0, sizeof(float) * pad);
        for (int r0 = 0; r0 < a->n_rows; r0 += TILE) {
            const int n_tile = a->n_rows - r0 < TILE ? a->n_rows - r0 : TILE;
            memset(q, 0, sizeof(float) * TILE * dim);
            for (int t = 0; t < n_tile; t++) {
                const int64_t offset = (int64_t) (r0 + t) * a->q_row_stride + (int64_t) h * a->q_head_stride;
                const float * src = (const float *) ((const char *) a->q + offset);
                for (size_t d = 0; d < dim; d++) q[(size_t) t * dim + d] = src[d] * a->scale;
            }
            multiply(j, q, panels, logits);
            for (int t = 0; t < n_tile; t++) {
                float * x = logits + (size_t) t * pad;
                softmax(j, h, r0 + t, x, weight);
                if (mean_rows) {
                    for (size_t n = 0; n < pad; n += LANES) {
                        vec_store(sums + n, vec_add(vec_load(sums + n), vec_load(x + n)));
                    }
                } else {
                    /* mean over heads: every item has a plane of its own, added up at the end */
                    const size_t line = (size_t) (mean_heads ? item : h) * (size_t) a->n_rows + (size_t) (r0 + t);
                    float * out = j->out + line * (size_t) a->n_kv;
                    if (mean_heads) for (int n = 0; n < a->n_kv; n++) out[n] += x[n];
                    else memcpy(out, x, sizeof(float) * (size_t) a->n_kv);
                }
            }
        }
        if (mean_rows) {
            float * out = j->out + (size_t) (mean_heads ? item : h) * (size_t) a->n_kv;
            for (int n = 0; n < a->n_kv; n++) out[n] += sums[n];
        }
    }
}

static int check(const se_attention * a, int reduce, const float * out) {
    if (!a || !out || !a->q || !a->k || reduce < 0 || reduce > SE_MEAN_ALL) return SE_ERR_ARGUMENT;
    if (a->n_kv > INT32_MAX - PANEL) return SE_ERR_ARGUMENT;
    if (a->n_rows <= 0 || a->n_head <= 0 || a->head_dim <= 0) return SE_ERR_ARGUMENT;
    if (a->n_kv <= 0 || a->n_head_kv <= 0) return SE_ERR_ARGUMENT;
    if (a->n_head % a->n_head_kv != 0 || a->k_type < 0 || a->k_type >= GGML_TYPE_COUNT) return SE_ERR_ARGUMENT;
    if (!isfinite(a->scale) || !(a->softcap >= 0.0f) || !(a->max_bias >= 0.0f)) return SE_ERR_ARGUMENT;
    return SE_OK;
}

int se_attention_scores(const se_attention * a, int reduce, int n_threads, float * out, int64_t out_size) {
    int error = check(a, reduce, out);
    if (error) return error;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;

    job j = { .a = a, .reduce = reduce, .group = a->n_head / a->n_head_kv };
    j.n_pad = (a->n_kv + PANEL - 1) / PANEL * PANEL;
    if (a->k_type != GGML_TYPE_F32) {
        const struct ggml_type_traits * traits = se_ggml.type_traits((enum ggml_type) a->k_type);
        if (!traits || !traits->to_float || traits->blck_size <= 0) return SE_ERR_SHAPE;
        if (a->head_dim % traits->blck_size != 0) return SE_ERR_SHAPE;
        j.to_float = traits->to_float;
    }
    if (a->max_bias > 0.0f) {
        j.slope_split = 1;
        while (2 * j.slope_split <= a->n_head) j.slope_split *= 2;
        j.slope_base[0] = powf(2.0f, -a->max_bias / (float) j.slope_split);
        j.slope_base[1] = powf(2.0f, -a->max_bias / 2.0f / (float) j.slope_split);
    }

    const bool mean_heads = reduce & SE_MEAN_HEADS;
    const int64_t plane = (int64_t) a->n_kv * (reduce & SE_MEAN_ROWS ? 1 : a->n_rows);
    if (out_size < plane * (mean_heads ? 1 : a->n_head)) return SE_ERR_CAPACITY;

    if (n_threads < 1) n_threads = 1;
    if (n_threads > a->n_head_kv) n_threads = a->n_head_kv;
    if (n_threads > SE_MAX_THREADS) n_threads = SE_MAX_THREADS;
    const size_t dim = (size_t) a->head_dim, pad = (size_t) j.n_pad;
    j.slice = pad * dim + TILE * pad + TILE * dim + dim + pad;
    j.scratch = malloc(sizeof(float) * j.slice * (size_t) n_threads);
    const size_t n_planes = mean_heads ? (size_t) a->n_head_kv : (size_t) a->n_head;
    j.out = mean_heads ? calloc(n_planes * (size_t) plane, sizeof(float)) : out;
    if (!j.scratch || !j.out) {
        free(j.scratch);
        if (mean_heads) free(j.out);
        return SE_ERR_MEMORY;
    }
    if (!mean_heads) memset(out, 0, sizeof(float) * n_planes * (size_t) plane);

    se_parallel(a->n_head_kv, n_threads, kv_head, &j);

    if (mean_heads) {
        /* a fixed order, so that the result does not depend on the number of threads */
        for (int64_t i = 0; i < plane; i++) {
            double sum = 0.0;
            for (size_t h = 0; h < n_planes; h++) sum += j.out[h * (size_t) plane + (size_t) i];
            out[i] = (float) sum;
        }
        free(j.out);
    }
    free(j.scratch);
    return SE_OK;
}
