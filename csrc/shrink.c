#include "shrink.h"

#include <stdlib.h>
#include <string.h>

#include "ggml_api.h"
#include "llama_graph.h"
#include "shapes.h"
#include "star_edge.h"

struct se_shrink {
    se_shapes * slots; /* open addressing; a free slot has no tensor */
    size_t capacity, count;
    bool rehearses;
    int32_t * keep;  /* (n_keep) rows of all, in their new order */
    int32_t * place; /* (n_rows) where a row is now, or -1 */
    int64_t n_keep, n_rows;
};

/* ---- the table ---- */

se_shrink * se_shrink_new(void) { return calloc(1, sizeof(se_shrink)); }

static void forget_rows(se_shrink * s) {
    free(s->keep);
    free(s->place);
    s->keep = s->place = NULL;
    s->n_keep = s->n_rows = 0;
}

void se_shrink_free(se_shrink * s) {
    if (!s) return;
    forget_rows(s);
    free(s->slots);
    free(s);
}

void se_shrink_clear(se_shrink * s) {
    if (s->count) memset(s->slots, 0, s->capacity * sizeof *s->slots);
    s->count = 0;
    forget_rows(s);
}

bool se_shrink_active(const se_shrink * s) { return s->count > 0; }

static se_shapes * slot_of(const se_shrink * s, const struct ggml_tensor * t) {
    size_t i = ((uintptr_t) t >> 4) * (size_t) 0x9E3779B97F4A7C15ull & (s->capacity - 1);
    while (s->slots[i].tensor && s->slots[i].tensor != t) i = (i + 1) & (s->capacity - 1);
    return &s->slots[i];
}

static const se_shapes * find(const se_shrink * s, const struct ggml_tensor * t) {
    if (!t || !s->count) return NULL;
    const se_shapes * e = slot_of(s, t);
    return e->tensor ? e : NULL;
}

bool se_shrink_has(const se_shrink * s, const struct ggml_tensor * t) { return find(s, t) != NULL; }

/* Room for n more, so that entries stay where they are while they are added. */
static bool make_room(se_shrink * s, size_t n) {
    size_t capacity = s->capacity ? s->capacity : 1024;
    while (2 * (s->count + n) > capacity) capacity *= 2;
    if (capacity == s->capacity) return true;
    se_shrink bigger = { .capacity = capacity };
    bigger.slots = calloc(capacity, sizeof *bigger.slots);
    if (!bigger.slots) return false;
    for (size_t i = 0; i < s->capacity; i++) {
        if (s->slots[i].tensor) *slot_of(&bigger, s->slots[i].tensor) = s->slots[i];
    }
    free(s->slots);
    s->slots = bigger.slots;
    s->capacity = capacity;
    return true;
}

/* An operand: what the table has of it, otherwise as it is. */
static se_shapes operand(const se_shrink * s, const struct ggml_tensor * node, int i) {
    const struct ggml_tensor * t = se_operand(node, i);
    const se_shapes * e = find(s, t);
    if (e) return *e;
    se_shapes same = { 0 };
    if (t) same.was = same.now = se_shape_of(t);
    return same;
}

/* ---- positions and row numbers ---- */

/* Gives a leaf of int32 the first n of `values`, and takes them. */
static int shorten_leaf(se_shrink * s, struct ggml_tensor * leaf, int32_t * values, int64_t n) {
    int error = SE_OK;
    if (!s->rehearses) error = se_write(leaf, values, 0, (size_t) n * sizeof *values);
    free(values);
    if (error) return error;
    se_shapes * e = slot_of(s, leaf);
    e->tensor = leaf;
    e->was = e->now = se_shape_of(leaf);
    e->now.ne[0] = n;
    e->shorter = 1;
    se_shape_lay_contiguous(&e->now);
    s->count++;
    if (!s->rehearses) se_shape_set(leaf, &e->now);
    return SE_OK;
}

static int read_leaf(const struct ggml_tensor * leaf, int32_t ** values) {
    const size_t size = (size_t) leaf->ne[0] * sizeof **values;
    if (leaf->ne[0] < 1 || leaf->nb[0] != sizeof **values) return SE_ERR_ROWS;
    *values = malloc(size);
    if (!*values) return SE_ERR_MEMORY;
    const int error = se_read(leaf, *values, 0, size);
    if (error) free(*values);
    return error;
}

/* Positions of all rows, in one section or several, become those of the rows that stay. */
static int shorten_positions(se_shrink * s, struct ggml_tensor * leaf) {
    if (leaf->ne[0] % s->n_rows != 0) return SE_ERR_ROWS;
    const int64_t n_sections = leaf->ne[0] / s->n_rows;
    int32_t * all;
    const int error = read_leaf(leaf, &all);
    if (error) return error;
    int32_t * kept = malloc((size_t) (n_sections * s->n_keep) * sizeof *kept);
    for (int64_t i = 0; kept && i < n_sections * s->n_keep; i++) {
        kept[i] = all[i / s->n_keep * s->n_rows + s->keep[i % s->n_keep]];
    }
    free(all);
    return kept ? shorten_leaf(s, leaf, kept, n_sections * s->n_keep) : SE_ERR_MEMORY;
}

/* Numbers of rows become those of the same rows among what stays, and the others go. */
static int shorten_row_numbers(se_shrink * s, struct ggml_tensor * leaf) {
    int32_t * numbers;
    const int error = read_leaf(leaf, &numbers);
    if (error) return error;
    int64_t n = 0;
    for (int64_t i = 0; i < leaf->ne[0]; i++) {
        const int32_t row = numbers[i];
        if (row < 0 || row >= s->n_rows) {
            free(numbers);
            return SE_ERR_ROWS;
        }
        if (s->place[row] >= 0) numbers[n++] = s->place[row];
    }
    if (n) return shorten_leaf(s, leaf, numbers, n);
    free(numbers);
    return SE_ERR_ROWS;
}

/* Before the shape of a node is worked out: what it reads besides. */
static int shorten_indices(se_shrink * s, const struct ggml_tensor * node, enum se_shape_kind kind) {
    struct ggml_tensor * leaf = se_index_leaf(node, 1);
    if (!leaf || find(s, leaf)) return SE_OK;
    const se_shapes a = operand(s, node, 0);
    if (kind == SE_SHAPE_ROPE && a.shorter == 4 && a.was.ne[2] == s->n_rows) return shorten_positions(s, leaf);
    if (kind == SE_SHAPE_GATHER && a.shorter == 2 && a.was.ne[1] == s->n_rows) return shorten_row_numbers(s, leaf);
    return SE_OK;
}

/* ---- the graph ---- */

int se_shrink_begin(se_shrink * s, struct ggml_tensor * node, const int32_t * keep, int32_t n_keep, bool rehearse) {
    se_shrink_clear(s);
    if (!keep || n_keep < 1) return SE_ERR_ARGUMENT;
    se_shapes e = { .tensor = node, .was = se_shape_of(node), .now = se_shape_of(node), .shorter = 2 };
    if (node->type != GGML_TYPE_F32 || node->ne[2] != 1 || node->ne[3] != 1 || !se_shape_is_contiguous(&e.was)) return SE_ERR_ROWS;
    if (n_keep > node->ne[1] || node->ne[1] > INT32_MAX) return SE_ERR_ARGUMENT;

    s->rehearses = rehearse;
    s->n_rows = node->ne[1];
    s->n_keep = n_keep;
    s->keep = malloc((size_t) n_keep * sizeof *s->keep);
    s->place = malloc((size_t) s->n_rows * sizeof *s->place);
    int error = s->keep && s->place && make_room(s, 1) ? SE_OK : SE_ERR_MEMORY;
    for (int64_t i = 0; !error && i < s->n_rows; i++) s->place[i] = -1;
    for (int32_t i = 0; !error && i < n_keep; i++) {
        if (keep[i] < 0 || keep[i] >= s->n_rows || s->place[keep[i]] >= 0) {
            error = SE_ERR_ARGUMENT;
        } else {
            s->keep[i] = keep[i];
            s->place[keep[i]] = i;
        }
    }
    const size_t row = node->nb[1];
    if (!error && !rehearse) {
        void * copy = NULL;
        char * kept = malloc((size_t) n_keep * row);
        const char * rows = kept ? se_borrow(node, 0, (size_t) s->n_rows * row, &copy, &error) : NULL;
        if (!kept) error = SE_ERR_MEMORY;
        for (int32_t i = 0; rows && i < n_keep; i++) memcpy(kept + (size_t) i * row, rows + (size_t) keep[i] * row, row);
        if (!error) error = se_write(node, kept, 0, (size_t) n_keep * row);
        free(copy);
        free(kept);
    }
    if (error) {
        forget_rows(s);
        return error;
    }
    e.now.ne[1] = n_keep;
    se_shape_lay_contiguous(&e.now);
    *slot_of(s, node) = e;
    s->count = 1;
    if (!rehearse) se_shape_set(node, &e.now);
    return SE_OK;
}

/* Whether the node depends on rows that stay. An operand that is another backend's copy of one is an error. */
static int depends(const se_shrink * s, const struct ggml_tensor * node, bool * found) {
    *found = false;
    for (int i = 0; i < SE_MAX_OPERANDS; i++) {
        const struct ggml_tensor * t = se_operand(node, i);
        if (!t || t == node) continue;
        if (find(s, t)) {
            *found = true;
        } else if (se_may_be_copy(t)) {
            for (size_t k = 0; k < s->capacity; k++) {
                const struct ggml_tensor * other = s->slots[k].tensor;
                if (other && !se_is_leaf(other) && se_may_be_copy_of(t, other)) return SE_ERR_ROWS;
            }
        }
    }
    return SE_OK;
}

static void set_operands(const se_shrink * s, const struct ggml_tensor * node, bool now) {
    for (int i = 0; i < SE_MAX_OPERANDS; i++) {
        const struct ggml_tensor * t = se_operand(node, i);
        const se_shapes * e = t != node ? find(s, t) : NULL;
        if (e) se_shape_set(e->tensor, now ? &e->now : &e->was);
    }
}

/* Gives a node its shape, unless this is a rehearsal or the node's backend cannot compute it then. */
static bool apply(const se_shrink * s, struct ggml_tensor * node, const se_shapes * e) {
    if (s->rehearses) set_operands(s, node, true);
    se_shape_set(node, &e->now);
    const bool supported = se_supports(node);
    if (s->rehearses || !supported) se_shape_set(node, &e->was);
    if (s->rehearses) set_operands(s, node, false);
    return supported;
}

int se_shrink_visit(se_shrink * s, struct ggml_tensor * node) {
    if (!s->count) return SE_OK;
    bool found;
    int error = depends(s, node, &found);
    if (error || !found) return error;
    if (find(s, node)) return SE_ERR_ROWS; /* it has gone by: another graph of the same tensors */
    if (!make_room(s, 2)) return SE_ERR_MEMORY;
    const se_shape_rule rule = se_shape_rule_of(node);
    error = shorten_indices(s, node, rule.kind);
    if (error) return error;

    se_shapes e = { .tensor = node, .was = se_shape_of(node), .now = se_shape_of(node) };
    const se_shapes operands[] = { operand(s, node, 0), operand(s, node, 1), operand(s, node, 2) };
    if (!se_shapes_of_node(&e, node, &rule, operands) || !e.shorter) return SE_ERR_ROWS;
    const bool has_strides = rule.kind == SE_SHAPE_VIEW || rule.kind == SE_SHAPE_PERMUTED;
    if (!has_strides) {
        if (!se_shape_is_contiguous(&e.was)) return SE_ERR_ROWS;
        se_shape_lay_contiguous(&e.now);
    }
    /* a reshaped view of what must have no gaps */
    if (rule.kind == SE_SHAPE_IN_ORDER && node->view_src && !se_shape_is_contiguous(&operands[0].now)) return SE_ERR_ROWS;
    for (int d = 0; d < SE_DIMS; d++) {
        if (e.now.ne[d] < 1 || e.now.ne[d] > e.was.ne[d]) return SE_ERR_ROWS;
    }
    if (se_shape_extent(&e.now) > se_shape_extent(&e.was) || !apply(s, node, &e)) return SE_ERR_ROWS;
    *slot_of(s, node) = e;
    s->count++;
    return SE_OK;
}

int64_t se_shrink_length(const se_shrink * s, const struct ggml_tensor * node) {
    const se_shapes * e = find(s, node);
    return e ? e->now.ne[1] : node->ne[1];
}

void se_shrink_restore(se_shrink * s, const struct ggml_tensor * node) {
    const se_shapes * e = find(s, node);
    if (e) se_shape_set(e->tensor, &e->was);
}

void se_shrink_restore_all(se_shrink * s) {
    for (size_t i = 0; i < s->capacity; i++) {
        if (s->slots[i].tensor) se_shape_set(s->slots[i].tensor, &s->slots[i].was);
    }
}
