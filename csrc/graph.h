/* What the tap recognises in a ggml graph: layer outputs, attention operations, graph inputs, and which nodes depend on the
 * input embeddings. */
#ifndef SE_GRAPH_H
#define SE_GRAPH_H

#include "ggml_api.h"
#include "star_edge.h"

/* `l_out-N`: N, otherwise -1. llama.cpp names the result of layer N so (llm_graph_context::cb). */
int se_layer_out_index(const struct ggml_tensor * node);

/* FLASH_ATTN_EXT, or a SOFT_MAX over heads. */
bool se_is_attention(const struct ggml_tensor * node);

/* Whether `tensor` is the graph input `name`, or the copy that the scheduler made of it for another backend: an input that
 * crosses to a backend appears there as BACKEND#name#i (ggml_backend_sched_split_graph). */
bool se_is_input(const struct ggml_tensor * tensor, const char * name);

/* N of the cache_v_lN (llama_kv_cache) that `node` writes rows to, otherwise -1. */
int se_v_written(const struct ggml_tensor * node);

/* N of the cache_k_lN that the SOFT_MAX or FLASH_ATTN_EXT `node` is made from, otherwise -1. */
int se_attended_layer(const struct ggml_tensor * node);

/* ggml_backend_tensor_get/set abort on a bad range; these return SE_ERR_SHAPE instead. */
int se_read(const struct ggml_tensor * tensor, void * out, size_t offset, size_t size);
int se_write(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);

/* Reads the attention of `node` after it has run (or after it was skipped, with its operands in place):
 * query rows row_first, row_first + row_step, ... into out as se_attention_scores lays it out. */
typedef struct {
    int32_t row_first, row_count, row_step, reduce, n_threads;
    float * out;
    int64_t out_size;
    int32_t n_kv, n_rows, n_head; /* filled in */
    bool masked;
} se_attention_read;
int se_read_attention(const struct ggml_tensor * node, se_attention_read * read);

/* Which tensors depend on the input embeddings, by pointer, and by name across backends: on them alone (SE_PRELUDE: their scaling,
 * Gemma's inputs of later layers, ...), or on what a layer has computed from them (SE_LAYERS). */
enum se_dependence { SE_INDEPENDENT = 0, SE_PRELUDE = 1, SE_LAYERS = 2 };
typedef struct se_depends se_depends;
se_depends * se_depends_new(void);
void se_depends_free(se_depends * set);
void se_depends_clear(se_depends * set);
/* What `node` depends on, remembered for its consumers. Each node must come after its sources; a backend may order them otherwise as it
 * likes, so what a layer from `first` on makes of the embeddings alone counts as SE_PRELUDE, wherever it comes. -1: out of memory. */
int se_depends_visit(se_depends * set, const struct ggml_tensor * node, int first);

/* Whether one of its sources depends on what a layer has computed. */
bool se_depends_on_layers(const se_depends * set, const struct ggml_tensor * node);

#endif
