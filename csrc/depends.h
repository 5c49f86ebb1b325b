/* Which nodes of a graph depend on the input embeddings. */
#ifndef SE_DEPENDS_H
#define SE_DEPENDS_H

#include <stdbool.h>
#include <stdint.h>

struct ggml_tensor;

/* By pointer, and by name across backends: a tensor depends on the embeddings alone (SE_PRELUDE: their scaling,
 * Gemma's inputs of later layers, ...), or on what a layer has computed from them (SE_LAYERS). */
enum se_dependence { SE_INDEPENDENT = 0, SE_PRELUDE = 1, SE_LAYERS = 2 };
typedef struct se_depends se_depends;
se_depends * se_depends_new(void);
void se_depends_free(se_depends * set);
void se_depends_clear(se_depends * set);

/* What `node` depends on, remembered for its consumers. Each node must come after its sources; a backend may order them otherwise as it
 * likes, so what a layer from `first` on makes of the embeddings alone counts as SE_PRELUDE, wherever it comes. -1: out of memory.
 * n_embd, n_rows: of the batch, whose embeddings are known by their shape. */
int se_depends_visit(se_depends * set, const struct ggml_tensor * node, int first, int64_t n_embd, int64_t n_rows);

/* `node` is the hidden state of layer `layer`, which comes from outside: what is made of it is not SE_LAYERS, unless a layer after `layer`
 * and before `first` makes it. SE_INDEPENDENT, or -1: out of memory, or more than SE_MAX_EXTRA layers. */
int se_depends_give(se_depends * set, const struct ggml_tensor * node, int layer);

/* `node` belongs to the window, and does not depend on what is skipped. A copy with a name that nodes of several layers have is from now on
 * a copy of this one. false: out of memory. */
bool se_depends_pass(se_depends * set, const struct ggml_tensor * node);

/* Whether one of its operands depends on what a layer has computed. */
bool se_depends_on_layers(const se_depends * set, const struct ggml_tensor * node);

#endif
