#include "attention.h"

#include <stdlib.h>

#include "ggml_api.h"
#include "llama_graph.h"

/* Query rows of the read inside n_rows of the graph. */
static int select_rows(se_attention_read * read, int64_t n_rows) {
    if (read->row_step < 1 || read->row_first < 0 || read->row_first >= n_rows) return SE_ERR_ARGUMENT;
    const int64_t available = (n_rows - read->row_first + read->row_step - 1) / read->row_step;
    if (read->row_count == 0 || read->row_count > available) return SE_ERR_ARGUMENT;
    read->n_rows = read->row_count < 0 ? (int32_t) available : read->row_count;
    return SE_OK;
}

/* Without flash attention the probabilities are in the graph: (n_kv, n_tokens, n_head). */
static int read_soft_max(const struct ggml_tensor * node, se_attention_read * read) {
    const int64_t n_kv = node->ne[0], n_head = node->ne[2];
    if (node->type != GGML_TYPE_F32 || node->ne[3] != 1 || node->nb[0] != sizeof(float)) return SE_ERR_SHAPE;
    int error = select_rows(read, node->ne[1]);
    if (error) return error;
    read->n_kv = (int32_t) n_kv;
    read->n_head = (int32_t) n_head;

    const bool mean_heads = read->reduce & SE_MEAN_HEADS, mean_rows = read->reduce & SE_MEAN_ROWS;
    const int64_t n_planes = mean_heads ? 1 : n_head, n_lines = mean_rows ? 1 : read->n_rows;
    if (read->out_size < n_planes * n_lines * n_kv) return SE_ERR_CAPACITY;
    double * sums = calloc((size_t) (n_planes * n_lines * n_kv), sizeof(double));
    if (!sums) return SE_ERR_MEMORY;
    const double weight = (mean_heads ? 1.0 / (double) n_head : 1.0) * (mean_rows ? 1.0 / read->n_rows : 1.0);
    const size_t last_row = (size_t) (read->n_rows - 1) * (size_t) read->row_step;
    const size_t span = last_row * node->nb[1] + (size_t) n_kv * sizeof(float);
    for (int64_t h = 0; h < n_head && !error; h++) {
        void * copy = NULL;
        const size_t offset = (size_t) h * node->nb[2] + (size_t) read->row_first * node->nb[1];
        const char * base = se_borrow(node, offset, span, &copy, &error);
        for (int32_t r = 0; base && r < read->n_rows; r++) {
            const float * row = (const float *) (base + (size_t) r * (size_t) read->row_step * node->nb[1]);
            double * sum = sums + ((mean_heads ? 0 : h) * n_lines + (mean_rows ? 0 : r)) * n_kv;
            for (int64_t n = 0; n < n_kv; n++) sum[n] += weight * (double) row[n];
        }
        free(copy);
    }
    for (int64_t i = 0; !error && i < n_planes * n_lines * n_kv; i++) read->out[i] = (float) sums[i];
    free(sums);
    return error;
}

/* With flash attention they are worked out from q, k and mask. */
static int read_flash(const struct ggml_tensor * node, se_attention_read * read) {
    const se_flash_attention f = se_flash_attention_of(node);
    const struct ggml_tensor *q = f.q, *k = f.k, *mask = f.mask, *sinks = f.sinks;
    if (!q || !k || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) return SE_ERR_SHAPE;
    if (q->ne[3] != 1 || k->ne[3] != 1) return SE_ERR_SHAPE; /* several streams: kv_unified is off */
    if (q->ne[0] != k->ne[0]) return SE_ERR_SHAPE;
    if (mask && mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) return SE_ERR_SHAPE;
    if (mask && (mask->ne[0] < k->ne[1] || mask->ne[2] != 1)) return SE_ERR_SHAPE;
    int error = select_rows(read, q->ne[1]);
    if (error) return error;
    const size_t last_row = (size_t) (read->n_rows - 1) * (size_t) read->row_step; /* counted from row_first */
    if (mask && mask->ne[1] <= read->row_first + (int64_t) last_row) return SE_ERR_SHAPE;

    se_attention a = { 0 };
    a.n_rows = read->n_rows;
    a.n_head = (int32_t) q->ne[2];
    a.head_dim = (int32_t) q->ne[0];
    a.n_kv = (int32_t) k->ne[1];
    a.n_head_kv = (int32_t) k->ne[2];
    a.k_type = k->type;
    a.k_row_stride = (int64_t) k->nb[1];
    a.k_head_stride = (int64_t) k->nb[2];
    a.q_row_stride = (int64_t) q->nb[1] * read->row_step;
    a.q_head_stride = (int64_t) q->nb[2];
    a.scale = f.scale;
    a.max_bias = f.max_bias;
    a.softcap = f.softcap;

    read->n_kv = a.n_kv;
    read->n_head = a.n_head;

    void *q_copy = NULL, *k_copy = NULL, *mask_copy = NULL, *sinks_copy = NULL;
    const size_t q_span = last_row * q->nb[1] + (size_t) (q->ne[2] - 1) * q->nb[2] + (size_t) q->ne[0] * sizeof(float);
    a.q = se_borrow(q, (size_t) read->row_first * q->nb[1], q_span, &q_copy, &error);
    if (!error) a.k = se_borrow(k, 0, se_ggml.nbytes(k), &k_copy, &error);
    if (!error && mask) {
        const size_t element = mask->type == GGML_TYPE_F16 ? 2 : 4;
        const size_t mask_span = last_row * mask->nb[1] + (size_t) a.n_kv * element;
        a.mask = se_borrow(mask, (size_t) read->row_first * mask->nb[1], mask_span, &mask_copy, &error);
        a.mask_is_f16 = mask->type == GGML_TYPE_F16;
        a.mask_row_stride = (int64_t) mask->nb[1] * read->row_step;
    }
    if (!error && sinks) a.sinks = se_borrow(sinks, 0, (size_t) a.n_head * sizeof(float), &sinks_copy, &error);
    if (!error) error = se_attention_scores(&a, read->reduce, read->n_threads, read->out, read->out_size);
    free(q_copy);
    free(k_copy);
    free(mask_copy);
    free(sinks_copy);
    return error;
}

int se_read_attention(const struct ggml_tensor * node, se_attention_read * read) {
    return se_is_flash_attention(node) ? read_flash(node, read) : read_soft_max(node, read);
}
