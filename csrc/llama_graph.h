/* Everything that the core knows about the graphs of llama.cpp, clip and ggml: the names of tensors, the meaning of
 * operations, the order of operands, the layout of op_params, and flags. No other file of the core names a tensor or
 * an operation (tests/test_wall_c.py). Each entry says which invariant it relies on and which function of llama.cpp
 * imposes it, as of the version in pyproject.toml: after an upgrade, this file is what has to be read again. */
#ifndef SE_LLAMA_GRAPH_H
#define SE_LLAMA_GRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

/* ---- names ----
 * llama_context::graph_get_cb and clip_graph::cb name a node "NAME-N" when layer N computes it, and "NAME"
 * otherwise. */

/* N of a node `OUTPUT-N`, otherwise -1: the hidden state that layer N hands to layer N + 1, float32, (n_embd,
 * n_tokens). Graphs of decoders (src/models/) call it "l_out". Nemotron-H has another name, and "l_out" is
 * something else there (llama_model_nemotron_h::graph). The last layer keeps only rows with logits
 * (llm_graph_context::build_inp_out_ids), except in hybrids. */
extern const char * const se_usual_layer_out;
int se_layer_out_index(const struct ggml_tensor * node, const char * output);

/* The same of a vision encoder, whose layers end in `layer_out-N` (clip_graph::build_vit, clip_graph_qwen2vl::build,
 * clip_graph_qwen3vl::build). */
int se_encoder_layer_out_index(const struct ggml_tensor * node);

/* N of a name that ends in "-N": layer N computes the node. Otherwise -1. */
int se_layer_of(const struct ggml_tensor * node);

/* A leaf: an input, a weight, a cache, or the scheduler's copy of one of them or of a node. ggml_new_tensor gives it
 * no operation. */
bool se_is_leaf(const struct ggml_tensor * tensor);

/* The name of what a leaf was copied from for another backend, not terminated; NULL when it is no copy. A tensor
 * that crosses to a backend appears there as the leaf "BACKEND#NAME#i" (ggml_backend_sched_split_graph). Names end
 * at GGML_MAX_NAME characters: the last "#i" is lost when BACKEND and NAME are long, and then the leaf counts as no
 * copy. */
const char * se_copied_name(const struct ggml_tensor * leaf, size_t * length);

/* Whether nodes of several layers have the name of `tensor`, or of what it was copied from. ggml_view, ggml_reshape and others make
 * "SOURCE (view)" of the source's name, which is empty where no cb has named it (what the state of an LFM2 layer is made of). Other names
 * have a number, of a layer or of a node (ggml_visit_parents_graph). */
bool se_has_shared_name(const struct ggml_tensor * tensor);

bool se_has_name(const struct ggml_tensor * tensor, const char * name, size_t length);

/* Whether `tensor` is the graph input `name`, or a copy of it. */
bool se_is_input(const struct ggml_tensor * tensor, const char * name);

/* The inputs that carry the batch of n_rows. In a vision encoder "inp_raw", the pixels (clip_graph::build_inp_raw). In
 * a decoder "inp_tokens", and a float32 leaf (n_embd_inp, n_rows). Both are in every
 * graph, one is used (llm_graph_context::build_inp_embd). The leaf is known by its kind, since models rename it (a cb
 * on what build_inp_embd returns). No other float32 input has a column for each row but masks, which have a name
 * (llm_graph_input_* in llama-graph.h). A copy for another backend has lost the flag of an input. What remains is its
 * shape, and that no layer has computed it. A float32 weight may look the same: what reads it in a layer reads rows
 * of the batch as well, so nothing more is skipped. */
bool se_is_batch_input(const struct ggml_tensor * tensor, int64_t n_embd, int64_t n_rows);

/* N of the cache_r_lN or cache_s_lN that the node writes to, otherwise -1: the recurrent state of layer N
 * (llama_memory_recurrent names its tensors so). It is cleared by a SCALE in place (llm_graph_context::build_rs) and
 * written by a CPY. */
int se_state_written(const struct ggml_tensor * node);

/* "result_norm", the output norm of a decoder (src/models/): neither RoPE nor attention comes after it in its graph. */
bool se_ends_layers(const struct ggml_tensor * node);

/* ---- the flag ----
 * Backends compute only nodes with GGML_TENSOR_FLAG_COMPUTE. ggml_visit_parents_graph sets it, except on the
 * branches that ggml_build_forward_select does not take. llama.cpp keeps graphs for batches of the same shape
 * (llama_context::process_ubatch), so a flag that is cleared stays so until it is set again. */
bool se_is_computed(const struct ggml_tensor * node);
void se_set_computed(struct ggml_tensor * node, bool computed);

/* ---- operands ---- */

/* Operand i of SE_MAX_OPERANDS, or NULL: the sources, and last the tensor that a view looks into. A view of the KV
 * cache has only the cache behind it (llama_kv_cache::get_k): the SET_ROWS that writes a row is not among its
 * sources. */
enum { SE_MAX_OPERANDS = GGML_MAX_SRC + 1 };
const struct ggml_tensor * se_operand(const struct ggml_tensor * node, int i);

/* Source i of `node`, if a node of the graph has computed it; NULL for none, a weight or an input. A backend's copy of
 * such a node counts. */
struct ggml_tensor * se_computed_source(const struct ggml_tensor * node, int i);

/* The indices of a SET_ROWS that writes one row for each token, otherwise NULL: int64, (n_tokens), the KV cells of
 * the batch (llama_kv_cache::cpy_k, build_input_k_idxs). A transposed V has an index for every element instead
 * (cpy_v). K comes before V. */
const struct ggml_tensor * se_written_cells(const struct ggml_tensor * node, int64_t n_tokens);

/* N of the cache_v_lN that a SET_ROWS writes to, otherwise -1 (llama_kv_cache names its tensors so; cpy_v). */
int se_v_written(const struct ggml_tensor * node);

/* Whether a node makes the query of a layer: "Qcur-N", or "Qcur_normed-N" where a norm follows (llm_graph_context::build_qkv and the graphs in
 * src/models/). Nothing but the attention of that layer reads it. */
bool se_makes_query(const struct ggml_tensor * node, int layer);

/* N of the cache_k_lN that the SOFT_MAX or FLASH_ATTN_EXT `node` reads, otherwise -1. K is operand 1 of a FLASH_ATTN_EXT. A SOFT_MAX has
 * it in the product with q, with a scale, a soft cap or a bias between them (llm_graph_context::build_attn_mha). */
int se_attended_layer(const struct ggml_tensor * node);

/* The positions of a decoder's ROPE, otherwise NULL: "inp_pos", int32, (n_tokens), or for M-RoPE (4 n_tokens),
 * section by section: t, y, x, unused (llm_graph_context::build_inp_pos, ggml_rope_impl). *n_used: how many of them
 * are used, the first ones. Before llama-cpp-python 0.3.36 they have no name, which ggml_build_forward_impl makes
 * "leaf_i". So have those of the graph that shifts K, but it turns what is in the cache
 * (llama_kv_cache::build_graph_shift). clip names its own otherwise. */
struct ggml_tensor * se_rope_positions(const struct ggml_tensor * node, int64_t * n_used);

/* The attention mask as operand i of `node`, otherwise NULL: "attn_inp_kq_mask", (n_kv, n_tokens, 1, n_stream), f16
 * with flash attention and f32 without (build_attn_inp_kq_mask in llama-graph.cpp). Values are 0 and -inf, or
 * ALiBi's distances (llama_kv_cache::set_input_kq_mask). Its consumers are attention and, where a graph casts it, a
 * CPY (ggml_cast). */
struct ggml_tensor * se_mask_input(const struct ggml_tensor * node, int i);

/* ---- attention ----
 * One operation for each layer, in the order of layers: FLASH_ATTN_EXT, or a SOFT_MAX over (n_kv, n_tokens, n_head)
 * (llm_graph_context::build_attn_mha, clip_graph::build_attn). A mixture of experts also has a SOFT_MAX, over
 * (n_expert, n_tokens): no heads and no mask (llm_graph_context::build_moe_ffn). */
bool se_is_attention(const struct ggml_tensor * node);
bool se_is_flash_attention(const struct ggml_tensor * node);

/* The mask of an attention operation, or NULL: operand 3 of FLASH_ATTN_EXT (ggml_flash_attn_ext), 1 of SOFT_MAX
 * (ggml_soft_max_impl). */
const struct ggml_tensor * se_attention_mask(const struct ggml_tensor * node);

/* Operands and parameters of a FLASH_ATTN_EXT: q (head_dim, n_tokens, n_head), k (head_dim, n_kv, n_head_kv), v,
 * mask (n_kv, n_tokens) or NULL, sinks (n_head) float32 or NULL; op_params begin with the three floats
 * (ggml_flash_attn_ext, _add_sinks). With a soft cap the kernels divide the scale by it, and op_params keep the
 * plain one (ggml_compute_forward_flash_attn_ext_f16). */
typedef struct {
    const struct ggml_tensor *q, *k, *mask, *sinks;
    float scale, max_bias, softcap;
} se_flash_attention;
se_flash_attention se_flash_attention_of(const struct ggml_tensor * node);

/* ---- clip ---- */

/* Part s (0: first, 1: last) of a CONCAT, otherwise NULL (ggml_concat). clip joins the class embedding and
 * the patches in this way. A REPEAT is looked through: it makes one class embedding for each image of a batch
 * (clip_graph_internvl::build). */
const struct ggml_tensor * se_joined_part(const struct ggml_tensor * node, int s);

/* The leaf that a SCALE multiplies by 0, otherwise NULL (ggml_scale_impl: op_params begin with the factor).
 * clip_graph_pixtral::build makes its [IMG_BREAK] rows in this way, from memory that nobody has written: a NaN there
 * stays a NaN. The leaf has its memory to itself until it is read, because ggml_gallocr_alloc_graph_impl places leafs
 * before all nodes. */
struct ggml_tensor * se_leaf_times_zero(const struct ggml_tensor * node);

/* ---- rows that leave a running encoder ---- */

/* Whether this is the hidden state that enters encoder layer `layer`: (n_embd, n_rows) float32. Above 0 it is the `layer_out-N` of the
 * layer before (clip_graph::build_vit, clip_graph_llava::build). Layer 0 gets "pos_embed" (build_vit with learned positions), "pos_embd"
 * (clip_graph_gemma4v::build) or "pre_ln" (clip_graph_llava::build); where build_vit has two of them, the second is a norm of the first. */
bool se_enters_layer(const struct ggml_tensor * node, int layer);

/* Whether a tensor is a leaf with the name of a backend's copy, of anything or of `node` (se_copied_name). A name that was cut counts as
 * far as it goes. */
bool se_may_be_copy(const struct ggml_tensor * tensor);
bool se_may_be_copy_of(const struct ggml_tensor * leaf, const struct ggml_tensor * node);

/* How the shape of a node follows from its operands', as the functions in ggml.c make it. */
enum se_shape_kind {
    SE_SHAPE_UNKNOWN,   /* nothing is known of it */
    SE_SHAPE_EACH,      /* that of operand 0, element by element; operand 1, where there is one, is repeated (ggml_add_impl, ggml_unary) */
    SE_SHAPE_ROWS,      /* that of operand 0, whose dimension 0 is worked on as a whole (ggml_norm_impl, ggml_rms_norm_impl) */
    SE_SHAPE_SOFT_MAX,  /* that of operand 0, whose dimension 0 may be of any length; operand 1 is a mask (ggml_soft_max_impl) */
    SE_SHAPE_ROPE,      /* that of operand 0; operand 1 has the positions of its dimension 2, int32, n or 4 n (ggml_rope_impl) */
    SE_SHAPE_GLU,       /* that of operand 0, of which dimension 0 is half as long without an operand 1 (ggml_glu_impl) */
    SE_SHAPE_PRODUCT,   /* (0.ne[1], 1.ne[1], 1.ne[2], 1.ne[3]) (ggml_mul_mat) */
    SE_SHAPE_ATTENTION, /* q, k, v: (v.ne[0], q.ne[2], q.ne[1], q.ne[3]); operand 3 is a mask (ggml_flash_attn_ext) */
    SE_SHAPE_GATHER,    /* rows of operand 0 by operand 1, int32: (0.ne[0], 1.ne[0], 1.ne[1], 1.ne[2]) (ggml_get_rows) */
    SE_SHAPE_POOL,      /* dimensions 0 and 1 in windows of `window`, `step` apart; the others as they are (ggml_pool_2d) */
    SE_SHAPE_JOIN,      /* operands 0 and 1 one after the other along axes[0] (ggml_concat) */
    SE_SHAPE_IN_ORDER,  /* elements of operand 0 in their order, in memory without gaps (ggml_reshape, ggml_cont, ggml_cast) */
    SE_SHAPE_VIEW,      /* a window into operand 0, or into what that looks into, or all of it in other dimensions (ggml_view_impl) */
    SE_SHAPE_PERMUTED   /* dimension i of operand 0 becomes axes[i] (ggml_permute, ggml_transpose) */
};
typedef struct {
    enum se_shape_kind kind;
    int32_t axes[GGML_MAX_DIMS];
    int32_t window[2], step[2];
} se_shape_rule;
se_shape_rule se_shape_rule_of(const struct ggml_tensor * node);

/* Positions or row numbers that a node reads as operand i, otherwise NULL: an input of the graph (ggml_set_input), or a backend's copy of
 * one, int32, (n). Never a weight, which would not be written anew for the next graph. */
struct ggml_tensor * se_index_leaf(const struct ggml_tensor * node, int i);

#endif
