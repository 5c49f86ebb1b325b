/* The half of the tap that overwrites inputs of a graph: RoPE positions, the attention mask, inputs by name, and memory that was never written.
 *
 * All of it happens while the scheduler asks about a consumer of the input, so nothing that reads it has run. The settings last until
 * they are changed, and hold in plain decodes as well as in windows.
 */
#include <math.h>
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

/* Takes the plan's sample of an input, and ends the graph if it is a known one. On a GPU each piece is a read that is waited for. */
static void compare_input(se_tap * tap, const struct ggml_tensor * input) {
    se_plan * p = &tap->plan;
    const size_t size = se_ggml.nbytes(input), n_floats = size / sizeof(float);
    const uint64_t header = size;
    uint8_t * piece = p->sample + sizeof header;
    memset(p->sample, 0, SE_SAMPLE_BYTES);
    memcpy(p->sample, &header, sizeof header);
    int error = SE_OK;
    if (size <= (size_t) SE_SAMPLE_PIECES * SE_SAMPLE_PIECE) {
        error = se_read(input, piece, 0, size);
    } else {
        for (size_t i = 0; i < SE_SAMPLE_PIECES && !error; i++, piece += SE_SAMPLE_PIECE) {
            const size_t middle = n_floats * (2 * i + 1) / (2 * SE_SAMPLE_PIECES) * sizeof(float);
            error = se_read(input, piece, middle - SE_SAMPLE_PIECE / 2, SE_SAMPLE_PIECE);
        }
    }
    se_tap_fail(tap, error);
    if (error) return;
    tap->result.sampled = 1;
    for (int32_t i = 0; i < p->n_known && !tap->result.known; i++) {
        if (!memcmp(p->sample, p->known + (size_t) i * SE_SAMPLE_BYTES, SE_SAMPLE_BYTES)) tap->result.known = i + 1;
    }
    if (tap->result.known) p->count_only = 1;
}

static void compare_inputs(se_tap * tap, const struct ggml_tensor * node) {
    for (int s = 0; s < GGML_MAX_SRC && !tap->result.sampled; s++) {
        const struct ggml_tensor * src = node->src[s];
        if (src && se_is_leaf(src) && se_is_input(src, tap->plan.compare_input)) compare_input(tap, src);
    }
}

static void override_positions(se_tap * tap, const struct ggml_tensor * node) {
    int64_t n_used;
    struct ggml_tensor * positions = se_rope_positions(node, &n_used);
    if (!positions) return;
    tap->rope_seen = true;
    tap->result.rope = 1;
    /* Two consumers in each layer read one tensor, and on a GPU each write is waited for: 72 in a decoder of 36 layers. One is enough, since a
     * scheduler copies an input to a backend in one split alone, before its nodes are asked about (ggml_backend_sched_split_graph). */
    for (int32_t i = 0; i < tap->n_positioned; i++) {
        if (tap->positioned[i] == positions) return;
    }
    if (tap->n_positioned < MAX_COPIES) tap->positioned[tap->n_positioned++] = positions;
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

static float half_to_float(uint16_t x) {
    float out;
    se_ggml.type_traits(GGML_TYPE_F16)->to_float(&x, &out, 1);
    return out;
}

static uint16_t float_to_half(float x) {
    uint16_t out;
    se_ggml.type_traits(GGML_TYPE_F16)->from_float_ref(&x, &out, 1);
    return out;
}

static float mask_at(const struct ggml_tensor * mask, const void * values, int64_t i) {
    return mask->type == GGML_TYPE_F32 ? ((const float *) values)[i] : half_to_float(((const uint16_t *) values)[i]);
}

static void set_mask_at(const struct ggml_tensor * mask, void * values, int64_t i, float x) {
    if (mask->type == GGML_TYPE_F32) ((float *) values)[i] = x;
    else ((uint16_t *) values)[i] = float_to_half(x);
}

/* The columns of one row as the level wants them. Whether a cell may be seen is asked of columns that no level hides before they are written,
 * so the row may be at any level already. */
static void level_row(se_tap * tap, const struct ggml_tensor * mask, void * values, int64_t first, int64_t n) {
    const float * bias = tap->level_bias + (int64_t) tap->level * tap->n_level_cells;
    for (int64_t c = 0; c < n; c++) {
        const int32_t witness = tap->witness[c];
        if (witness >= 0) {
            const bool seen = witness < mask->ne[0] && isfinite(mask_at(mask, values, first + witness));
            set_mask_at(mask, values, first + c, seen ? bias[c] : -INFINITY);
        } else if (isfinite(mask_at(mask, values, first + c))) {
            bool has_bias = false;
            for (int32_t i = 0; i < tap->n_levels; i++) has_bias = has_bias || tap->level_bias[(int64_t) i * tap->n_level_cells + c] != 0.0f;
            if (has_bias) set_mask_at(mask, values, first + c, bias[c]);
        }
    }
}

/* Puts the bias of each cell into its column of the mask (n_kv, n_tokens), where that is 0 and not -inf. Where
 * the bias already stands nothing changes: a backend's copy of the mask may have been made before or after the original's turn.
 * What else stands there is a distance (ALiBi), which each head takes another part of: a bias would be taken so, too. */
static void bias_row(se_tap * tap, const struct ggml_tensor * mask, void * values, int64_t first, int64_t n) {
    for (int64_t c = 0; c < n; c++) {
        const float bias = tap->bias[c], found = bias != 0.0f ? mask_at(mask, values, first + c) : 0.0f;
        if (bias == 0.0f || isinf(found)) continue;
        if (found == 0.0f) set_mask_at(mask, values, first + c, bias);
        else if (found != (mask->type == GGML_TYPE_F32 ? bias : half_to_float(float_to_half(bias)))) se_tap_fail(tap, SE_ERR_SHAPE);
    }
}

/* The mask as it is, or as the last level left it: then it is known, and need not come from the backend again. */
static void * mask_values(se_tap * tap, struct ggml_tensor * mask, int32_t known) {
    const size_t size = se_ggml.nbytes(mask);
    if (!tap->n_levels || known < 0) {
        void * values = scratch(tap, size);
        if (values) se_tap_fail(tap, se_read(mask, values, 0, size));
        return values;
    }
    level_mask * kept = &tap->level_masks[known];
    if (tap->level > 0 && kept->is_known) return kept->values;
    if (size > kept->capacity) {
        void * bigger = realloc(kept->values, size);
        if (!bigger) {
            se_tap_fail(tap, SE_ERR_MEMORY);
            return NULL;
        }
        kept->values = bigger;
        kept->capacity = size;
    }
    const int error = se_read(mask, kept->values, 0, size);
    se_tap_fail(tap, error);
    kept->is_known = !error;
    return kept->values;
}

/* known: index of the mask in tap->biased, -1 if there was no room for it. */
static void write_mask(se_tap * tap, struct ggml_tensor * mask, int32_t known) {
    const size_t size = se_ggml.nbytes(mask);
    void * values = mask_values(tap, mask, known);
    if (!values) return;
    const int64_t n_kv = mask->ne[0], n_rows = mask->ne[1] * mask->ne[2] * mask->ne[3];
    const int64_t n_cells = tap->n_levels ? tap->n_level_cells : tap->n_bias, n = n_kv < n_cells ? n_kv : n_cells;
    for (int64_t r = 0; r < n_rows; r++) (tap->n_levels ? level_row : bias_row)(tap, mask, values, r * n_kv, n);
    se_tap_fail(tap, se_write(mask, values, 0, size));
}

/* Cell bias, or the level that the consumer is in. A level is written when the first consumer in it is asked about: the attention of the
 * levels before has run by then (se_tap_ends_level), and a mask that nothing reads any more is no longer there. Its memory is another
 * tensor's (ggml_gallocr_free_node), as that of the full mask is where the last layers have a sliding window. */
static void bias_mask(se_tap * tap, const struct ggml_tensor * node) {
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        struct ggml_tensor * mask = se_mask_input(node, s);
        if (!mask) continue;
        int32_t known = 0;
        while (known < tap->n_biased && tap->biased[known] != mask) known++;
        if (known == tap->n_biased) {
            if (tap->n_biased < MAX_MASKS) {
                tap->biased[tap->n_biased++] = mask;
                tap->level_masks[known].is_known = false;
            } else {
                known = -1;
                if (tap->n_levels) se_tap_fail(tap, SE_ERR_CAPACITY); /* it could not change later */
            }
        } else if (!tap->n_levels || tap->level_masks[known].level == tap->level) {
            continue;
        }
        if (known >= 0) tap->level_masks[known].level = tap->level;
        /* What a cast makes of the mask stays as it is when the mask changes. */
        const bool is_cast = tap->n_levels && !se_is_attention(node);
        if (is_cast || (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32)) se_tap_fail(tap, SE_ERR_SHAPE);
        else write_mask(tap, mask, known);
    }
}

bool se_tap_ends_level(const se_tap * tap, const struct ggml_tensor * node) {
    return tap->level + 1 < tap->n_levels && se_layer_out_index(node, tap->layer_out) == tap->level_layers[tap->level + 1] - 1;
}

void se_tap_next_level(se_tap * tap) { tap->level++; }

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
    tap->n_positioned = 0;
    tap->n_biased = 0;
    for (int i = 0; i < MAX_INPUTS; i++) tap->inputs[i].n_written = 0;
    tap->level = 0;
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
    if (tap->bias || tap->n_levels) bias_mask(tap, node);
    if (tap->joined[0]) look_for_concat(tap, node);
    if (tap->watch_out || tap->inputs[0].data) override_inputs(tap, node);
    if (tap->armed && tap->plan.compare_input) compare_inputs(tap, node);
}

/* ---- settings ---- */

int se_tap_set_position_shift(se_tap * tap, int32_t from, int32_t offset) {
    if (!tap) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    tap->shift_from = from;
    tap->shift = offset;
    return SE_OK;
}

int se_tap_set_layer_out(se_tap * tap, const char * name) {
    if (!tap || (name && (!*name || strlen(name) >= GGML_MAX_NAME))) return SE_ERR_ARGUMENT;
    strcpy(tap->layer_out, name ? name : se_usual_layer_out);
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

int se_tap_set_levels(se_tap * tap, const int32_t * layers, int32_t n_levels, const float * bias, const int32_t * witness, int32_t n_cells) {
    if (!tap || n_levels < 0 || (n_levels && (!layers || !bias || !witness || n_cells < 1 || layers[0] != 0))) return SE_ERR_ARGUMENT;
    if (!se_ggml_ready()) return SE_ERR_UNBOUND;
    for (int32_t i = 1; i < n_levels; i++) {
        if (layers[i] <= layers[i - 1]) return SE_ERR_ARGUMENT;
    }
    for (int32_t c = 0; c < (n_levels ? n_cells : 0); c++) { /* a witness is asked after the columns before it are written */
        if (witness[c] >= n_cells || (witness[c] >= 0 && witness[witness[c]] >= 0)) return SE_ERR_ARGUMENT;
        for (int32_t i = 0; i < n_levels && witness[c] >= 0; i++) {
            if (!isfinite(bias[(int64_t) i * n_cells + witness[c]])) return SE_ERR_ARGUMENT;
        }
    }
    int32_t * layers_copy = NULL, * witness_copy = NULL;
    float * bias_copy = NULL;
    if (n_levels) {
        layers_copy = malloc((size_t) n_levels * sizeof *layers_copy);
        witness_copy = malloc((size_t) n_cells * sizeof *witness_copy);
        bias_copy = malloc((size_t) n_levels * (size_t) n_cells * sizeof *bias_copy);
        if (!layers_copy || !witness_copy || !bias_copy) {
            free(layers_copy);
            free(witness_copy);
            free(bias_copy);
            return SE_ERR_MEMORY;
        }
        memcpy(layers_copy, layers, (size_t) n_levels * sizeof *layers);
        memcpy(witness_copy, witness, (size_t) n_cells * sizeof *witness);
        memcpy(bias_copy, bias, (size_t) n_levels * (size_t) n_cells * sizeof *bias);
    }
    free(tap->level_layers);
    free(tap->witness);
    free(tap->level_bias);
    tap->level_layers = layers_copy;
    tap->witness = witness_copy;
    tap->level_bias = bias_copy;
    tap->n_levels = n_levels;
    tap->n_level_cells = n_levels ? n_cells : 0;
    tap->level = 0;
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
