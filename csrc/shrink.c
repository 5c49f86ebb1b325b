#include "shrink.h"

#include <stdlib.h>
#include <string.h>

#include "ggml_api.h"
#include "llama_graph.h"
#include "star_edge.h"

enum { DIMS = GGML_MAX_DIMS };

typedef struct {
    int64_t ne[DIMS];
    size_t nb[DIMS];
} shape;

typedef struct {
    struct ggml_tensor * tensor; /* NULL: a free slot */
    shape was, now;              /* as the graph was built, and with the rows that stay */
    unsigned shorter;            /* bit d: dimension d runs over rows, of which some may be gone */
} entry;

struct se_shrink {
    entry * slots; /* open addressing */
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

static entry * slot_of(const se_shrink * s, const struct ggml_tensor * t) {
    size_t i = ((uintptr_t) t >> 4) * (size_t) 0x9E3779B97F4A7C15ull & (s->capacity - 1);
    while (s->slots[i].tensor && s->slots[i].tensor != t) i = (i + 1) & (s->capacity - 1);
    return &s->slots[i];
}

static const entry * find(const se_shrink * s, const struct ggml_tensor * t) {
    if (!t || !s->count) return NULL;
    const entry * e = slot_of(s, t);
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

static shape shape_of(const struct ggml_tensor * t) {
    shape s;
    memcpy(s.ne, t->ne, sizeof s.ne);
    memcpy(s.nb, t->nb, sizeof s.nb);
    return s;
}

static void set_shape(struct ggml_tensor * t, const shape * s) {
    memcpy(t->ne, s->ne, sizeof s->ne);
    memcpy(t->nb, s->nb, sizeof s->nb);
}

/* An operand: what the table has of it, otherwise as it is. */
static entry operand(const se_shrink * s, const struct ggml_tensor * node, int i) {
    const struct ggml_tensor * t = se_operand(node, i);
    const entry * e = find(s, t);
    if (e) return *e;
    entry same = { 0 };
    if (t) same.was = same.now = shape_of(t);
    return same;
}

static bool has_operand(const struct ggml_tensor * node, int i) { return se_operand(node, i) != NULL; }

/* ---- shapes ---- */

static bool is_contiguous(const shape * s) {
    for (int d = 1; d < DIMS; d++) {
        if (s->ne[d] > 1 && s->nb[d] != s->nb[d - 1] * (size_t) s->ne[d - 1]) return false;
    }
    return true;
}

static void lay_contiguous(shape * s) {
    for (int d = 1; d < DIMS; d++) s->nb[d] = s->nb[d - 1] * (size_t) s->ne[d - 1];
}

static int64_t n_elements(const shape * s) {
    int64_t n = 1;
    for (int d = 0; d < DIMS; d++) n *= s->ne[d];
    return n;
}

/* Bytes from the first element of a tensor to the end of its last one. */
static size_t extent(const shape * s) {
    size_t last = 0;
    for (int d = 0; d < DIMS; d++) last += (size_t) (s->ne[d] - 1) * s->nb[d];
    return last + s->nb[0];
}

/* The dimensions of operand `a`, which the node has too. */
static bool follow(entry * e, const entry * a) {
    for (int d = 0; d < DIMS; d++) {
        if (e->was.ne[d] != a->was.ne[d]) return false;
        e->now.ne[d] = a->now.ne[d];
    }
    e->shorter |= a->shorter;
    return true;
}

/* Whether `b` can be repeated over `a`, and means the same rows where it is as long. */
static bool repeats(const entry * a, const entry * b) {
    for (int d = 0; d < DIMS; d++) {
        const unsigned bit = 1u << d;
        if (b->now.ne[d] < 1 || a->now.ne[d] % b->now.ne[d] != 0) return false;
        if (b->shorter & bit && !(a->shorter & bit)) return false;
        if (a->shorter & bit && b->was.ne[d] != 1 && (!(b->shorter & bit) || b->now.ne[d] != a->now.ne[d])) return false;
    }
    return true;
}

static bool same_shape(const entry * a, const entry * b) {
    if (a->shorter != b->shorter) return false;
    for (int d = 0; d < DIMS; d++) {
        if (a->now.ne[d] != b->now.ne[d] || a->was.ne[d] != b->was.ne[d]) return false;
    }
    return true;
}

static bool each(entry * e, const struct ggml_tensor * node, const entry * a, const entry * b) {
    return follow(e, a) && (!has_operand(node, 1) || repeats(a, b));
}

static bool product(entry * e, const entry * a, const entry * b) {
    if (a->now.ne[0] != b->now.ne[0] || (a->shorter & 1) != (b->shorter & 1)) return false;
    const int64_t was[DIMS] = { a->was.ne[1], b->was.ne[1], b->was.ne[2], b->was.ne[3] };
    const int64_t now[DIMS] = { a->now.ne[1], b->now.ne[1], b->now.ne[2], b->now.ne[3] };
    for (int d = 0; d < DIMS; d++) {
        if (was[d] != e->was.ne[d]) return false;
        e->now.ne[d] = now[d];
        if (d > 1 && (a->shorter >> d & 1 || (b->shorter >> d & 1 && a->was.ne[d] != 1))) return false;
    }
    e->shorter |= (a->shorter >> 1 & 1) | (b->shorter & ~1u);
    return true;
}

static bool attention(entry * e, const struct ggml_tensor * node, const entry * q, const entry * k, const entry * v) {
    if (has_operand(node, 3)) return false; /* a mask has a place for each row */
    if (q->shorter != 2 || k->shorter != 2 || v->shorter != 2 || k->now.ne[1] != v->now.ne[1]) return false;
    const int64_t was[DIMS] = { v->was.ne[0], q->was.ne[2], q->was.ne[1], q->was.ne[3] };
    for (int d = 0; d < DIMS; d++) {
        if (was[d] != e->was.ne[d]) return false;
    }
    e->now.ne[2] = q->now.ne[1];
    e->shorter |= 4;
    return true;
}

static bool pool(entry * e, const entry * a, const se_shape_rule * rule) {
    for (int d = 0; d < DIMS; d++) {
        int64_t was = a->was.ne[d], now = a->now.ne[d];
        if (d < 2) {
            const int64_t window = rule->window[d], step = rule->step[d];
            if (window < 1 || step < 1) return false;
            /* a window has rows that stay, or none of them */
            if (a->shorter >> d & 1 && (window != step || now % window != 0)) return false;
            was = (was - window) / step + 1;
            now = (now - window) / step + 1;
        }
        if (was != e->was.ne[d]) return false;
        e->now.ne[d] = now;
    }
    e->shorter |= a->shorter;
    return true;
}

static bool join(entry * e, const entry * a, const entry * b, int axis) {
    if (axis < 0 || axis >= DIMS) return false;
    const unsigned along = 1u << axis;
    if ((a->shorter | b->shorter) & along || a->shorter != b->shorter) return false;
    for (int d = 0; d < DIMS; d++) {
        const int64_t was = a->was.ne[d] + (d == axis ? b->was.ne[d] : 0);
        if (was != e->was.ne[d] || (d != axis && a->now.ne[d] != b->now.ne[d])) return false;
        if (d != axis) e->now.ne[d] = a->now.ne[d];
    }
    e->shorter |= a->shorter;
    return true;
}

/* Elements stay in their order. A dimension of rows in `a` ends where one of the node does: rows that stay are the first elements of both. */
static bool in_order(entry * e, const entry * a) {
    if (n_elements(&e->was) != n_elements(&a->was)) return false;
    bool same = true;
    for (int d = 0; d < DIMS; d++) same = same && e->was.ne[d] == a->was.ne[d];
    if (same) return follow(e, a);
    int64_t end = 1;
    for (int h = 0; h < DIMS; h++) {
        end *= a->was.ne[h];
        if (!(a->shorter >> h & 1)) continue;
        int d = 0;
        int64_t reached = e->was.ne[0];
        while (reached != end && ++d < DIMS) reached *= e->was.ne[d];
        if (d == DIMS) return false;
        const int64_t length = e->was.ne[d] * a->now.ne[h];
        if (length % a->was.ne[h] != 0) return false;
        e->now.ne[d] = length / a->was.ne[h];
        e->shorter |= 1u << d;
    }
    return true;
}

/* Whether a view is of all elements of `a`, one after the other. */
static bool is_whole(const entry * e, const entry * a, size_t offset) {
    return offset == 0 && e->was.nb[0] == a->was.nb[0] && n_elements(&e->was) == n_elements(&a->was) && is_contiguous(&e->was) &&
           is_contiguous(&a->was) && is_contiguous(&a->now);
}

/* A window into `a`: which dimension it takes from where is seen by the strides. */
static bool view(entry * e, const struct ggml_tensor * node, const entry * a) {
    const struct ggml_tensor * source = se_operand(node, 0);
    const struct ggml_tensor * root = source->view_src ? source->view_src : source;
    const size_t before = source->view_src ? source->view_offs : 0;
    if (node->view_src != root || node->view_offs < before) return false;
    size_t offset = node->view_offs - before;
    if (is_whole(e, a, offset)) { /* the same elements in other dimensions: a reshape */
        if (!in_order(e, a)) return false;
        lay_contiguous(&e->now);
        return true;
    }
    int rows = -1; /* the dimension of rows in `a`: one, and strides above it are others now */
    for (int d = 0; d < DIMS; d++) {
        if (!(a->shorter >> d & 1)) continue;
        if (rows >= 0) return false;
        rows = d;
    }
    if (rows < 0 || !is_contiguous(&a->was)) return false;
    const size_t stride = a->was.nb[rows];
    const int64_t left_out = (int64_t) (offset / stride); /* rows before the window */
    if (left_out >= a->was.ne[rows]) return false;
    bool found = false;
    for (int d = 0; d < DIMS; d++) {
        if (e->was.ne[d] == 1) continue;
        if (e->was.nb[d] == stride) {
            /* Rows that it leaves out stay left out: they are the first and the last ones of what stays, too. */
            const int64_t length = a->now.ne[rows] - (a->was.ne[rows] - e->was.ne[d]);
            if (found || left_out + e->was.ne[d] > a->was.ne[rows] || length < 1) return false;
            e->now.ne[d] = length;
            e->shorter |= 1u << d;
            found = true;
        } else if (e->was.nb[d] > stride) {
            int h = rows + 1;
            while (h < DIMS && (a->was.ne[h] == 1 || a->was.nb[h] != e->was.nb[d])) h++;
            if (h == DIMS) return false;
            e->now.nb[d] = a->now.nb[h];
        }
    }
    return found;
}

static bool permuted(entry * e, const entry * a, const int32_t axes[DIMS]) {
    unsigned seen = 0;
    for (int i = 0; i < DIMS; i++) {
        const int32_t d = axes[i];
        if (d < 0 || d >= DIMS || seen >> d & 1 || e->was.ne[d] != a->was.ne[i]) return false;
        seen |= 1u << d;
        e->now.ne[d] = a->now.ne[i];
        e->now.nb[d] = a->now.nb[i];
        if (a->shorter >> i & 1) e->shorter |= 1u << d;
    }
    return true;
}

/* ---- positions and row numbers ---- */

/* Gives a leaf of int32 the first n of `values`, and takes them. */
static int shorten_leaf(se_shrink * s, struct ggml_tensor * leaf, int32_t * values, int64_t n) {
    int error = SE_OK;
    if (!s->rehearses) error = se_write(leaf, values, 0, (size_t) n * sizeof *values);
    free(values);
    if (error) return error;
    entry * e = slot_of(s, leaf);
    e->tensor = leaf;
    e->was = e->now = shape_of(leaf);
    e->now.ne[0] = n;
    e->shorter = 1;
    lay_contiguous(&e->now);
    s->count++;
    if (!s->rehearses) set_shape(leaf, &e->now);
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
    const entry a = operand(s, node, 0);
    if (kind == SE_SHAPE_ROPE && a.shorter == 4 && a.was.ne[2] == s->n_rows) return shorten_positions(s, leaf);
    if (kind == SE_SHAPE_GATHER && a.shorter == 2 && a.was.ne[1] == s->n_rows) return shorten_row_numbers(s, leaf);
    return SE_OK;
}

static bool rope(entry * e, const entry * a, const entry * positions) {
    if (a->shorter != 4 || positions->shorter != 1 || !follow(e, a)) return false;
    return positions->now.ne[0] == a->now.ne[2] || positions->now.ne[0] == 4 * a->now.ne[2];
}

static bool gather(entry * e, const entry * a, const entry * indices) {
    if (indices->shorter != 1 || a->shorter & ~2u) return false; /* numbers of rows that are gone, otherwise */
    if (e->was.ne[0] != a->was.ne[0] || e->was.ne[1] != indices->was.ne[0] || e->was.ne[2] != 1 || e->was.ne[3] != 1) return false;
    e->now.ne[1] = indices->now.ne[0];
    e->shorter |= 2;
    return true;
}

/* ---- the graph ---- */

int se_shrink_begin(se_shrink * s, struct ggml_tensor * node, const int32_t * keep, int32_t n_keep, bool rehearse) {
    se_shrink_clear(s);
    if (!keep || n_keep < 1) return SE_ERR_ARGUMENT;
    entry e = { .tensor = node, .was = shape_of(node), .now = shape_of(node), .shorter = 2 };
    if (node->type != GGML_TYPE_F32 || node->ne[2] != 1 || node->ne[3] != 1 || !is_contiguous(&e.was)) return SE_ERR_ROWS;
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
    lay_contiguous(&e.now);
    *slot_of(s, node) = e;
    s->count = 1;
    if (!rehearse) set_shape(node, &e.now);
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

static bool work_out(const se_shrink * s, entry * e, const struct ggml_tensor * node, const se_shape_rule * rule) {
    const entry a = operand(s, node, 0), b = operand(s, node, 1), c = operand(s, node, 2);
    switch (rule->kind) {
        case SE_SHAPE_EACH: return each(e, node, &a, &b);
        case SE_SHAPE_ROWS: return !(a.shorter & 1) && follow(e, &a);
        case SE_SHAPE_SOFT_MAX: return !has_operand(node, 1) && follow(e, &a);
        case SE_SHAPE_ROPE: return rope(e, &a, &b);
        case SE_SHAPE_GLU:
            if (a.shorter & 1) return false;
            if (has_operand(node, 1)) return same_shape(&a, &b) && follow(e, &a);
            for (int d = 0; d < DIMS; d++) {
                if (e->was.ne[d] != a.was.ne[d] / (d == 0 ? 2 : 1)) return false;
                if (d > 0) e->now.ne[d] = a.now.ne[d];
            }
            e->shorter |= a.shorter;
            return true;
        case SE_SHAPE_PRODUCT: return product(e, &a, &b);
        case SE_SHAPE_ATTENTION: return attention(e, node, &a, &b, &c);
        case SE_SHAPE_GATHER: return gather(e, &a, &b);
        case SE_SHAPE_POOL: return pool(e, &a, rule);
        case SE_SHAPE_JOIN: return join(e, &a, &b, rule->axes[0]);
        case SE_SHAPE_IN_ORDER: return in_order(e, &a);
        case SE_SHAPE_VIEW: return view(e, node, &a);
        case SE_SHAPE_PERMUTED: return permuted(e, &a, rule->axes);
        case SE_SHAPE_UNKNOWN: break;
    }
    return false;
}

static void set_operands(const se_shrink * s, const struct ggml_tensor * node, bool now) {
    for (int i = 0; i < SE_MAX_OPERANDS; i++) {
        const struct ggml_tensor * t = se_operand(node, i);
        const entry * e = t != node ? find(s, t) : NULL;
        if (e) set_shape(e->tensor, now ? &e->now : &e->was);
    }
}

/* Gives a node its shape, unless this is a rehearsal or the node's backend cannot compute it then. */
static bool apply(const se_shrink * s, struct ggml_tensor * node, const entry * e) {
    if (s->rehearses) set_operands(s, node, true);
    set_shape(node, &e->now);
    const bool supported = se_supports(node);
    if (s->rehearses || !supported) set_shape(node, &e->was);
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

    entry e = { .tensor = node, .was = shape_of(node), .now = shape_of(node) };
    if (!work_out(s, &e, node, &rule) || !e.shorter) return SE_ERR_ROWS;
    const bool has_strides = rule.kind == SE_SHAPE_VIEW || rule.kind == SE_SHAPE_PERMUTED;
    if (!has_strides) {
        if (!is_contiguous(&e.was)) return SE_ERR_ROWS;
        lay_contiguous(&e.now);
    }
    if (rule.kind == SE_SHAPE_IN_ORDER && node->view_src) { /* a reshaped view of what must have no gaps */
        const entry a = operand(s, node, 0);
        if (!is_contiguous(&a.now)) return SE_ERR_ROWS;
    }
    for (int d = 0; d < DIMS; d++) {
        if (e.now.ne[d] < 1 || e.now.ne[d] > e.was.ne[d]) return SE_ERR_ROWS;
    }
    if (extent(&e.now) > extent(&e.was) || !apply(s, node, &e)) return SE_ERR_ROWS;
    *slot_of(s, node) = e;
    s->count++;
    return SE_OK;
}

int64_t se_shrink_length(const se_shrink * s, const struct ggml_tensor * node) {
    const entry * e = find(s, node);
    return e ? e->now.ne[1] : node->ne[1];
}

void se_shrink_restore(se_shrink * s, const struct ggml_tensor * node) {
    const entry * e = find(s, node);
    if (e) set_shape(e->tensor, &e->was);
}

void se_shrink_restore_all(se_shrink * s) {
    for (size_t i = 0; i < s->capacity; i++) {
        if (s->slots[i].tensor) set_shape(s->slots[i].tensor, &s->slots[i].was);
    }
}
