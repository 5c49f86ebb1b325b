#include "depends.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "llama_graph.h"
#include "star_edge.h"

typedef struct {
    const struct ggml_tensor ** slots; /* open addressing */
    size_t capacity, count;
} tensor_set;

struct se_depends {
    tensor_set prelude, layers;
    tensor_set passed; /* nodes of the window with names that others have too */
    tensor_set given[SE_MAX_EXTRA]; /* the hidden state of a layer that is given, and what nodes without a layer make of it alone */
    int given_layer[SE_MAX_EXTRA];
    int n_given;
};

se_depends * se_depends_new(void) { return calloc(1, sizeof(se_depends)); }

void se_depends_free(se_depends * set) {
    if (!set) return;
    free(set->prelude.slots);
    free(set->layers.slots);
    free(set->passed.slots);
    for (int i = 0; i < SE_MAX_EXTRA; i++) free(set->given[i].slots);
    free(set);
}

static void clear(tensor_set * set) {
    if (set->capacity) memset(set->slots, 0, set->capacity * sizeof *set->slots);
    set->count = 0;
}

void se_depends_clear(se_depends * set) {
    clear(&set->prelude);
    clear(&set->layers);
    clear(&set->passed);
    for (int i = 0; i < set->n_given; i++) clear(&set->given[i]);
    set->n_given = 0;
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
        if (t && se_has_name(t, name, length)) return true;
    }
    return false;
}

static bool contains(const tensor_set * set, const struct ggml_tensor * t) {
    if (!set->count) return false;
    if (set->slots[slot_of(set, t)]) return true;
    size_t length;
    const char * copied = se_copied_name(t, &length); /* of a node of an earlier split */
    return copied && contains_name(set, copied, length);
}

bool se_depends_pass(se_depends * set, const struct ggml_tensor * node) {
    return !se_has_shared_name(node) || insert(&set->passed, node);
}

/* Whether `t` is a copy of a node of the window, though a node before it has the same name. */
static bool is_copy_of_passed(const se_depends * set, const struct ggml_tensor * t) {
    size_t length;
    const char * copied = set->passed.count ? se_copied_name(t, &length) : NULL;
    return copied && se_has_shared_name(t) && contains_name(&set->passed, copied, length);
}

bool se_depends_on_layers(const se_depends * set, const struct ggml_tensor * node) {
    for (int i = 0; i < SE_MAX_OPERANDS; i++) {
        const struct ggml_tensor * t = se_operand(node, i);
        if (t && contains(&set->layers, t) && !is_copy_of_passed(set, t)) return true;
    }
    return false;
}

int se_depends_give(se_depends * set, const struct ggml_tensor * node, int layer) {
    if (set->n_given == SE_MAX_EXTRA) return -1;
    set->given_layer[set->n_given] = layer;
    return insert(&set->given[set->n_given++], node) ? SE_INDEPENDENT : -1;
}

/* The given layer that an operand of `node` comes from, as an index, or -1. */
static int given_of(const se_depends * set, const struct ggml_tensor * node) {
    for (int g = 0; g < set->n_given; g++) {
        for (int i = 0; i < SE_MAX_OPERANDS; i++) {
            const struct ggml_tensor * t = se_operand(node, i);
            if (t && contains(&set->given[g], t)) return g;
        }
    }
    return -1;
}

int se_depends_visit(se_depends * set, const struct ggml_tensor * node, int first, int64_t n_embd, int64_t n_rows) {
    if (se_depends_on_layers(set, node)) return insert(&set->layers, node) ? SE_LAYERS : -1;
    const int given = given_of(set, node);
    if (given >= 0) { /* what the layer itself makes of its result runs; the next layer does not */
        const int layer = se_layer_of(node);
        if (layer < 0) return insert(&set->given[given], node) ? SE_INDEPENDENT : -1;
        if (layer > set->given_layer[given] && layer < first) return insert(&set->layers, node) ? SE_LAYERS : -1;
        return SE_INDEPENDENT;
    }
    bool found = false;
    for (int i = 0; i < SE_MAX_OPERANDS && !found; i++) {
        const struct ggml_tensor * t = se_operand(node, i);
        found = t && (se_is_batch_input(t, n_embd, n_rows) || contains(&set->prelude, t));
    }
    if (!found) return SE_INDEPENDENT;
    const int layer = se_layer_of(node);
    const bool begins = layer >= 0 && layer < first;
    return insert(begins ? &set->layers : &set->prelude, node) ? (begins ? SE_LAYERS : SE_PRELUDE) : -1;
}
