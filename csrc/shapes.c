#include "shapes.h"

#include <string.h>

se_shape se_shape_of(const struct ggml_tensor * t) {
    se_shape s;
    memcpy(s.ne, t->ne, sizeof s.ne);
    memcpy(s.nb, t->nb, sizeof s.nb);
    return s;
}

void se_shape_set(struct ggml_tensor * t, const se_shape * s) {
    memcpy(t->ne, s->ne, sizeof s->ne);
    memcpy(t->nb, s->nb, sizeof s->nb);
}

static bool has_operand(const struct ggml_tensor * node, int i) { return se_operand(node, i) != NULL; }

bool se_shape_is_contiguous(const se_shape * s) {
    for (int d = 1; d < SE_DIMS; d++) {
        if (s->ne[d] > 1 && s->nb[d] != s->nb[d - 1] * (size_t) s->ne[d - 1]) return false;
    }
    return true;
}

void se_shape_lay_contiguous(se_shape * s) {
    for (int d = 1; d < SE_DIMS; d++) s->nb[d] = s->nb[d - 1] * (size_t) s->ne[d - 1];
}

static int64_t n_elements(const se_shape * s) {
    int64_t n = 1;
    for (int d = 0; d < SE_DIMS; d++) n *= s->ne[d];
    return n;
}

/* Bytes from the first element of a tensor to the end of its last one. */
size_t se_shape_extent(const se_shape * s) {
    size_t last = 0;
    for (int d = 0; d < SE_DIMS; d++) last += (size_t) (s->ne[d] - 1) * s->nb[d];
    return last + s->nb[0];
}

/* The dimensions of operand `a`, which the node has too. */
static bool follow(se_shapes * e, const se_shapes * a) {
    for (int d = 0; d < SE_DIMS; d++) {
        if (e->was.ne[d] != a->was.ne[d]) return false;
        e->now.ne[d] = a->now.ne[d];
    }
    e->shorter |= a->shorter;
    return true;
}

/* Whether `b` can be repeated over `a`, and means the same rows where it is as long. */
static bool repeats(const se_shapes * a, const se_shapes * b) {
    for (int d = 0; d < SE_DIMS; d++) {
        const unsigned bit = 1u << d;
        if (b->now.ne[d] < 1 || a->now.ne[d] % b->now.ne[d] != 0) return false;
        if (b->shorter & bit && !(a->shorter & bit)) return false;
        if (a->shorter & bit && b->was.ne[d] != 1 && (!(b->shorter & bit) || b->now.ne[d] != a->now.ne[d])) return false;
    }
    return true;
}

static bool same_shape(const se_shapes * a, const se_shapes * b) {
    if (a->shorter != b->shorter) return false;
    for (int d = 0; d < SE_DIMS; d++) {
        if (a->now.ne[d] != b->now.ne[d] || a->was.ne[d] != b->was.ne[d]) return false;
    }
    return true;
}

static bool each(se_shapes * e, const struct ggml_tensor * node, const se_shapes * a, const se_shapes * b) {
    return follow(e, a) && (!has_operand(node, 1) || repeats(a, b));
}

static bool product(se_shapes * e, const se_shapes * a, const se_shapes * b) {
    if (a->now.ne[0] != b->now.ne[0] || (a->shorter & 1) != (b->shorter & 1)) return false;
    const int64_t was[SE_DIMS] = { a->was.ne[1], b->was.ne[1], b->was.ne[2], b->was.ne[3] };
    const int64_t now[SE_DIMS] = { a->now.ne[1], b->now.ne[1], b->now.ne[2], b->now.ne[3] };
    for (int d = 0; d < SE_DIMS; d++) {
        if (was[d] != e->was.ne[d]) return false;
        e->now.ne[d] = now[d];
        if (d > 1 && (a->shorter >> d & 1 || (b->shorter >> d & 1 && a->was.ne[d] != 1))) return false;
    }
    e->shorter |= (a->shorter >> 1 & 1) | (b->shorter & ~1u);
    return true;
}

static bool attention(se_shapes * e, const struct ggml_tensor * node, const se_shapes * q, const se_shapes * k, const se_shapes * v) {
    if (has_operand(node, 3)) return false; /* a mask has a place for each row */
    if (q->shorter != 2 || k->shorter != 2 || v->shorter != 2 || k->now.ne[1] != v->now.ne[1]) return false;
    const int64_t was[SE_DIMS] = { v->was.ne[0], q->was.ne[2], q->was.ne[1], q->was.ne[3] };
    for (int d = 0; d < SE_DIMS; d++) {
        if (was[d] != e->was.ne[d]) return false;
    }
    e->now.ne[2] = q->now.ne[1];
    e->shorter |= 4;
    return true;
}

static bool pool(se_shapes * e, const se_shapes * a, const se_shape_rule * rule) {
    for (int d = 0; d < SE_DIMS; d++) {
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

static bool join(se_shapes * e, const se_shapes * a, const se_shapes * b, int axis) {
    if (axis < 0 || axis >= SE_DIMS) return false;
    const unsigned along = 1u << axis;
    if ((a->shorter | b->shorter) & along || a->shorter != b->shorter) return false;
    for (int d = 0; d < SE_DIMS; d++) {
        const int64_t was = a->was.ne[d] + (d == axis ? b->was.ne[d] : 0);
        if (was != e->was.ne[d] || (d != axis && a->now.ne[d] != b->now.ne[d])) return false;
        if (d != axis) e->now.ne[d] = a->now.ne[d];
    }
    e->shorter |= a->shorter;
    return true;
}

/* Elements stay in their order. A dimension of rows in `a` ends where one of the node does: rows that stay are the first elements of both. */
static bool in_order(se_shapes * e, const se_shapes * a) {
    if (n_elements(&e->was) != n_elements(&a->was)) return false;
    bool same = true;
    for (int d = 0; d < SE_DIMS; d++) same = same && e->was.ne[d] == a->was.ne[d];
    if (same) return follow(e, a);
    int64_t end = 1;
    for (int h = 0; h < SE_DIMS; h++) {
        end *= a->was.ne[h];
        if (!(a->shorter >> h & 1)) continue;
        int d = 0;
        int64_t reached = e->was.ne[0];
        while (reached != end && ++d < SE_DIMS) reached *= e->was.ne[d];
        if (d == SE_DIMS) return false;
        const int64_t length = e->was.ne[d] * a->now.ne[h];
        if (length % a->was.ne[h] != 0) return false;
        e->now.ne[d] = length / a->was.ne[h];
        e->shorter |= 1u << d;
    }
    return true;
}

/* Whether a view is of all elements of `a`, one after the other. */
static bool is_whole(const se_shapes * e, const se_shapes * a, size_t offset) {
    return offset == 0 && e->was.nb[0] == a->was.nb[0] && n_elements(&e->was) == n_elements(&a->was) && se_shape_is_contiguous(&e->was) &&
           se_shape_is_contiguous(&a->was) && se_shape_is_contiguous(&a->now);
}

/* Bytes from the start of a row to the end of its last element. A row is what lies below `stride`. */
static size_t row_extent(const se_shape * s, size_t stride) {
    size_t n = s->nb[0];
    for (int d = 0; d < SE_DIMS; d++) {
        if (s->ne[d] > 1 && s->nb[d] < stride) n += (size_t) (s->ne[d] - 1) * s->nb[d];
    }
    return n;
}

/* Whether a window lies in a part of each row of `a`, such as the queries among queries, keys and values. */
static bool is_within_rows(const se_shapes * e, const se_shapes * a, int rows, size_t offset) {
    for (int d = rows + 1; d < SE_DIMS; d++) {
        if (a->was.ne[d] != 1) return false;
    }
    const size_t stride = a->was.nb[rows], part = row_extent(&a->was, stride);
    return part <= stride && offset % stride + row_extent(&e->was, stride) <= part;
}

/* A window into `a`: which dimension it takes from where is seen by the strides. */
static bool view(se_shapes * e, const struct ggml_tensor * node, const se_shapes * a) {
    const struct ggml_tensor * source = se_operand(node, 0);
    const struct ggml_tensor * root = source->view_src ? source->view_src : source;
    const size_t before = source->view_src ? source->view_offs : 0;
    if (node->view_src != root || node->view_offs < before) return false;
    size_t offset = node->view_offs - before;
    if (is_whole(e, a, offset)) { /* the same elements in other dimensions: a reshape */
        if (!in_order(e, a)) return false;
        se_shape_lay_contiguous(&e->now);
        return true;
    }
    int rows = -1; /* the dimension of rows in `a`: one, and strides above it are others now */
    for (int d = 0; d < SE_DIMS; d++) {
        if (!(a->shorter >> d & 1)) continue;
        if (rows >= 0) return false;
        rows = d;
    }
    if (rows < 0 || !(se_shape_is_contiguous(&a->was) || is_within_rows(e, a, rows, offset))) return false;
    const size_t stride = a->was.nb[rows];
    const int64_t left_out = (int64_t) (offset / stride); /* rows before the window */
    if (left_out >= a->was.ne[rows]) return false;
    bool found = false;
    for (int d = 0; d < SE_DIMS; d++) {
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
            while (h < SE_DIMS && (a->was.ne[h] == 1 || a->was.nb[h] != e->was.nb[d])) h++;
            if (h == SE_DIMS) return false;
            e->now.nb[d] = a->now.nb[h];
        }
    }
    return found;
}

static bool permuted(se_shapes * e, const se_shapes * a, const int32_t axes[SE_DIMS]) {
    unsigned seen = 0;
    for (int i = 0; i < SE_DIMS; i++) {
        const int32_t d = axes[i];
        if (d < 0 || d >= SE_DIMS || seen >> d & 1 || e->was.ne[d] != a->was.ne[i]) return false;
        seen |= 1u << d;
        e->now.ne[d] = a->now.ne[i];
        e->now.nb[d] = a->now.nb[i];
        if (a->shorter >> i & 1) e->shorter |= 1u << d;
    }
    return true;
}

static bool rope(se_shapes * e, const se_shapes * a, const se_shapes * positions) {
    if (a->shorter != 4 || positions->shorter != 1 || !follow(e, a)) return false;
    return positions->now.ne[0] == a->now.ne[2] || positions->now.ne[0] == 4 * a->now.ne[2];
}

static bool gather(se_shapes * e, const se_shapes * a, const se_shapes * indices) {
    if (indices->shorter != 1 || a->shorter & ~2u) return false; /* numbers of rows that are gone, otherwise */
    if (e->was.ne[0] != a->was.ne[0] || e->was.ne[1] != indices->was.ne[0] || e->was.ne[2] != 1 || e->was.ne[3] != 1) return false;
    e->now.ne[1] = indices->now.ne[0];
    e->shorter |= 2;
    return true;
}

bool se_shapes_of_node(se_shapes * e, const struct ggml_tensor * node, const se_shape_rule * rule, const se_shapes operands[3]) {
    const se_shapes a = operands[0], b = operands[1], c = operands[2];
    switch (rule->kind) {
        case SE_SHAPE_EACH: return each(e, node, &a, &b);
        case SE_SHAPE_ROWS: return !(a.shorter & 1) && follow(e, &a);
        case SE_SHAPE_SOFT_MAX: return !has_operand(node, 1) && follow(e, &a);
        case SE_SHAPE_ROPE: return rope(e, &a, &b);
        case SE_SHAPE_GLU:
            if (a.shorter & 1) return false;
            if (has_operand(node, 1)) return same_shape(&a, &b) && follow(e, &a);
            for (int d = 0; d < SE_DIMS; d++) {
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
