/* The few ggml functions that the core calls, as pointers that se_bind fills. */
#ifndef SE_GGML_API_H
#define SE_GGML_API_H

#include "ggml-backend.h"
#include "ggml.h"

typedef struct {
    void (*tensor_get)(const struct ggml_tensor *, void *, size_t, size_t);
    void (*tensor_set)(struct ggml_tensor *, const void *, size_t, size_t);
    bool (*buffer_is_host)(ggml_backend_buffer_t);
    size_t (*nbytes)(const struct ggml_tensor *);
    const struct ggml_type_traits * (*type_traits)(enum ggml_type);
} se_ggml_api;

extern se_ggml_api se_ggml;
bool se_ggml_ready(void);

#endif
