/* The half of the tap that overwrites inputs of a graph: RoPE positions, the attention mask, inputs by name, and memory that was never written.
 *
 * All of it happens while the scheduler asks about a consumer of the input, so nothing that reads it has run. The settings last until
 * they are changed, and hold in plain decodes as well as in windows.
 */
#include <stdlib.h>
#include <string.h>

#include "llama_graph.h"
#include "tap.h"

static void * scratch(se_tap * tap, size_t size) {
    if (size > tap->scratch_size) {
        void * bigger = realloc(tap->scratch, size);
        if (!bigger) {
            se_tap_fail(tap, SE_ERR_MEMORY);
            return NULL;
        }
        tap->scratch = bigger;
        tap->scratch_size = size;
    }
    return tap->scratch;
}

/* Notes at which end of a CONCAT the leaf stands. Nothing in this graph may be decided by it: a backend's graph_optimize (Vulkan, Metal, CUDA)
 * puts nodes that do not depend on each other into another order, so that what reads an input may come before the CONCAT, or after it. */
static void look_for_concat(se_tap * tap, const struct ggml_tensor * node) {
    for (int s = 0; s < 2; s++) {
        const struct ggml_tensor * part = se_joined_part(node, s);
        if (part && se_is_input(part, tap->joined)) tap->result.concat = s ? SE_CONCAT_LAST : SE_CONCAT_FIRST;
    }
}

static void override_inputs(se_tap * tap, const struct ggml_tensor * node) {
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        struct ggml_tensor * src = node->src[s];
        if (!src || !se_is_leaf(src) || se_shrink_has(tap->shrink, src)) continue; /* it has the rows that stay already */
        for (int i = 0; i < MAX_INPUTS; i++) {
            input_override * in = &tap->inputs[i];
            if (!in->data || !se_is_input(src, in->name)) continue;
            /* Once in an armed graph: the mask of windows has megabytes and a consumer in each layer. Otherwise once for each consumer:
             * writing the same bytes again is harmless, and nothing says for sure when a graph ends. */
            bool written = false;
            for (int k = 0; tap->armed && k < in->n_written; k++) written = written || in->written[k] == src;
            if (written) continue;
            if (in->n_written < MAX_COPIES) in->written[in->n_written++] = src;
            se_tap_fail(tap, in->size == se_ggml.nbytes(src) ? se_write(src, in->data, 0, in->size) : SE_ERR_SHAPE);
        }
        if (tap->watch_out && se_is_input(src, tap->watch_name)) {
            const size_t size = se_ggml.nbytes(src);
            if (size > tap->watch_capacity) {
                se_tap_fail(tap, SE_ERR_CAPACITY);
            } else {
                se_tap_fail(tap, se_read(src, tap->watch_out, 0, size));
                tap->watch_size = size;
            }
        }
    }
}

static void override_positions(se_tap * tap, const struct ggml_tensor * node) {
    int64_t n_used;
    struct ggml_tensor * positions = se_rope_positions(node, &n_used);
    if (!positions) return;
    tap->rope_seen = true;
    if (tap->armed && tap->plan.positions) {
        const int64_t n = (int64_t) tap->plan.n_rows * tap->plan.n_pos_per_row;
        if (positions->ne[0] != n) se_tap_fail(tap, SE_ERR_SHAPE);
        else se_tap_fail(tap, se_write(positions, tap->plan.positions, 0, (size_t) n * sizeof(int32_t)));
    } else if (tap->shift) {
        /* A backend's copy is made when its split begins, so it may carry the shift already: the shifted numbers are worked out
         * once for each graph and written to every tensor. */
        const int64_t n = positions->ne[0];
        const size_t size = (size_t) n * sizeof(int32_t);
        if (!tap->n_positions) {
            if (size > tap->positions_capacity) {
                int32_t * bigger = realloc(tap->positions, size);
                if (!bigger) {
                    se_tap_fail(tap, SE_ERR_MEMORY);
                    return;
                }
                tap->positions = bigger;
                tap->positions_capacity = size;
            }
            const int error = se_read(positions, tap->positions, 0, size);
            se_tap_fail(tap, error);
            if (error) return;
            for (int64_t i = 0; i < n_used; i++) {
                if (tap->positions[i] >= tap->shift_from) tap->positions[i] += tap->shift;
            }
            tap->n_positions = n;
        }
        se_tap_fail(tap, n == tap->n_positions ? se_write(positions, tap->positions, 0, size) : SE_ERR_SHAPE);
    }
}

static uint16_t float_to_half(float x) {
    uint16_t out;
    se_ggml.type_traits(GGML_TYPE_F16)->from_float_ref(&x, &out, 1);
    return out;
}

/* Puts the bias of each cell into its column of the mask (n_kv, n_tokens), where that is 0 and not -inf. Where
 * the bias already stands nothing changes: a backend's copy of the mask may have been made before or after the original's turn. */
static void bias_mask(se_tap * tap, const struct ggml_tensor * node) {
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        struct ggml_tensor * mask = se_mask_input(node, s);
        if (!mask) continue;
        bool done = false;
        for (int i = 0; i < tap->n_biased; i++) done = done || tap->biased[i] == mask;
        if (done) continue;
        if (tap->n_biased < MAX_MASKS) tap->biased[tap->n_biased++] = mask;
        if (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) {
            se_tap_fail(tap, SE_ERR_SHAPE);
            continue;
        }
        const size_t size = se_ggml.nbytes(mask);
        void * values = scratch(tap, size);
        if (!values) return;
        se_tap_fail(tap, se_read(mask, values, 0, size));
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
        se_tap_fail(tap, se_write(mask, values, 0, size));
    }
}

static void clear_unwritten(se_tap * tap, const struct ggml_tensor * node) {
    struct ggml_tensor * leaf = se_leaf_times_zero(node);
    if (!leaf) return;
    const size_t size = se_ggml.nbytes(leaf);
    void * zeros = scratch(tap, size);
    if (!zeros) return;
    memset(zeros, 0, size);
    se_tap_fail(tap, se_write(leaf, zeros, 0, size));
}

/* Position shift and cell bias are due again. */
static void begin_graph(se_tap * tap) {
    tap->n_positions = 0;
    tap->n_biased = 0;
    for (int i = 0; i < MAX_INPUTS; i++) tap->inputs[i].n_written = 0;
    tap->result.concat = SE_CONCAT_NONE;
}

void se_tap_inputs_begin(se_tap * tap) {
    tap->graph_start = NULL;
    begin_graph(tap);
}

void se_tap_inputs_visit(se_tap * tap, const struct ggml_tensor * node) {
    if (!tap->graph_start) tap->graph_start = node;
    else if (tap->graph_start == node || se_ends_layers(node)) begin_graph(tap); /* a reused graph; the end of one */
    override_positions(tap, node);
    clear_unwritten(tap, node);
    if (tap->bias) bias_mask(tap, node);
    if (tap->joined[0]) look_for_concat(tap, node);
    if (tap->watch_out || tap->inputs[0].data) override_inputs(tap, node);
}

/* ---- settings ---- */

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

int se_tap_find_concat(se_tap * tap, const char * leaf) {
    if (!tap || (leaf && strlen(leaf) >= GGML_MAX_NAME)) return SE_ERR_ARGUMENT;
    strcpy(tap->joined, leaf ? leaf : "");
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

size_t se_tap_watched_bytes(const se_tap * tap) { return tap ? tap->watch_size : 0; }
