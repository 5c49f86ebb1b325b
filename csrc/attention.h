/* Attention probabilities of one attention operation of a graph. */
#ifndef SE_ATTENTION_H
#define SE_ATTENTION_H

#include <stdint.h>

#include "star_edge.h"

/* Reads the attention of `node` after it has run (or after it was skipped, with its operands in place):
 * query rows row_first, row_first + row_step, ... into out as se_attention_scores lays it out. */
typedef struct {
    int32_t row_first, row_count, row_step, reduce, n_threads;
    float * out;
    int64_t out_size;
    int32_t n_kv, n_rows, n_head; /* filled in */
} se_attention_read;
int se_read_attention(const struct ggml_tensor * node, se_attention_read * read);

#endif
