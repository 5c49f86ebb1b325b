#include "graph.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int se_layer_out_index(const struct ggml_tensor * node) {
    if (strncmp(node->name, "l_out-", 6) != 0) return -1;
    char * end;
    const long n = strtol(node->name + 6, &end, 10);
    return end != node->name + 6 && *end == '\0' && n >= 0 && n < 100000 ? (int) n : -1;
}

bool se_is_attention(const struct ggml_tensor * node) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT) return true;
    /* A mixture of experts also has a SOFT_MAX, over (n_expert, n_tokens): no heads and no mask. */
    return node->op == GGML_OP_SOFT_MAX && (node->ne[2] > 1 || node->src[1] != NULL);
}

bool se_is_input(const struct ggml_tensor * tensor, const char * name) {
    if (tensor->op != GGML_OP_NONE) return false;
    if (strcmp(tensor->name, name) == 0) return true;
    const char * hash = strchr(tensor->name, '#');
    if (!hash) return false;
    const size_t length = strlen(name);
    return strncmp(hash + 1, name, length) == 0 && hash[1 + length] == '#';
}

/* N of cache_k_lN or cache_v_lN at the root of a view, otherwise -1. A cache may have a tag: cache_TAGk_lN. */
static int cache_layer(const struct ggml_tensor * t, char kind) {
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    const char * number = strstr(root->name, "_l");
    if (strncmp(root->name, "cache_", 6) != 0 || !number || number[-1] != kind) return -1;
    number += 2;
    return *number && strspn(number, "0123456789") == strlen(number) ? atoi(number) : -1;
}

int se_v_written(const struct ggml_tensor * node) { return node->op == GGML_OP_SET_ROWS ? cache_layer(node, 'v') : -1; }

/* K is src[1] of a FLASH_ATTN_EXT. A SOFT_MAX has it in the product with q, with a scale, a soft cap or a bias between them. */
int se_attended_layer(const struct ggml_tensor * node) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT) return node->src[1] ? cache_layer(node->src[1], 'k') : -1;
    for (const struct ggml_tensor * t = node->src[0]; t; t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT) return t->src[0] ? cache_layer(t->src[0], 'k') : -1;
    }
    return -1;
}

static bool in_range(const struct ggml_tensor * t, size_t offset, size_t size) {
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    return root->buffer && t->data && size <= se_ggml.nbytes(t) && offset <= se_ggml.nbytes(t) - size;
}

int se_read(const struct ggml_tensor * t, void * out, size_t offset, size_t size) {
    if (!in_range(t, offset, size)) return SE_ERR_SHAPE;
    if (size) se_ggml.tensor_get(t, out, offset, size);
    return SE_OK;
}

int se_write(struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    if (!in_range(t, offset, size)) return SE_ERR_SHAPE;
    if (size) se_ggml.tensor_set(t, data, offset, size);
    return SE_OK;
}

/* The bytes [offset, offset + size) of a tensor: in place when its memory is the host's, otherwise a copy to be freed. */
static const void * borrow(const struct ggml_tensor * t, size_t offset, size_t size, void ** to_free, int * error) {
    if (!in_range(t, offset, size)) {
        *error = SE_ERR_SHAPE;
        return NULL;
    }
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    if (se_ggml.buffer_is_host(root->buffer)) return (const char *) t->data + offset;
    *to_free = malloc(size);
    if (!*to_free) {
        *error = SE_ERR_MEMORY;
        return NULL;
    }
    se_ggml.tensor_get(t, *to_free, offset, size);
    return *to_free;
}

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
    read->masked = node->src[1] != NULL;

    const bool mean_heads = read->reduce & SE_MEAN_HEADS, mean_rows = read->reduce & SE_MEAN_ROWS;
    const int64_t n_planes = mean_heads ? 1 : n_head, n_lines = mean_rows ? 1 : read->n_rows;
    if (read->out_size < n_planes * n_lines * n_kv) return SE_ERR_CAPACITY;
    double * sums = calloc((size_t) (n_planes * n_lines * n_kv), sizeof(double));
    if (!sums) return SE_ERR_MEMORY;
    const double weight = (mean_heads ? 1.0 / (double) n_head : 1.0) * (mean_rows ? 1.0 / read->n_rows : 1.0);
    const size_t span = ((size_t) (read->n_rows - 1) * (size_t) read->row_step) * node->nb[1] + (size_t) n_kv * sizeof(float);
    for (int64_t h = 0; h < n_head && !error; h++) {
        void * copy = NULL;
        const char * base = borrow(node, (size_t) h * node->nb[2] + (size_t) read->row_first * node->nb[1], span, &copy, &error);
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

/* q (head_dim, n_tokens, n_head) f32, k (head_dim, n_kv, n_head_kv), mask (n_kv, n_tokens). */
static int read_flash(const struct ggml_tensor * node, se_attention_read * read) {
    const struct ggml_tensor *q = node->src[0], *k = node->src[1], *mask = node->src[3], *sinks = node->src[4];
    if (!q || !k || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) return SE_ERR_SHAPE;
    if (q->ne[3] != 1 || k->ne[3] != 1 || q->ne[0] != k->ne[0]) return SE_ERR_SHAPE; /* several streams: kv_unified is off */
    if (mask && ((mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) || mask->ne[0] < k->ne[1] || mask->ne[2] != 1)) return SE_ERR_SHAPE;
    int error = select_rows(read, q->ne[1]);
    if (error) return error;
    if (mask && mask->ne[1] < read->row_first + (int64_t) (read->n_rows - 1) * read->row_step + 1) return SE_ERR_SHAPE;

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
    float params[3]; /* scale, max_bias, logit_softcap: ggml_flash_attn_ext */
    memcpy(params, node->op_params, sizeof params);
    a.softcap = params[2];
    /* With a soft cap ggml divides the scale by it in the kernel, and op_params keep the plain one. */
    a.scale = params[0];
    a.max_bias = params[1];

    read->n_kv = a.n_kv;
    read->n_head = a.n_head;
    read->masked = mask != NULL;

    void *q_copy = NULL, *k_copy = NULL, *mask_copy = NULL, *sinks_copy = NULL;
    const size_t last_row = (size_t) (read->n_rows - 1) * (size_t) read->row_step;
    const size_t q_span = last_row * q->nb[1] + (size_t) (q->ne[2] - 1) * q->nb[2] + (size_t) q->ne[0] * sizeof(float);
    a.q = borrow(q, (size_t) read->row_first * q->nb[1], q_span, &q_copy, &error);
    if (!error) a.k = borrow(k, 0, se_ggml.nbytes(k), &k_copy, &error);
    if (!error && mask) {
        const size_t element = mask->type == GGML_TYPE_F16 ? 2 : 4;
        a.mask = borrow(mask, (size_t) read->row_first * mask->nb[1], last_row * mask->nb[1] + (size_t) a.n_kv * element, &mask_copy, &error);
        a.mask_is_f16 = mask->type == GGML_TYPE_F16;
        a.mask_row_stride = (int64_t) mask->nb[1] * read->row_step;
    }
    if (!error && sinks) a.sinks = borrow(sinks, 0, (size_t) a.n_head * sizeof(float), &sinks_copy, &error);
    if (!error) error = se_attention_scores(&a, read->reduce, read->n_threads, read->out, read->out_size);
    free(q_copy);
    free(k_copy);
    free(mask_copy);
    free(sinks_copy);
    return error;
}

int se_read_attention(const struct ggml_tensor * node, se_attention_read * read) {
    return node->op == GGML_OP_FLASH_ATTN_EXT ? read_flash(node, read) : read_soft_max(node, read);
}

/* ---- which nodes depend on the input embeddings ---- */

typedef struct {
    const struct ggml_tensor ** slots; /* open addressing */
    size_t capacity, count;
} tensor_set;

struct se_depends {
    tensor_set prelude, layers;
};

se_depends * se_depends_new(void) { return calloc(1, sizeof(se_depends)); }

void se_depends_free(se_depends * set) {
    if (!set) return;
    free(set->prelude.slots);
    free(set->layers.slots);
    free(set);
}

static void clear(tensor_set * set) {
    if (set->capacity) memset(set->slots, 0, set->capacity * sizeof *set->slots);
    set->count = 0;
}

void se_depends_clear(se_depends * set) {
    clear(&set->prelude);
    clear(&set->layers);
}

static size_t slot_of(const tensor_set * set, const struct ggml_tensor * t) {
    size_t i = ((uintptr_t) t >> 4) * (size_t) 0x9E3779B97F4A7C15ull & (set->capacity - 1);
    while (set->slots[i] && set->slots[i] != t) i = (i + 1) & (set->capacity - 1);
    return i;
}

static bool insert(tensor_set * set, const struct ggml_tensor * t) {
    if (2 * (set->count + 1) > set->capacity) {
        tensor_set bigger = { .capacity = set->capacity ? 2 * set->capacity : 1024 };
        bigger.slots = calloc(bigger.capacity, sizeof *bigger.slots);
        if (!bigger.slots) return false;
        for (size_t i = 0; i < set->capacity; i++) {
            if (set->slots[i]) bigger.slots[slot_of(&bigger, set->slots[i])] = set->slots[i];
        }
        bigger.count = set->count;
        free(set->slots);
        *set = bigger;
    }
    const size_t i = slot_of(set, t);
    if (!set->slots[i]) {
        set->slots[i] = t;
        set->count++;
    }
    return true;
}

static bool contains_name(const tensor_set * set, const char * name, size_t length) {
    for (size_t i = 0; i < set->capacity; i++) {
        const struct ggml_tensor * t = set->slots[i];
        if (t && strncmp(t->name, name, length) == 0 && t->name[length] == '\0') return true;
    }
    return false;
}

static bool contains(const tensor_set * set, const struct ggml_tensor * t) {
    if (!set->count) return false;
    if (set->slots[slot_of(set, t)]) return true;
    if (t->op != GGML_OP_NONE) return false;
    /* BACKEND#name#i: the scheduler's copy of a node of an earlier split */
    const char * first = strchr(t->name, '#');
    const char * last = first ? strrchr(first + 1, '#') : NULL;
    return last && contains_name(set, first + 1, (size_t) (last - first - 1));
}

static bool is_embedding(const struct ggml_tensor * t) {
    return se_is_input(t, "inp_tokens") || se_is_input(t, "inp_embd") || se_is_input(t, "embd");
}

/* A view of the KV cache (k, v) has only the cache behind it: the row written by SET_ROWS is not among its sources, and
 * it may be computed or not: views are no work. */
static const struct ggml_tensor * source(const struct ggml_tensor * node, int i) {
    return i < GGML_MAX_SRC ? node->src[i] : node->view_src;
}

bool se_depends_on_layers(const se_depends * set, const struct ggml_tensor * node) {
    for (int i = 0; i <= GGML_MAX_SRC; i++) {
        const struct ggml_tensor * t = source(node, i);
        if (t && contains(&set->layers, t)) return true;
    }
    return false;
}

/* llm_graph_context::cb appends the layer's number to the names of what a layer computes: attn_norm-0. -1: of none. */
static int layer_of(const struct ggml_tensor * node) {
    const char * dash = strrchr(node->name, '-');
    return dash && dash[1] && strspn(dash + 1, "0123456789") == strlen(dash + 1) ? atoi(dash + 1) : -1;
}

int se_depends_visit(se_depends * set, const struct ggml_tensor * node, int first) {
    if (se_depends_on_layers(set, node)) return insert(&set->layers, node) ? SE_LAYERS : -1;
    bool found = false;
    for (int i = 0; i <= GGML_MAX_SRC && !found; i++) {
        const struct ggml_tensor * t = source(node, i);
        found = t && (is_embedding(t) || contains(&set->prelude, t));
    }
    if (!found) return SE_INDEPENDENT;
    const int layer = layer_of(node);
    const bool begins = layer >= 0 && layer < first;
    return insert(begins ? &set->layers : &set->prelude, node) ? (begins ? SE_LAYERS : SE_PRELUDE) : -1;
}
