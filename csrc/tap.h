/* What the two halves of the tap share: tap.c runs layer windows and reads attention, tap_inputs.c overwrites inputs of the graph. */
#ifndef SE_TAP_H
#define SE_TAP_H

#include "depends.h"
#include "ggml_api.h"
#include "shrink.h"
#include "star_edge.h"

enum { MAX_INPUTS = 8, MAX_MASKS = 8, MAX_COPIES = 16 };

typedef struct {
    char name[GGML_MAX_NAME];
    void * data;
    size_t size;
    const struct ggml_tensor * written[MAX_COPIES]; /* in this graph: the input itself, and backends' copies of it */
    int n_written;
} input_override;

typedef struct {
    void * values;
    size_t capacity;
    bool is_known; /* they are what the tensor has */
    int32_t level; /* the one that the tensor has been written for */
} level_mask;

struct se_tap {
    /* lasting settings */
    int32_t shift_from, shift;
    float * bias;
    int32_t n_bias;
    int32_t * level_layers; /* (n_levels), see se_tap_set_levels */
    float * level_bias;     /* (n_levels, n_level_cells) */
    int32_t * witness;      /* (n_level_cells) */
    int32_t n_levels, n_level_cells;
    input_override inputs[MAX_INPUTS];
    char layer_out[GGML_MAX_NAME]; /* what the graph calls the output of a layer */
    char joined[GGML_MAX_NAME]; /* leaf whose place in a CONCAT is looked for; "": none */
    char watch_name[GGML_MAX_NAME];
    void * watch_out;
    size_t watch_capacity, watch_size;

    se_traffic traffic;

    /* one decode */
    bool armed;
    se_plan plan;
    se_result result;
    const struct ggml_tensor * first_node;
    bool past_window_start; /* the layer that the hidden state is injected at has gone by */
    bool rope_seen, hidden_taken, cells_due, source_seen;
    const struct ggml_tensor * at_last; /* the attention that ends the window, once it has run */
    int32_t last_v;         /* highest layer whose V the graph has written; -1: none */
    int32_t next_layer;     /* index into plan.attn_layers */
    int32_t last_out;       /* N of the last layer output of this graph, or -1 */
    int32_t attention;      /* index of the last attention operation, see se_plan.attn_layers */
    struct ggml_tensor ** skipped;
    size_t skipped_capacity;
    se_depends * depends;
    se_shrink * shrink;

    /* one graph */
    const struct ggml_tensor * graph_start; /* first node since se_tap_begin: seen again, another graph (ubatch) runs */
    int32_t * positions;    /* shifted positions, (n_positions): the same numbers for every backend's copy */
    int64_t n_positions;    /* 0: not known yet */
    size_t positions_capacity;
    const struct ggml_tensor * positioned[MAX_COPIES]; /* tensors that have their positions: the input itself, and backends' copies */
    int32_t n_positioned;
    struct ggml_tensor * biased[MAX_MASKS];
    level_mask level_masks[MAX_MASKS]; /* with levels: the same masks as the host has written them */
    int32_t n_biased;
    int32_t level;          /* the one that the graph is in */
    void * scratch;
    size_t scratch_size;
};

/* Keeps the first error of a decode. */
static inline void se_tap_fail(se_tap * tap, int error) {
    if (error && !tap->result.error) tap->result.error = error;
}

/* A new graph begins, in which position shift and cell bias are due. */
void se_tap_inputs_begin(se_tap * tap);

/* Called while asking about a node: writes and reads the inputs that it is the consumer of. */
void se_tap_inputs_visit(se_tap * tap, const struct ggml_tensor * node);

/* Whether the node is the last of a level: the graph must have come that far before the masks change. */
bool se_tap_ends_level(const se_tap * tap, const struct ggml_tensor * node);

/* Called when such a node is done: from its next consumer on, a mask is that of the next level. */
void se_tap_next_level(se_tap * tap);

#endif
