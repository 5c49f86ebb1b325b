/* Shapes of tensors in a graph whose rows have become fewer: what ggml would have made of an operation on operands that are so much
 * shorter. By the rules of llama_graph. */
#ifndef SE_SHAPES_H
#define SE_SHAPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "llama_graph.h"

enum { SE_DIMS = GGML_MAX_DIMS };

typedef struct {
    int64_t ne[SE_DIMS];
    size_t nb[SE_DIMS];
} se_shape;

/* Two shapes of one tensor: as the graph was built, and with the rows that stay. */
typedef struct {
    struct ggml_tensor * tensor;
    se_shape was, now;
    unsigned shorter; /* bit d: dimension d runs over rows, of which some may be gone */
} se_shapes;

se_shape se_shape_of(const struct ggml_tensor * t);
void se_shape_set(struct ggml_tensor * t, const se_shape * s);
bool se_shape_is_contiguous(const se_shape * s);
/* Strides without gaps, from the first one on. */
void se_shape_lay_contiguous(se_shape * s);
/* Bytes from the first element of a tensor to the end of its last one. */
size_t se_shape_extent(const se_shape * s);

/* Fills in what node `e` is now, from its first three operands; those that are not there are zeros. Strides are set for views and
 * permutations only. False: the rule does not say it, or the rows that stay have no place of their own there. */
bool se_shapes_of_node(se_shapes * e, const struct ggml_tensor * node, const se_shape_rule * rule, const se_shapes operands[3]);

#endif
