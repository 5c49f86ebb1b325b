/* The few ggml functions that the core calls, as pointers that se_bind fills, and safe access to the memory of
 * tensors. */
#ifndef SE_GGML_API_H
#define SE_GGML_API_H

#include "ggml-backend.h"
#include "ggml.h"
#include "star_edge.h"

typedef struct {
    void (*tensor_get)(const struct ggml_tensor *, void *, size_t, size_t);
    void (*tensor_set)(struct ggml_tensor *, const void *, size_t, size_t);
    bool (*buffer_is_host)(ggml_backend_buffer_t);
    size_t (*nbytes)(const struct ggml_tensor *);
    const struct ggml_type_traits * (*type_traits)(enum ggml_type);
    ggml_backend_buffer_type_t (*buffer_type)(ggml_backend_buffer_t);
    ggml_backend_dev_t (*device)(ggml_backend_buffer_type_t);
    bool (*supports_op)(ggml_backend_dev_t, const struct ggml_tensor *);
} se_ggml_api;

extern se_ggml_api se_ggml;
bool se_ggml_ready(void);

/* Where the calls below count what they move, for the calling thread; NULL: nowhere. */
void se_count_into(se_traffic * traffic);

/* ggml_backend_tensor_get/set abort on a bad range; these return SE_ERR_SHAPE instead. */
int se_read(const struct ggml_tensor * tensor, void * out, size_t offset, size_t size);
int se_write(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);

/* The bytes [offset, offset + size) of a tensor: in place when its memory is the host's, otherwise a copy, which the
 * caller frees. NULL: *error is set. */
const void * se_borrow(const struct ggml_tensor * tensor, size_t offset, size_t size, void ** to_free, int * error);

/* Whether the device whose memory a node is in computes it with the shapes that it and its operands have. The CPU's memory names no device:
 * it computes every shape. */
bool se_supports(const struct ggml_tensor * node);

#endif
