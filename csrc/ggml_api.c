#include "ggml_api.h"

#include <stdlib.h>
#include <string.h>

#include "star_edge.h"

se_ggml_api se_ggml;

/* A function pointer and an address have the same size on every platform that llama.cpp runs on; the union keeps the
 * conversion out of the reach of strict-aliasing rules. */
typedef union {
    uintptr_t address;
    void (*function)(void);
} any_function;

static const struct {
    const char * name;
    size_t offset;
} BOUND[] = {
    { "ggml_backend_tensor_get", offsetof(se_ggml_api, tensor_get) },
    { "ggml_backend_tensor_set", offsetof(se_ggml_api, tensor_set) },
    { "ggml_backend_buffer_is_host", offsetof(se_ggml_api, buffer_is_host) },
    { "ggml_nbytes", offsetof(se_ggml_api, nbytes) },
    { "ggml_get_type_traits", offsetof(se_ggml_api, type_traits) },
    { "ggml_backend_buffer_get_type", offsetof(se_ggml_api, buffer_type) },
    { "ggml_backend_buft_get_device", offsetof(se_ggml_api, device) },
    { "ggml_backend_dev_supports_op", offsetof(se_ggml_api, supports_op) },
};
enum { N_BOUND = sizeof(BOUND) / sizeof(BOUND[0]) };

int se_bind(const char * name, uintptr_t address) {
    if (!name || !address) return SE_ERR_ARGUMENT;
    for (int i = 0; i < N_BOUND; i++) {
        if (strcmp(name, BOUND[i].name) == 0) {
            any_function f = { .address = address };
            memcpy((char *) &se_ggml + BOUND[i].offset, &f.function, sizeof f.function);
            return SE_OK;
        }
    }
    return SE_ERR_ARGUMENT;
}

const char * se_bind_missing(void) {
    for (int i = 0; i < N_BOUND; i++) {
        void (*f)(void);
        memcpy(&f, (char *) &se_ggml + BOUND[i].offset, sizeof f);
        if (!f) return BOUND[i].name;
    }
    return NULL;
}

bool se_ggml_ready(void) { return se_bind_missing() == NULL; }

/* Of a thread: a tap's callback runs in the one that computes its graph. */
static _Thread_local se_traffic * account;

void se_count_into(se_traffic * traffic) { account = traffic; }

static void count_read(size_t size) {
    if (!account) return;
    account->n_reads++;
    account->read_bytes += (int64_t) size;
}

static bool in_range(const struct ggml_tensor * t, size_t offset, size_t size) {
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    return root->buffer && t->data && size <= se_ggml.nbytes(t) && offset <= se_ggml.nbytes(t) - size;
}

int se_read(const struct ggml_tensor * t, void * out, size_t offset, size_t size) {
    if (!in_range(t, offset, size)) return SE_ERR_SHAPE;
    if (!size) return SE_OK;
    count_read(size);
    se_ggml.tensor_get(t, out, offset, size);
    return SE_OK;
}

int se_write(struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    if (!in_range(t, offset, size)) return SE_ERR_SHAPE;
    if (!size) return SE_OK;
    if (account) {
        account->n_writes++;
        account->written_bytes += (int64_t) size;
    }
    se_ggml.tensor_set(t, data, offset, size);
    return SE_OK;
}

const void * se_borrow(const struct ggml_tensor * t, size_t offset, size_t size, void ** to_free, int * error) {
    if (!in_range(t, offset, size)) {
        *error = SE_ERR_SHAPE;
        return NULL;
    }
    count_read(size);
    const struct ggml_tensor * root = t->view_src ? t->view_src : t;
    if (se_ggml.buffer_is_host(root->buffer)) return (const char *) t->data + offset;
    *to_free = malloc(size);
    if (!*to_free) {
        *error = SE_ERR_MEMORY;
        return NULL;
    }
    se_ggml.tensor_get(t, *to_free, offset, size);
    return *to_free;
}

bool se_supports(const struct ggml_tensor * node) {
    const struct ggml_tensor * root = node->view_src ? node->view_src : node;
    ggml_backend_dev_t device = root->buffer ? se_ggml.device(se_ggml.buffer_type(root->buffer)) : NULL;
    return !device || se_ggml.supports_op(device, node);
}

const char * se_built_against(void) { return STAR_EDGE_LLAMA_CPP_PYTHON; }

const char * se_error_text(int error) {
    switch (error) {
        case SE_OK: return "success";
        case SE_ERR_ARGUMENT: return "an argument is null or out of range";
        case SE_ERR_MEMORY: return "out of memory";
        case SE_ERR_UNBOUND: return "the ggml functions are not bound";
        case SE_ERR_NO_LAYER_OUT: return "the graph names no layer output (l_out) where the layer window begins or ends, or no node that the plan names";
        case SE_ERR_NO_ATTENTION: return "a layer that was named has no attention in this graph";
        case SE_ERR_NO_ROPE: return "positions were given, but the graph has no RoPE";
        case SE_ERR_SHAPE: return "a tensor of the graph has an unexpected shape, type or content";
        case SE_ERR_CAPACITY: return "an output buffer is too small";
        case SE_ERR_SEVERAL_GRAPHS: return "the decode was split into several graphs";
        case SE_ERR_LATE_INPUT: return "a later layer reads more of an earlier one than its hidden state, so no window can begin there";
        case SE_ERR_ROWS: return "the encoder does something with its rows that needs all of them, or another number of them";
        default: return "unknown error";
    }
}
