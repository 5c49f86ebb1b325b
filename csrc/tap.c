/* The tap: what happens inside ggml's evaluation callback.
 *
 * Life of a graph with the callback set (ggml_backend_sched_compute_splits): for each node in order the scheduler asks
 * (ask = true). Nodes answered false are gathered; one answered true closes the batch, the batch is computed and the callback
 * is called again (ask = false), when everything up to and with that node is done and synchronised. Returning false there ends
 * the current split; later splits still run, so they are ended at their first node, which is skipped.
 *
 * Rules that the code below follows:
 *  - Inputs are overwritten while asking about their first consumer (tap_inputs.c): nothing that reads them has run.
 *  - A node comes after its sources, and that is all that is known of the order: backends with graph_optimize (Vulkan, Metal, CUDA) put
 *    nodes that do not depend on each other where they like. Nothing may be decided by which of two such nodes came first.
 *  - The hidden state is injected after its node came back (skipped), not while asking: nodes that were gathered before it may
 *    still use the same memory.
 *  - llama.cpp reuses graphs of the same shape, so every flag that is cleared here (se_set_computed) is set again in
 *    se_tap_finish, while the graph still exists.
 */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "llama_graph.h"
#include "platform.h"
#include "tap.h"

/* ---- the layer window ---- */

static void skip(se_tap * tap, struct ggml_tensor * node) {
    if (!se_is_computed(node)) return; /* an unused branch of the graph */
    const size_t n = (size_t) tap->result.n_skipped;
    if (n == tap->skipped_capacity) {
        const size_t capacity = n ? 2 * n : 512;
        struct ggml_tensor ** bigger = realloc(tap->skipped, capacity * sizeof *bigger);
        if (!bigger) {
            se_tap_fail(tap, SE_ERR_MEMORY); /* the node runs: slower, not wrong */
            return;
        }
        tap->skipped = bigger;
        tap->skipped_capacity = capacity;
    }
    se_set_computed(node, false);
    tap->skipped[n] = node;
    tap->result.n_skipped++;
}

static void take_cells(se_tap * tap, const struct ggml_tensor * node) {
    const struct ggml_tensor * cells = se_written_cells(node, tap->plan.n_rows);
    if (!cells) return;
    se_tap_fail(tap, se_read(cells, tap->plan.cells, 0, (size_t) tap->plan.n_rows * sizeof(int64_t)));
    tap->cells_due = false;
}

static size_t hidden_bytes(const se_tap * tap) {
    return (size_t) tap->plan.n_rows * (size_t) tap->plan.n_embd * sizeof(float);
}

static bool hidden_fits(const se_tap * tap, const struct ggml_tensor * node) {
    if (node->type != GGML_TYPE_F32 || se_ggml.nbytes(node) != hidden_bytes(tap)) return false;
    return node->ne[0] == tap->plan.n_embd && node->ne[1] == tap->plan.n_rows;
}

static bool wants_attention(const se_tap * tap, int32_t index) {
    return tap->next_layer < tap->plan.n_attn_layers && tap->plan.attn_layers[tap->next_layer] == index;
}

static void take_attention(se_tap * tap, const struct ggml_tensor * node) {
    const se_plan * p = &tap->plan;
    const double start = se_seconds();
    se_attention_read read = {
        .row_first = p->row_first, .row_count = p->row_count, .row_step = p->row_step,
        .reduce = p->reduce, .n_threads = p->n_threads,
        .out = p->attn + (int64_t) tap->next_layer * p->attn_block, .out_size = p->attn_block,
    };
    se_tap_fail(tap, se_read_attention(node, &read));
    if (p->attn_n_kv) p->attn_n_kv[tap->next_layer] = read.n_kv;
    tap->next_layer++;
    tap->result.attn_rows = read.n_rows;
    tap->result.attn_heads = read.n_head;
    tap->result.score_seconds += se_seconds() - start;
}

static int layer_out_of(const se_tap * tap, const struct ggml_tensor * node) {
    return tap->plan.encoder ? se_encoder_layer_out_index(node) : se_layer_out_index(node, tap->layer_out);
}

/* Which of the plan's further layers this one is, or -1. */
static int extra_of(const se_tap * tap, int layer) {
    for (int32_t i = 0; layer >= 0 && i < tap->plan.n_extra; i++) {
        if (tap->plan.extra_layers[i] == layer) return i;
    }
    return -1;
}

/* The plan's source node is asked about: all before it has run. Returns whether it ends the graph. */
static bool meet_source(se_tap * tap, const struct ggml_tensor * node) {
    const se_plan * p = &tap->plan;
    struct ggml_tensor * source = se_computed_source(node, p->source);
    tap->source_seen = true;
    if (!source || se_ggml.nbytes(source) != p->source_bytes) se_tap_fail(tap, SE_ERR_SHAPE);
    else if (p->source_in) se_tap_fail(tap, se_write(source, p->source_in, 0, p->source_bytes));
    else se_tap_fail(tap, se_read(source, p->source_out, 0, p->source_bytes));
    return p->source_out != NULL;
}

/* Whether V of the layer that `attention` reads is in the cache, where V has one. A SOFT_MAX does not need it: a backend that orders nodes by
 * itself may write it later, and the graph must not end before. */
static bool has_v(const se_tap * tap, const struct ggml_tensor * attention) {
    return tap->last_v < 0 || se_attended_layer(attention) <= tap->last_v;
}

static void note_attention(se_tap * tap, const struct ggml_tensor * node) {
    /* Hybrid decoders have attention in some layers only, so the operations are counted only where no layer output is named. */
    const int32_t layer = tap->last_out >= 0 ? tap->last_out + 1 : tap->result.n_attention;
    tap->attention = layer;
    tap->result.n_attention++;
    if (layer < SE_MAX_LAYERS) tap->result.attention_layers[layer / 64] |= (uint64_t) 1 << layer % 64;
    tap->result.flash = se_is_flash_attention(node);
    if (!se_attention_mask(node)) tap->result.last_unmasked = layer;
}

/* Rows leave the graph at this node, or it comes later and has fewer of them. false: that cannot be, and the graph ends before it. A
 * rehearsal goes on, with its first error. */
static bool follow_rows(se_tap * tap, struct ggml_tensor * node) {
    const se_plan * p = &tap->plan;
    const bool enters = se_enters_layer(node, p->keep_layer);
    int error = SE_OK;
    if (tap->result.keep_node) {
        error = se_shrink_visit(tap->shrink, node);
        if (!error && enters && se_shrink_active(tap->shrink) && !se_shrink_has(tap->shrink, node)) error = SE_ERR_SEVERAL_GRAPHS;
    } else if (enters) {
        tap->result.keep_node = tap->result.n_nodes;
        tap->result.n_rows = (int32_t) se_shrink_length(tap->shrink, node);
        if (p->count_only) error = se_shrink_begin(tap->shrink, node, p->keep, p->n_keep, true);
        else if (tap->result.n_nodes != p->keep_node) error = SE_ERR_ROWS; /* not the graph that was rehearsed */
    }
    tap->result.n_out = (int32_t) se_shrink_length(tap->shrink, node);
    if (!error) return true;
    se_tap_fail(tap, error);
    /* What was gathered before it runs as the graph was built: that is harmless, and nobody reads it. */
    se_shrink_restore_all(tap->shrink);
    se_shrink_clear(tap->shrink);
    tap->result.stopped = !p->count_only;
    return p->count_only;
}

static bool ask(se_tap * tap, struct ggml_tensor * node) {
    if (!tap->armed) return false;
    const se_plan * p = &tap->plan;
    if (tap->result.stopped) { /* a later split: end it at its first node, which may write the recurrent state of a layer */
        skip(tap, node);
        return true;
    }

    if (!tap->first_node) tap->first_node = node;
    if (node == tap->first_node && ++tap->result.n_graphs > 1) {
        tap->result.n_attention = 0;
        tap->next_layer = 0;
        tap->last_out = -1;
        if (p->n_layer) se_tap_fail(tap, SE_ERR_SEVERAL_GRAPHS);
    }

    tap->result.n_nodes++;
    if (p->keep && !follow_rows(tap, node)) {
        skip(tap, node);
        return true;
    }
    const bool ends_rows = p->keep && (tap->result.n_nodes == p->keep_node || tap->result.n_nodes == p->n_nodes);

    const int layer_out = layer_out_of(tap, node);
    if (layer_out >= 0 && !p->encoder) tap->last_out = layer_out;
    const bool has_window = p->n_layer > 0, is_attention = se_is_attention(node);
    if (is_attention) note_attention(tap, node);
    if (p->count_only) {
        skip(tap, node);
        return false;
    }
    const bool waits = p->source_node && !tap->source_seen; /* nodes that are gathered have not run: one by one */
    if (waits && se_has_name(node, p->source_node, strlen(p->source_node))) {
        if (meet_source(tap, node)) {
            tap->result.stopped = 1;
            skip(tap, node);
            return true;
        }
    } else if (waits && p->source_out) {
        const int found = se_depends_visit(tap->depends, node, 0, p->n_embd, p->n_rows);
        if (found < 0) se_tap_fail(tap, SE_ERR_MEMORY);
        if (found > 0) skip(tap, node);
        return true;
    }
    const int v_layer = se_v_written(node);
    if (v_layer > tap->last_v) tap->last_v = v_layer;
    if (has_window && p->first > 0 && !tap->past_window_start) {
        if (layer_out == p->first - 1) { /* not remembered: it is what the layers of the window may read */
            tap->past_window_start = true;
            skip(tap, node);
            return true;
        }
        if (p->extra_inject && extra_of(tap, layer_out) >= 0) {
            if (se_depends_give(tap->depends, node, layer_out) < 0) se_tap_fail(tap, SE_ERR_MEMORY);
            skip(tap, node);
            return true;
        }
        const int found = se_depends_visit(tap->depends, node, p->first, p->n_embd, p->n_rows);
        if (found < 0) se_tap_fail(tap, SE_ERR_MEMORY);
        if (found == SE_LAYERS) skip(tap, node); /* the prelude runs: layers of the window may read it (Gemma 4) */
    } else if (has_window && p->first > 0) {
        if (se_is_computed(node) && se_depends_on_layers(tap->depends, node)) se_tap_fail(tap, SE_ERR_LATE_INPUT);
        else if (!se_depends_pass(tap->depends, node)) se_tap_fail(tap, SE_ERR_MEMORY);
    }
    if (has_window && p->hidden && layer_out == p->last - 1) return true;
    if (ends_rows) return true;
    if (has_window && p->extra_hidden && extra_of(tap, layer_out) >= 0) return true;
    if (tap->cells_due) take_cells(tap, node);

    /* A layer may have both a recurrent state and attention, in any order (Falcon-H1): its rows come again from the next window. */
    if (has_window && !p->encoder && p->last < p->n_layer && se_state_written(node) >= p->last) skip(tap, node);

    /* A window of no layer is there for its keys and values. */
    if (has_window && p->first == p->last && !p->n_attn_layers && se_makes_query(node, p->last)) skip(tap, node);

    if (is_attention) {
        const int32_t index = tap->attention;
        if (has_window && !p->encoder && p->last < p->n_layer && index == p->last) {
            /* Its operands are there and its result is not needed. SOFT_MAX is: the scores are its result. */
            if (tap->result.flash) skip(tap, node);
            return true;
        }
        return wants_attention(tap, index) || waits;
    }
    if (waits) return true;
    return v_layer >= 0 && tap->at_last && has_v(tap, tap->at_last);
}

/* The node is done. Returns false to end the graph. */
static bool done(se_tap * tap, struct ggml_tensor * node) {
    if (!tap->armed) return true;
    const se_plan * p = &tap->plan;
    if (tap->result.stopped) return false;

    const int layer_out = layer_out_of(tap, node);
    const int extra = p->n_layer ? extra_of(tap, layer_out) : -1;
    if (extra >= 0) {
        const size_t at = (size_t) extra * (hidden_bytes(tap) / sizeof(float));
        const bool fits = hidden_fits(tap, node), gives = p->extra_inject && layer_out < p->first - 1;
        if ((gives || p->extra_hidden) && !fits) se_tap_fail(tap, SE_ERR_SHAPE);
        else if (gives) se_tap_fail(tap, se_write(node, p->extra_inject + at, 0, hidden_bytes(tap)));
        else if (p->extra_hidden) se_tap_fail(tap, se_read(node, p->extra_hidden + at, 0, hidden_bytes(tap)));
    }
    if (p->n_layer && p->first > 0 && layer_out == p->first - 1) {
        se_tap_fail(tap, hidden_fits(tap, node) ? se_write(node, p->inject, 0, hidden_bytes(tap)) : SE_ERR_SHAPE);
    }
    if (p->keep && tap->result.n_nodes == p->keep_node) {
        const int error = se_shrink_begin(tap->shrink, node, p->keep, p->n_keep, false);
        se_tap_fail(tap, error);
        if (error) {
            tap->result.stopped = 1;
            return false;
        }
    }
    if (p->keep && tap->result.n_nodes == p->n_nodes) se_shrink_restore(tap->shrink, node);
    if (p->n_layer && p->hidden && layer_out == p->last - 1) {
        se_tap_fail(tap, hidden_fits(tap, node) ? se_read(node, p->hidden, 0, hidden_bytes(tap)) : SE_ERR_SHAPE);
        tap->hidden_taken = true;
        if (p->encoder) {
            tap->result.stopped = 1;
            return false;
        }
    }
    if (se_is_attention(node)) {
        const int32_t index = tap->attention;
        if (wants_attention(tap, index)) take_attention(tap, node);
        if (p->n_layer && !p->encoder && p->last < p->n_layer && index == p->last) tap->at_last = node;
    }
    if (tap->at_last && has_v(tap, tap->at_last)) {
        tap->result.stopped = 1;
        return false;
    }
    return true;
}

static bool has_settings(const se_tap * tap) {
    return tap->shift || tap->bias || tap->n_levels || tap->watch_out || tap->inputs[0].data;
}

static bool visit(se_tap * tap, struct ggml_tensor * node, bool asking) {
    const bool ends_level = tap->n_levels && se_tap_ends_level(tap, node);
    if (!asking) {
        if (ends_level) se_tap_next_level(tap);
        return done(tap, node);
    }
    tap->traffic.n_asked++;
    se_tap_inputs_visit(tap, node);
    const bool stops = ask(tap, node) || ends_level;
    tap->traffic.n_stops += stops;
    return stops;
}

bool se_tap_callback(struct ggml_tensor * node, bool asking, void * user_data) {
    se_tap * tap = user_data;
    /* Idle: not even the node is looked at, whose memory the weights have long pushed out of the cache. */
    const bool idle = !tap->armed || (tap->plan.only_cells && !tap->cells_due);
    if (asking && idle && !has_settings(tap)) return false;
    se_count_into(&tap->traffic);
    const bool answer = visit(tap, node, asking);
    se_count_into(NULL);
    return answer;
}

uintptr_t se_tap_callback_address(void) { return (uintptr_t) &se_tap_callback; }

/* ---- life cycle ---- */

se_tap * se_tap_new(void) {
    se_tap * tap = calloc(1, sizeof *tap);
    if (tap && (!(tap->depends = se_depends_new()) || !(tap->shrink = se_shrink_new()))) {
        se_depends_free(tap->depends);
        free(tap);
        return NULL;
    }
    if (tap) se_tap_set_layer_out(tap, NULL);
    return tap;
}

void se_tap_free(se_tap * tap) {
    if (!tap) return;
    for (int i = 0; i < MAX_INPUTS; i++) free(tap->inputs[i].data);
    for (int i = 0; i < MAX_MASKS; i++) free(tap->level_masks[i].values);
    se_depends_free(tap->depends);
    se_shrink_free(tap->shrink);
    free(tap->skipped);
    free(tap->scratch);
    free(tap->positions);
    free(tap->bias);
    free(tap->level_layers);
    free(tap->level_bias);
    free(tap->witness);
    free(tap);
}

static int check(const se_plan * p) {
    if (p->n_layer < 0 || p->n_rows < 0 || p->n_attn_layers < 0) return SE_ERR_ARGUMENT;
    if (p->n_layer > 0) {
        if (p->n_rows < 1 || p->first < 0 || p->first > p->last || p->last > p->n_layer) return SE_ERR_ARGUMENT;
        if (p->first == p->last && (p->first == 0 || p->last == p->n_layer || p->hidden)) return SE_ERR_ARGUMENT;
        if ((p->first > 0 || p->hidden) && p->n_embd < 1) return SE_ERR_ARGUMENT;
        if (p->first > 0 && !p->inject) return SE_ERR_ARGUMENT;
        if (p->hidden && p->last == p->n_layer) return SE_ERR_ARGUMENT; /* its rows without logits end early */
        if (p->encoder && p->last < p->n_layer && !p->hidden) return SE_ERR_ARGUMENT;
    }
    if (p->n_extra < 0 || p->n_extra > SE_MAX_EXTRA || (p->n_extra > 0 && (p->n_layer < 1 || !p->extra_layers))) return SE_ERR_ARGUMENT;
    for (int32_t i = 0; i < p->n_extra; i++) {
        if (p->extra_layers[i] < 0 || (i && p->extra_layers[i] <= p->extra_layers[i - 1])) return SE_ERR_ARGUMENT;
        if (p->extra_inject && p->extra_layers[i] >= p->first - 1) return SE_ERR_ARGUMENT;
        if (p->extra_hidden && p->extra_layers[i] >= p->last - 1) return SE_ERR_ARGUMENT;
    }
    if (p->source_node) {
        if (!*p->source_node || p->source < 0 || p->source_bytes < 1 || !p->source_in == !p->source_out) return SE_ERR_ARGUMENT;
        if (p->source_out && p->n_layer > 0) return SE_ERR_ARGUMENT; /* the graph ends before its layers */
    }
    if (p->keep) {
        if (p->n_keep < 1 || p->keep_layer < 0) return SE_ERR_ARGUMENT;
        if (p->n_layer > 0 && (p->first != p->keep_layer || p->last != p->n_layer)) return SE_ERR_ARGUMENT;
        if (!p->count_only && (p->keep_node < 1 || p->n_nodes < p->keep_node)) return SE_ERR_ARGUMENT; /* not rehearsed */
    }
    if (p->n_known < 0 || (p->n_known > 0 && !p->known)) return SE_ERR_ARGUMENT;
    if (p->compare_input) {
        if (!*p->compare_input || !p->sample) return SE_ERR_ARGUMENT;
        if (p->n_layer || p->keep || p->source_node || p->count_only || p->only_cells) return SE_ERR_ARGUMENT; /* they need what would not be computed */
    }
    if ((p->positions || p->cells) && p->n_rows < 1) return SE_ERR_ARGUMENT;
    if (p->only_cells && (p->n_layer || p->n_attn_layers || p->positions || p->source_node || p->keep || p->count_only)) return SE_ERR_ARGUMENT;
    if (p->positions && p->n_pos_per_row != 1 && p->n_pos_per_row != 4) return SE_ERR_ARGUMENT;
    if (p->n_attn_layers > 0) {
        if (!p->attn_layers || !p->attn || p->attn_block < 1) return SE_ERR_ARGUMENT;
        if (p->row_step < 1 || p->row_first < 0) return SE_ERR_ARGUMENT;
        if (p->reduce < 0 || p->reduce > SE_MEAN_ALL) return SE_ERR_ARGUMENT;
        const bool computed = p->attn_layers[0] >= p->first && p->attn_layers[p->n_attn_layers - 1] <= p->last;
        if (p->n_layer > 0 && !computed) return SE_ERR_ARGUMENT;
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
    tap->past_window_start = tap->rope_seen = tap->hidden_taken = tap->source_seen = false;
    tap->cells_due = plan->cells != NULL;
    tap->next_layer = 0;
    tap->last_out = -1;
    tap->at_last = NULL;
    tap->last_v = -1;
    tap->watch_size = 0;
    se_depends_clear(tap->depends);
    se_shrink_clear(tap->shrink);
    se_tap_inputs_begin(tap);
    tap->armed = true;
    return SE_OK;
}

int se_tap_finish(se_tap * tap, se_result * result) {
    if (!tap || !tap->armed) return SE_ERR_ARGUMENT;
    const se_plan * p = &tap->plan;
    for (int32_t i = 0; i < tap->result.n_skipped; i++) se_set_computed(tap->skipped[i], true);
    tap->armed = false;
    se_shrink_clear(tap->shrink); /* the graph may be gone, and its memory another's */
    if (tap->first_node && p->keep && !tap->result.keep_node) se_tap_fail(tap, SE_ERR_NO_LAYER_OUT);
    if (tap->first_node && !p->count_only) { /* a decode that failed before its graph ran has nothing to answer for */
        if (p->n_layer && p->first > 0 && !tap->past_window_start) se_tap_fail(tap, SE_ERR_NO_LAYER_OUT);
        if (p->n_layer && p->hidden && !tap->hidden_taken) se_tap_fail(tap, SE_ERR_NO_LAYER_OUT);
        if (p->n_layer && p->last < p->n_layer && !tap->result.stopped) se_tap_fail(tap, SE_ERR_NO_ATTENTION);
        if (tap->next_layer < p->n_attn_layers) se_tap_fail(tap, SE_ERR_NO_ATTENTION);
        if (p->source_node && !tap->source_seen) se_tap_fail(tap, SE_ERR_NO_LAYER_OUT);
        if (p->positions && !tap->rope_seen) se_tap_fail(tap, SE_ERR_NO_ROPE);
        if (tap->cells_due) se_tap_fail(tap, SE_ERR_SHAPE);
    }
    if (result) *result = tap->result;
    return se_tap_take_error(tap);
}

void se_tap_begin(se_tap * tap) {
    if (tap) se_tap_inputs_begin(tap);
}

void se_tap_take_traffic(se_tap * tap, se_traffic * traffic) {
    if (tap && traffic) *traffic = tap->traffic;
    if (tap) tap->traffic = (se_traffic) { 0 };
}

int se_tap_take_error(se_tap * tap) {
    if (!tap || tap->armed) return SE_ERR_ARGUMENT;
    const int error = tap->result.error;
    tap->result.error = SE_OK;
    return error;
}
