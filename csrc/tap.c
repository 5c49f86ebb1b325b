/* The tap: what happens inside ggml's evaluation callback.
 *
 * Life of a graph with the callback set (ggml_backend_sched_compute_splits): for each node in order the scheduler asks
 * (ask = true). Nodes answered false are gathered; one answered true closes the batch, the batch is computed and the callback
 * is called again (ask = false), when everything up to and with that node is done and synchronised. Returning false there ends
 * the current split; later splits still run, so they are ended at their first node.
 *
 * Rules that the code below follows:
 *  - Inputs are overwritten while asking about their first consumer: nothing that reads them has run.
 *  - The hidden state is injected after its node came back (skipped), not while asking: nodes that were gathered before it may
 *    still use the same memory.
 *  - Backends compute only nodes with GGML_TENSOR_FLAG_COMPUTE. llama.cpp reuses graphs of the same shape, so every flag that
 *    is cleared here is set again in se_tap_finish, while the graph still exists.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "graph.h"
#include "star_edge.h"

enum { MAX_INPUTS = 4, MAX_MASKS = 8 };

typedef struct {
    char name[GGML_MAX_NAME];
    void * data;
    size_t size;
} input_override;

struct se_tap {
    /* lasting settings */
    int32_t shift_from, shift;
    float * bias;
    int32_t n_bias;
    input_override inputs[MAX_INPUTS];
    char condition[GGML_MAX_NAME]; /* leaf that must be concatenated last for inputs to be replaced; "": no condition */
    char watch_name[GGML_MAX_NAME];
    void * watch_out;
    size_t watch_capacity, watch_size;

    /* one decode */
    bool armed;
    se_plan plan;
    se_result result;
    const struct ggml_tensor * first_node;
    bool past_window_start; /* the layer that the hidden state is injected at has gone by */
    bool rope_seen, hidden_taken, cells_taken;
    int32_t next_layer;     /* index into plan.attn_layers */
    struct ggml_tensor ** skipped;
    size_t skipped_capacity;
    se_depends * depends;

    /* one graph */
    const struct ggml_tensor * graph_start; /* first node since se_tap_begin: seen again, another graph (ubatch) runs */
    int32_t * positions;    /* shifted positions, (n_positions): the same numbers for every backend's copy */
    int64_t n_positions;    /* 0: not known yet */
    size_t positions_capacity;
    const struct ggml_tensor * biased[MAX_MASKS];
    int32_t n_biased;
    void * scratch;
    size_t scratch_size;
};

static double seconds(void) {
    struct timespec t;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC);
#endif
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static void fail(se_tap * tap, int error) {
    if (error && !tap->result.error) tap->result.error = error;
}

static void * scratch(se_tap * tap, size_t size) {
    if (size > tap->scratch_size) {
        void * bigger = realloc(tap->scratch, size);
        if (!bigger) {
            fail(tap, SE_ERR_MEMORY);
            return NULL;
        }
        tap->scratch = bigger;
        tap->scratch_size = size;
    }
    return tap->scratch;
}

/* ---- inputs ---- */

/* Notes at which end of a CONCAT the leaf of the condition stands. The scheduler asks in the graph's order, so that is known before
 * anything that is computed from the joined rows. */
static void look_for_condition(se_tap * tap, const struct ggml_tensor * node) {
    if (node->op != GGML_OP_CONCAT || !node->src[0] || !node->src[1]) return;
    if (se_is_input(node->src[0], tap->condition)) tap->result.concat = SE_CONCAT_FIRST;
    if (se_is_input(node->src[1], tap->condition)) tap->result.concat = SE_CONCAT_LAST;
}

static void override_inputs(se_tap * tap, const struct ggml_tensor * node) {
    const bool replace = !tap->condition[0] || tap->result.concat == SE_CONCAT_LAST;
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        struct ggml_tensor * src = node->src[s];
        if (!src || src->op != GGML_OP_NONE) continue;
        for (int i = 0; replace && i < MAX_INPUTS; i++) {
            const input_override * in = &tap->inputs[i];
            if (!in->data || !se_is_input(src, in->name)) continue;
            /* Once for each consumer: writing the same bytes again is harmless, and no state has to say when a graph ends. */
            fail(tap, in->size == se_ggml.nbytes(src) ? se_write(src, in->data, 0, in->size) : SE_ERR_SHAPE);
        }
        if (tap->watch_out && se_is_input(src, tap->watch_name)) {
            const size_t size = se_ggml.nbytes(src);
            if (size > tap->watch_capacity) {
                fail(tap, SE_ERR_CAPACITY);
            } else {
                fail(tap, se_read(src, tap->watch_out, 0, size));
                tap->watch_size = size;
            }
        }
    }
}

/* src[1] of a ROPE is (n_tokens) or, for M-RoPE, (4 n_tokens) int32: t, y, x, and one unused section. */
static void override_positions(se_tap * tap, const struct ggml_tensor * node) {
    struct ggml_tensor * positions = node->src[1];
    if (!positions || positions->type != GGML_TYPE_I32 || !se_is_input(positions, "inp_pos")) return; /* not the K-shift graph */
    tap->rope_seen = true;
    if (tap->armed && tap->plan.positions) {
        const int64_t n = (int64_t) tap->plan.n_rows * tap->plan.n_pos_per_row;
        if (positions->ne[0] != n) fail(tap, SE_ERR_SHAPE);
        else fail(tap, se_write(positions, tap->plan.positions, 0, (size_t) n * sizeof(int32_t)));
    } else if (tap->shift) {
        /* A backend's copy is made when its split begins, so it may carry the shift already: the shifted numbers are worked out
         * once for each graph and written to every tensor. */
        const int64_t n = positions->ne[0], n_rows = node->src[0]->ne[2];
        const size_t size = (size_t) n * sizeof(int32_t);
        if (!tap->n_positions) {
            if (size > tap->positions_capacity) {
                int32_t * bigger = realloc(tap->positions, size);
                if (!bigger) {
                    fail(tap, SE_ERR_MEMORY);
                    return;
                }
                tap->positions = bigger;
                tap->positions_capacity = size;
            }
            const int error = se_read(positions, tap->positions, 0, size);
            fail(tap, error);
            if (error) return;
            const int64_t n_shift = n == 4 * n_rows ? 3 * n_rows : n;
            for (int64_t i = 0; i < n_shift; i++) {
                if (tap->positions[i] >= tap->shift_from) tap->positions[i] += tap->shift;
            }
            tap->n_positions = n;
        }
        fail(tap, n == tap->n_positions ? se_write(positions, tap->positions, 0, size) : SE_ERR_SHAPE);
    }
}

static uint16_t float_to_half(float x) {
    uint16_t out;
    se_ggml.type_traits(GGML_TYPE_F16)->from_float_ref(&x, &out, 1);
    return out;
}

/* Puts the bias of each cell into its column of the mask: attn_inp_kq_mask is (n_kv, n_tokens), f32 or f16, 0 or -inf. Where
 * the bias already stands nothing changes: a backend's copy of the mask may have been made before or after the original's turn. */
static void bias_mask(se_tap * tap, const struct ggml_tensor * node) {
    /* the mask's consumers: attention itself, or a cast of it */
    if (node->op != GGML_OP_FLASH_ATTN_EXT && node->op != GGML_OP_SOFT_MAX && node->op != GGML_OP_CPY) return;
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        struct ggml_tensor * mask = node->src[s];
        if (!mask || mask->op != GGML_OP_NONE || !se_is_input(mask, "attn_inp_kq_mask")) continue;
        bool done = false;
        for (int i = 0; i < tap->n_biased; i++) done = done || tap->biased[i] == mask;
        if (done) continue;
        if (tap->n_biased < MAX_MASKS) tap->biased[tap->n_biased++] = mask;
        if (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) {
            fail(tap, SE_ERR_SHAPE);
            continue;
        }
        const size_t size = se_ggml.nbytes(mask);
        void * values = scratch(tap, size);
        if (!values) return;
        fail(tap, se_read(mask, values, 0, size));
        const int64_t n_kv = mask->ne[0], n_rows = mask->ne[1] * mask->ne[2] * mask->ne[3];
        const int64_t n = n_kv < tap->n_bias ? n_kv : tap->n_bias;
        for (int64_t r = 0; r < n_rows; r++) {
            for (int64_t c = 0; c < n; c++) {
                if (tap->bias[c] == 0.0f) continue;
                if (mask->type == GGML_TYPE_F32) {
                    float * x = (float *) values + r * n_kv + c;
                    if (*x == 0.0f) *x = tap->bias[c];
                } else {
                    uint16_t * h = (uint16_t *) values + r * n_kv + c;
                    if ((*h & 0x7FFF) == 0) *h = float_to_half(tap->bias[c]);
                }
            }
        }
        fail(tap, se_write(mask, values, 0, size));
    }
}

/* ---- the layer window ---- */

static void skip(se_tap * tap, struct ggml_tensor * node) {
    if (!(node->flags & GGML_TENSOR_FLAG_COMPUTE)) return; /* the unused branch of ggml_build_forward_select */
    const size_t n = (size_t) tap->result.n_skipped;
    if (n == tap->skipped_capacity) {
        const size_t capacity = n ? 2 * n : 512;
        struct ggml_tensor ** bigger = realloc(tap->skipped, capacity * sizeof *bigger);
        if (!bigger) {
            fail(tap, SE_ERR_MEMORY); /* the node runs: slower, not wrong */
            return;
        }
        tap->skipped = bigger;
        tap->skipped_capacity = capacity;
    }
    node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    tap->skipped[n] = node;
    tap->result.n_skipped++;
}

/* The cells of the batch are the row indices of the SET_ROWS that writes K: (n_tokens) int64. That of a transposed V
 * has an index for every element instead. */
static void take_cells(se_tap * tap, const struct ggml_tensor * node) {
    const struct ggml_tensor * idxs = node->src[1];
    if (!idxs || idxs->type != GGML_TYPE_I64 || idxs->ne[0] != tap->plan.n_rows || idxs->ne[1] != 1) return;
    fail(tap, se_read(idxs, tap->plan.cells, 0, (size_t) tap->plan.n_rows * sizeof(int64_t)));
    tap->cells_taken = true;
}

static size_t hidden_bytes(const se_tap * tap) { return (size_t) tap->plan.n_rows * (size_t) tap->plan.n_embd * sizeof(float); }

static bool hidden_fits(const se_tap * tap, const struct ggml_tensor * node) {
    return node->type == GGML_TYPE_F32 && node->ne[0] == tap->plan.n_embd && node->ne[1] == tap->plan.n_rows && se_ggml.nbytes(node) == hidden_bytes(tap);
}

static bool wants_attention(const se_tap * tap, int32_t index) {
    return tap->next_layer < tap->plan.n_attn_layers && tap->plan.attn_layers[tap->next_layer] == index;
}

static void take_attention(se_tap * tap, const struct ggml_tensor * node) {
    const se_plan * p = &tap->plan;
    const double start = seconds();
    se_attention_read read = {
        .row_first = p->row_first, .row_count = p->row_count, .row_step = p->row_step, .reduce = p->reduce, .n_threads = p->n_threads,
        .out = p->attn + (int64_t) tap->next_layer * p->attn_block, .out_size = p->attn_block,
    };
    fail(tap, se_read_attention(node, &read));
    if (p->attn_n_kv) p->attn_n_kv[tap->next_layer] = read.n_kv;
    tap->next_layer++;
    tap->result.attn_rows = read.n_rows;
    tap->result.attn_heads = read.n_head;
    tap->result.score_seconds += seconds() - start;
}

static bool ask(se_tap * tap, struct ggml_tensor * node) {
    if (!tap->armed) return false;
    const se_plan * p = &tap->plan;
    if (tap->result.stopped) return true; /* a later split: end it at its first node */

    if (!tap->first_node) tap->first_node = node;
    if (node == tap->first_node && ++tap->result.n_graphs > 1) {
        tap->result.n_attention = 0;
        tap->next_layer = 0;
        if (p->n_layer) fail(tap, SE_ERR_SEVERAL_GRAPHS);
    }

    const int layer_out = se_layer_out_index(node);
    const bool has_window = p->n_layer > 0;
    if (has_window && p->first > 0 && !tap->past_window_start) {
        if (layer_out == p->first - 1) { /* not remembered: it is what the layers of the window may read */
            tap->past_window_start = true;
            skip(tap, node);
            return true;
        }
        const int found = se_depends_visit(tap->depends, node);
        if (found < 0) fail(tap, SE_ERR_MEMORY);
        if (found > 0) skip(tap, node);
    } else if (has_window && p->first > 0 && (node->flags & GGML_TENSOR_FLAG_COMPUTE) && se_depends_has(tap->depends, node)) {
        fail(tap, SE_ERR_LATE_INPUT);
    }
    if (has_window && p->hidden && layer_out == p->last - 1) return true;
    if (p->cells && !tap->cells_taken && node->op == GGML_OP_SET_ROWS) take_cells(tap, node);

    if (se_is_attention(node)) {
        const int32_t index = tap->result.n_attention++;
        tap->result.flash = node->op == GGML_OP_FLASH_ATTN_EXT;
        const struct ggml_tensor * mask = node->op == GGML_OP_FLASH_ATTN_EXT ? node->src[3] : node->src[1];
        if (!mask) tap->result.last_unmasked = index;
        if (has_window && p->last < p->n_layer && index == p->last) {
            /* Its operands are there and its result is not needed. SOFT_MAX is: the scores are its result. */
            if (node->op == GGML_OP_FLASH_ATTN_EXT) skip(tap, node);
            return true;
        }
        return wants_attention(tap, index);
    }
    return false;
}

/* The node is done. Returns false to end the graph. */
static bool done(se_tap * tap, struct ggml_tensor * node) {
    if (!tap->armed) return true;
    const se_plan * p = &tap->plan;
    if (tap->result.stopped) return false;

    const int layer_out = se_layer_out_index(node);
    if (p->n_layer && p->first > 0 && layer_out == p->first - 1) {
        fail(tap, hidden_fits(tap, node) ? se_write(node, p->inject, 0, hidden_bytes(tap)) : SE_ERR_SHAPE);
    }
    if (p->n_layer && p->hidden && layer_out == p->last - 1) {
        fail(tap, hidden_fits(tap, node) ? se_read(node, p->hidden, 0, hidden_bytes(tap)) : SE_ERR_SHAPE);
        tap->hidden_taken = true;
    }
    if (se_is_attention(node)) {
        const int32_t index = tap->result.n_attention - 1;
        if (wants_attention(tap, index)) take_attention(tap, node);
        if (p->n_layer && p->last < p->n_layer && index == p->last) {
            tap->result.stopped = 1;
            return false;
        }
    }
    return true;
}

/* Position shift and cell bias are due again. */
static void begin_graph(se_tap * tap) {
    tap->n_positions = 0;
    tap->n_biased = 0;
    tap->result.concat = SE_CONCAT_NONE;
}

bool se_tap_callback(struct ggml_tensor * node, bool asking, void * user_data) {
    se_tap * tap = user_data;
    if (!asking) return done(tap, node);
    /* Idle: not even the node is looked at, whose memory the weights have long pushed out of the cache. */
    if (!tap->armed && !tap->shift && !tap->bias && !tap->watch_out && !tap->inputs[0].data) return false;
    if (!tap->graph_start) tap->graph_start = node;
    else if (tap->graph_start == node || strcmp(node->name, "result_norm") == 0) begin_graph(tap); /* a reused graph; the end of one */
    if (node->op == GGML_OP_ROPE) override_positions(tap, node);
    if (tap->bias) bias_mask(tap, node);
    if (tap->condition[0]) look_for_condition(tap, node);
    if (tap->watch_out || tap->inputs[0].data) override_inputs(tap, node);
    return ask(tap, node);
}

uintptr_t se_tap_callback_address(void) { return (uintptr_t) &se_tap_callback; }

/* ---- life cycle ---- */

se_tap * se_tap_new(void) {
    se_tap * tap = calloc(1, sizeof *tap);
    if (tap && !(tap->depends = se_depends_new())) {
        free(tap);
        return NULL;
    }
    return tap;
}

void se_tap_free(se_tap * tap) {
    if (!tap) return;
    for (int i = 0; i < MAX_INPUTS; i++) free(tap->inputs[i].data);
    se_depends_free(tap->depends);
    free(tap->skipped);
    free(tap->scratch);
    free(tap->positions);
    free(tap->bias);
    free(tap);
}

static int check(const se_plan * p) {
    if (p->n_layer < 0 || p->n_rows < 0 || p->n_attn_layers < 0) return SE_ERR_ARGUMENT;
    if (p->n_layer > 0) {
        if (p->n_rows < 1 || p->first < 0 || p->first > p->last || p->last > p->n_layer) return SE_ERR_ARGUMENT;
        if (p->first == p->last && (p->first == 0 || p->last == p->n_layer || p->hidden)) return SE_ERR_ARGUMENT;
        if ((p->first > 0 || p->hidden) && p->n_embd < 1) return SE_ERR_ARGUMENT;
        if (p->first > 0 && !p->inject) return SE_ERR_ARGUMENT;
        if (p->hidden && p->last == p->n_layer) return SE_ERR_ARGUMENT; /* only rows with logits reach the last layer's end */
    }
    if ((p->positions || p->cells) && p->n_rows < 1) return SE_ERR_ARGUMENT;
    if (p->positions && p->n_pos_per_row != 1 && p->n_pos_per_row != 4) return SE_ERR_ARGUMENT;
    if (p->n_attn_layers > 0) {
        if (!p->attn_layers || !p->attn || p->attn_block < 1 || p->row_step < 1 || p->row_first < 0) return SE_ERR_ARGUMENT;
        if (p->reduce < 0 || p->reduce > SE_MEAN_ALL) return SE_ERR_ARGUMENT;
        if (p->n_layer > 0 && (p->attn_layers[0] < p->first || p->attn_layers[p->n_attn_layers - 1] > p->last)) return SE_ERR_ARGUMENT; /* not computed */
        for (int32_t i = 1; i < p->n_attn_layers; i++) {
            if (p->attn_layers[i] <= p->attn_layers[i - 1]) return SE_ERR_ARGUMENT;
        }
    }
    return SE_OK;
}

int se_tap_arm(se_tap * tap, const se_plan * plan) {
    if (!tap || !plan || tap->armed) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    const int error = check(plan);
    if (error) return error;
    tap->plan = *plan;
    tap->result = (se_result) { .last_unmasked = -1 };
    tap->first_node = NULL;
    tap->past_window_start = tap->rope_seen = tap->hidden_taken = tap->cells_taken = false;
    tap->next_layer = 0;
    tap->watch_size = 0;
    se_depends_clear(tap->depends);
    se_tap_begin(tap);
    tap->armed = true;
    return SE_OK;
}

int se_tap_finish(se_tap * tap, se_result * result) {
    if (!tap || !tap->armed) return SE_ERR_ARGUMENT;
    const se_plan * p = &tap->plan;
    for (int32_t i = 0; i < tap->result.n_skipped; i++) tap->skipped[i]->flags |= GGML_TENSOR_FLAG_COMPUTE;
    tap->armed = false;
    if (tap->first_node) { /* a decode that failed before its graph ran has nothing to answer for */
        if (p->n_layer && p->first > 0 && !tap->past_window_start) fail(tap, SE_ERR_NO_LAYER_OUT);
        if (p->n_layer && p->hidden && !tap->hidden_taken) fail(tap, SE_ERR_NO_LAYER_OUT);
        if (p->n_layer && p->last < p->n_layer && !tap->result.stopped) fail(tap, SE_ERR_NO_ATTENTION);
        if (tap->next_layer < p->n_attn_layers) fail(tap, SE_ERR_NO_ATTENTION);
        if (p->positions && !tap->rope_seen) fail(tap, SE_ERR_NO_ROPE);
        if (p->cells && !tap->cells_taken) fail(tap, SE_ERR_SHAPE);
    }
    if (result) *result = tap->result;
    return se_tap_take_error(tap);
}

int se_tap_set_position_shift(se_tap * tap, int32_t from, int32_t offset) {
    if (!tap) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    tap->shift_from = from;
    tap->shift = offset;
    return SE_OK;
}

int se_tap_set_cell_bias(se_tap * tap, const float * bias, int32_t n_cells) {
    if (!tap || (bias && n_cells < 1)) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    float * copy = NULL;
    if (bias) {
        copy = malloc((size_t) n_cells * sizeof *copy);
        if (!copy) return SE_ERR_MEMORY;
        memcpy(copy, bias, (size_t) n_cells * sizeof *copy);
    }
    free(tap->bias);
    tap->bias = copy;
    tap->n_bias = bias ? n_cells : 0;
    return SE_OK;
}

int se_tap_set_input(se_tap * tap, const char * name, const void * data, size_t n_bytes) {
    if (!tap || !name || !*name || strlen(name) >= GGML_MAX_NAME || (data && !n_bytes)) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    int slot = 0;
    while (slot < MAX_INPUTS && tap->inputs[slot].data && strcmp(tap->inputs[slot].name, name) != 0) slot++;
    if (!data) {
        if (slot == MAX_INPUTS || !tap->inputs[slot].data) return SE_OK;
        free(tap->inputs[slot].data);
        /* keep the used slots first */
        int last = MAX_INPUTS - 1;
        while (!tap->inputs[last].data && last > slot) last--;
        tap->inputs[slot] = tap->inputs[last];
        tap->inputs[last] = (input_override) { 0 };
        return SE_OK;
    }
    if (slot == MAX_INPUTS) return SE_ERR_CAPACITY;
    void * copy = malloc(n_bytes);
    if (!copy) return SE_ERR_MEMORY;
    memcpy(copy, data, n_bytes);
    free(tap->inputs[slot].data);
    strcpy(tap->inputs[slot].name, name);
    tap->inputs[slot].data = copy;
    tap->inputs[slot].size = n_bytes;
    return SE_OK;
}

int se_tap_set_input_condition(se_tap * tap, const char * leaf) {
    if (!tap || (leaf && strlen(leaf) >= GGML_MAX_NAME)) return SE_ERR_ARGUMENT;
    strcpy(tap->condition, leaf ? leaf : "");
    return SE_OK;
}

int se_tap_watch_input(se_tap * tap, const char * name, void * out, size_t capacity) {
    if (!tap || (out && (!name || !*name || strlen(name) >= GGML_MAX_NAME))) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    if (out) strcpy(tap->watch_name, name);
    tap->watch_out = out;
    tap->watch_capacity = capacity;
    tap->watch_size = 0;
    return SE_OK;
}

int se_tap_take_error(se_tap * tap) {
    if (!tap || tap->armed) return SE_ERR_ARGUMENT;
    const int error = tap->result.error;
    tap->result.error = SE_OK;
    return error;
}

size_t se_tap_watched_bytes(const se_tap * tap) { return tap ? tap->watch_size : 0; }

void se_tap_begin(se_tap * tap) {
    if (!tap) return;
    tap->graph_start = NULL;
    begin_graph(tap);
}
