#include "llama_graph.h"

#include <stdlib.h>
#include <string.h>

#define MASK "attn_inp_kq_mask"

const char * const se_usual_layer_out = "l_out";

/* N of a name `prefix`-N, otherwise -1. */
static int numbered(const char * name, const char * prefix) {
    const size_t length = strlen(prefix);
    if (strncmp(name, prefix, length) != 0 || name[length] != '-') return -1;
    const char * digits = name + length + 1;
    char * end;
    const long n = strtol(digits, &end, 10);
    return end != digits && *end == '\0' && n >= 0 && n < 100000 ? (int) n : -1;
}

int se_layer_out_index(const struct ggml_tensor * node, const char * output) { return numbered(node->name, output); }

int se_encoder_layer_out_index(const struct ggml_tensor * node) { return numbered(node->name, "layer_out"); }

int se_layer_of(const struct ggml_tensor * node) {
    const char * dash = strrchr(node->name, '-');
    return dash && dash[1] && strspn(dash + 1, "0123456789") == strlen(dash + 1) ? atoi(dash + 1) : -1;
}

bool se_is_leaf(const struct ggml_tensor * tensor) { return tensor->op == GGML_OP_NONE; }

const char * se_copied_name(const struct ggml_tensor * leaf, size_t * length) {
    if (!se_is_leaf(leaf)) return NULL;
    const char * first = strchr(leaf->name, '#');
    const char * last = first ? strrchr(first + 1, '#') : NULL;
    if (!last) return NULL;
    *length = (size_t) (last - first - 1);
    return first + 1;
}

bool se_has_shared_name(const struct ggml_tensor * tensor) {
    size_t length;
    const char * copied = se_copied_name(tensor, &length);
    return (copied ? copied : tensor->name)[0] == ' ';
}

bool se_has_name(const struct ggml_tensor * tensor, const char * name, size_t length) {
    return strncmp(tensor->name, name, length) == 0 && tensor->name[length] == '\0';
}

bool se_is_input(const struct ggml_tensor * tensor, const char * name) {
    if (!se_is_leaf(tensor)) return false;
    if (strcmp(tensor->name, name) == 0) return true;
    size_t length;
    const char * copied = se_copied_name(tensor, &length);
    return copied && strlen(name) == length && strncmp(copied, name, length) == 0;
}

bool se_is_batch_input(const struct ggml_tensor * tensor, int64_t n_embd, int64_t n_rows) {
    if (se_is_input(tensor, "inp_tokens") || se_is_input(tensor, "inp_raw")) return true;
    if (!se_is_leaf(tensor) || tensor->type != GGML_TYPE_F32 || se_is_input(tensor, MASK)) return false;
    if (tensor->ne[0] < n_embd || tensor->ne[1] != n_rows || tensor->ne[2] * tensor->ne[3] != 1) return false;
    size_t length;
    const char * copied = se_copied_name(tensor, &length);
    if (!copied) return tensor->flags & GGML_TENSOR_FLAG_INPUT;
    while (length > 0 && copied[length - 1] >= '0' && copied[length - 1] <= '9') length--;
    return length == 0 || copied[length - 1] != '-';
}

bool se_ends_layers(const struct ggml_tensor * node) { return strcmp(node->name, "result_norm") == 0; }

bool se_is_computed(const struct ggml_tensor * node) { return node->flags & GGML_TENSOR_FLAG_COMPUTE; }

void se_set_computed(struct ggml_tensor * node, bool computed) {
    if (computed) node->flags |= GGML_TENSOR_FLAG_COMPUTE;
    else node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
}

const struct ggml_tensor * se_operand(const struct ggml_tensor * node, int i) {
    return i < GGML_MAX_SRC ? node->src[i] : node->view_src;
}

struct ggml_tensor * se_computed_source(const struct ggml_tensor * node, int i) {
    struct ggml_tensor * source = i < GGML_MAX_SRC ? node->src[i] : NULL;
    size_t length;
    return source && (!se_is_leaf(source) || se_copied_name(source, &length)) ? source : NULL;
}

const struct ggml_tensor * se_written_cells(const struct ggml_tensor * node, int64_t n_tokens) {
    const struct ggml_tensor * indices = node->op == GGML_OP_SET_ROWS ? node->src[1] : NULL;
    if (!indices || indices->type != GGML_TYPE_I64) return NULL;
    return indices->ne[0] == n_tokens && indices->ne[1] == 1 ? indices : NULL;
}

/* N of cache_KIND_lN (k, v; r and s of recurrent layers) at the root of a view, otherwise -1. A cache may have a tag: cache_TAGk_lN. */
static int cache_layer(const struct ggml_tensor * t, char kind) {
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    const char * number = strstr(root->name, "_l");
    if (strncmp(root->name, "cache_", 6) != 0 || !number || number[-1] != kind) return -1;
    number += 2;
    return *number && strspn(number, "0123456789") == strlen(number) ? atoi(number) : -1;
}

int se_state_written(const struct ggml_tensor * node) {
    if (node->op != GGML_OP_CPY && node->op != GGML_OP_SCALE) return -1;
    const int shift = cache_layer(node, 'r');
    return shift >= 0 ? shift : cache_layer(node, 's');
}

int se_v_written(const struct ggml_tensor * node) { return node->op == GGML_OP_SET_ROWS ? cache_layer(node, 'v') : -1; }

bool se_makes_query(const struct ggml_tensor * node, int layer) {
    return numbered(node->name, "Qcur") == layer || numbered(node->name, "Qcur_normed") == layer;
}

int se_attended_layer(const struct ggml_tensor * node) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT) return node->src[1] ? cache_layer(node->src[1], 'k') : -1;
    for (const struct ggml_tensor * t = node->src[0]; t; t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT) return t->src[0] ? cache_layer(t->src[0], 'k') : -1;
    }
    return -1;
}

/* A leaf without a name, or a copy of one. */
static bool is_unnamed(const struct ggml_tensor * leaf) {
    size_t length;
    const char * copied = se_copied_name(leaf, &length);
    return se_is_leaf(leaf) && strncmp(copied ? copied : leaf->name, "leaf_", 5) == 0;
}

/* Whether K as it is in the cache is turned: the graph that shifts it. */
static bool turns_cache(const struct ggml_tensor * rope) {
    for (const struct ggml_tensor * t = rope->src[0]; t; t = t->src[0]) {
        if (cache_layer(t, 'k') >= 0) return true;
    }
    return false;
}

struct ggml_tensor * se_rope_positions(const struct ggml_tensor * node, int64_t * n_used) {
    struct ggml_tensor * positions = node->op == GGML_OP_ROPE ? node->src[1] : NULL;
    if (!positions || positions->type != GGML_TYPE_I32) return NULL;
    const int64_t n = positions->ne[0], n_tokens = node->src[0]->ne[2];
    if (!se_is_input(positions, "inp_pos")) {
        const bool fits = n == n_tokens || n == 4 * n_tokens;
        if (!fits || !is_unnamed(positions) || turns_cache(node)) return NULL;
    }
    *n_used = n == 4 * n_tokens ? 3 * n_tokens : n;
    return positions;
}

struct ggml_tensor * se_mask_input(const struct ggml_tensor * node, int i) {
    if (node->op != GGML_OP_FLASH_ATTN_EXT && node->op != GGML_OP_SOFT_MAX && node->op != GGML_OP_CPY) return NULL;
    struct ggml_tensor * mask = i < GGML_MAX_SRC ? node->src[i] : NULL;
    return mask && se_is_input(mask, MASK) ? mask : NULL;
}

bool se_is_flash_attention(const struct ggml_tensor * node) { return node->op == GGML_OP_FLASH_ATTN_EXT; }

bool se_is_attention(const struct ggml_tensor * node) {
    return se_is_flash_attention(node) || (node->op == GGML_OP_SOFT_MAX && (node->ne[2] > 1 || node->src[1] != NULL));
}

const struct ggml_tensor * se_attention_mask(const struct ggml_tensor * node) {
    return se_is_flash_attention(node) ? node->src[3] : node->src[1];
}

se_flash_attention se_flash_attention_of(const struct ggml_tensor * node) {
    float params[3];
    memcpy(params, node->op_params, sizeof params);
    return (se_flash_attention) {
        .q = node->src[0], .k = node->src[1], .mask = node->src[3], .sinks = node->src[4],
        .scale = params[0], .max_bias = params[1], .softcap = params[2],
    };
}

const struct ggml_tensor * se_joined_part(const struct ggml_tensor * node, int s) {
    const struct ggml_tensor * part = node->op == GGML_OP_CONCAT ? node->src[s] : NULL;
    return part && part->op == GGML_OP_REPEAT ? part->src[0] : part;
}

struct ggml_tensor * se_leaf_times_zero(const struct ggml_tensor * node) {
    if (node->op != GGML_OP_SCALE || !node->src[0] || !se_is_leaf(node->src[0])) return NULL;
    float factor;
    memcpy(&factor, node->op_params, sizeof factor);
    return factor == 0.0f ? node->src[0] : NULL;
}

bool se_enters_layer(const struct ggml_tensor * node, int layer) {
    if (layer == 0) {
        return strcmp(node->name, "pos_embed") == 0 || strcmp(node->name, "pos_embd") == 0 || strcmp(node->name, "pre_ln") == 0;
    }
    return se_encoder_layer_out_index(node) == layer - 1;
}

bool se_may_be_copy(const struct ggml_tensor * tensor) { return se_is_leaf(tensor) && strchr(tensor->name, '#'); }

bool se_may_be_copy_of(const struct ggml_tensor * leaf, const struct ggml_tensor * node) {
    if (!se_may_be_copy(leaf)) return false;
    const char * copied = strchr(leaf->name, '#') + 1;
    const size_t length = strlen(node->name), there = strlen(copied);
    if (there <= length) return strncmp(copied, node->name, there) == 0;
    return strncmp(copied, node->name, length) == 0 && copied[length] == '#';
}

/* With padding, a window at the edge of fewer rows would not be one of those at the edge of all. */
static se_shape_rule pool_rule(const struct ggml_tensor * node) {
    const int32_t * p = node->op_params; /* op, k0, k1, s0, s1, p0, p1 */
    if (p[5] != 0 || p[6] != 0) return (se_shape_rule) { .kind = SE_SHAPE_UNKNOWN };
    return (se_shape_rule) { .kind = SE_SHAPE_POOL, .window = { p[1], p[2] }, .step = { p[3], p[4] } };
}

se_shape_rule se_shape_rule_of(const struct ggml_tensor * node) {
    se_shape_rule rule = { .kind = SE_SHAPE_UNKNOWN };
    switch (node->op) {
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_UNARY:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_SQR:
        case GGML_OP_SQRT: rule.kind = SE_SHAPE_EACH; break;
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM: rule.kind = SE_SHAPE_ROWS; break;
        case GGML_OP_SOFT_MAX: rule.kind = SE_SHAPE_SOFT_MAX; break;
        case GGML_OP_ROPE: rule.kind = SE_SHAPE_ROPE; break;
        case GGML_OP_GLU: rule.kind = SE_SHAPE_GLU; break;
        case GGML_OP_MUL_MAT: rule.kind = SE_SHAPE_PRODUCT; break;
        case GGML_OP_FLASH_ATTN_EXT: rule.kind = SE_SHAPE_ATTENTION; break;
        case GGML_OP_GET_ROWS: rule.kind = SE_SHAPE_GATHER; break;
        case GGML_OP_POOL_2D: return pool_rule(node);
        case GGML_OP_CONCAT:
            rule.kind = SE_SHAPE_JOIN;
            rule.axes[0] = node->op_params[0];
            break;
        case GGML_OP_CPY: /* into a tensor of its own, not into another */
            if (node->src[1] == node) rule.kind = SE_SHAPE_IN_ORDER;
            break;
        case GGML_OP_RESHAPE:
        case GGML_OP_CONT: rule.kind = SE_SHAPE_IN_ORDER; break;
        case GGML_OP_VIEW: rule.kind = SE_SHAPE_VIEW; break;
        case GGML_OP_PERMUTE:
            rule.kind = SE_SHAPE_PERMUTED;
            memcpy(rule.axes, node->op_params, sizeof rule.axes);
            break;
        case GGML_OP_TRANSPOSE: return (se_shape_rule) { .kind = SE_SHAPE_PERMUTED, .axes = { 1, 0, 2, 3 } };
        default: break;
    }
    return rule;
}

struct ggml_tensor * se_index_leaf(const struct ggml_tensor * node, int i) {
    struct ggml_tensor * leaf = i < GGML_MAX_SRC ? node->src[i] : NULL;
    size_t length;
    if (!leaf || !se_is_leaf(leaf) || leaf->type != GGML_TYPE_I32) return NULL;
    if (!(leaf->flags & GGML_TENSOR_FLAG_INPUT) && !se_copied_name(leaf, &length)) return NULL;
    return leaf->ne[1] == 1 && leaf->ne[2] == 1 && leaf->ne[3] == 1 ? leaf : NULL;
}
