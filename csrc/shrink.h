/* Rows leave a running graph: after one node is done, it and all that depends on it get the shapes that fewer rows would have given them.
 *
 * Backends read shapes when they compute, and the memory of each tensor was laid out for more rows than are left. clip builds its graphs
 * anew for each encode, so no other run sees the shapes. Two things have to be kept from clip.cpp and ggml:
 *  - clip_encode compares the last node with the number of tokens that it expects, and ends the process where they differ: that node gets
 *    its shape back as soon as it is done (se_shrink_restore).
 *  - The scheduler compares the shapes of a tensor and of its copy for another backend, and ends the process where they differ
 *    (ggml_backend_tensor_copy): a graph that copies one of these tensors is refused.
 * Both are known before anything runs from a rehearsal, which works out all shapes and sets none. */
#ifndef SE_SHRINK_H
#define SE_SHRINK_H

#include <stdbool.h>
#include <stdint.h>

struct ggml_tensor;
typedef struct se_shrink se_shrink;

se_shrink * se_shrink_new(void);
void se_shrink_free(se_shrink * s);
/* Forgets the graph, whose tensors may be gone. */
void se_shrink_clear(se_shrink * s);
/* Whether rows have been dropped. */
bool se_shrink_active(const se_shrink * s);
bool se_shrink_has(const se_shrink * s, const struct ggml_tensor * tensor);

/* Of the rows of `node`, (n_embd, n_rows) float32, which is done, those of keep (n_keep, each at most once) stay, in that order.
 * rehearse: nothing is written and no shape is set, here or in se_shrink_visit, and the node need not be done. */
int se_shrink_begin(se_shrink * s, struct ggml_tensor * node, const int32_t * keep, int32_t n_keep, bool rehearse);

/* Asked about a node, in the order of the graph: its shape as its operands' are now, and those of positions and row numbers that it reads.
 * An error: the shape cannot be told, or the node's backend cannot compute it. The node must not run then. */
int se_shrink_visit(se_shrink * s, struct ggml_tensor * node);

/* Length of dimension 1 of a node, with the rows that stay. */
int64_t se_shrink_length(const se_shrink * s, const struct ggml_tensor * node);

/* The shape of a node as the graph was built, or those of all: nothing of the graph may run after that. */
void se_shrink_restore(se_shrink * s, const struct ggml_tensor * node);
void se_shrink_restore_all(se_shrink * s);

#endif
