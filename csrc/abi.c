/* Sizes and offsets in the headers that the core was compiled with. llama_cpp declares the same structures in ctypes by hand: a build of
 * another llama.cpp under the same version number shows here, and not as memory that is written where nothing should be. */
#include <stddef.h>

#include "llama.h"
#include "mtmd.h"
#include "star_edge.h"

#define SIZE(s) { #s, NULL, sizeof(struct s) }
#define FIELD(s, f) { #s, #f, offsetof(struct s, f) }

static const se_layout LAYOUTS[] = {
    SIZE(llama_batch), FIELD(llama_batch, n_tokens), FIELD(llama_batch, token), FIELD(llama_batch, embd), FIELD(llama_batch, pos),
    FIELD(llama_batch, n_seq_id), FIELD(llama_batch, seq_id), FIELD(llama_batch, logits),
    SIZE(llama_context_params), FIELD(llama_context_params, n_ctx), FIELD(llama_context_params, n_seq_max),
    FIELD(llama_context_params, n_threads_batch), FIELD(llama_context_params, flash_attn_type), FIELD(llama_context_params, cb_eval),
    FIELD(llama_context_params, cb_eval_user_data), FIELD(llama_context_params, type_k), FIELD(llama_context_params, type_v),
    FIELD(llama_context_params, embeddings), FIELD(llama_context_params, kv_unified),
    SIZE(llama_model_params), FIELD(llama_model_params, n_gpu_layers), FIELD(llama_model_params, vocab_only),
    SIZE(mtmd_context_params), FIELD(mtmd_context_params, use_gpu), FIELD(mtmd_context_params, print_timings),
    FIELD(mtmd_context_params, n_threads), FIELD(mtmd_context_params, flash_attn_type), FIELD(mtmd_context_params, image_min_tokens),
    FIELD(mtmd_context_params, image_max_tokens), FIELD(mtmd_context_params, cb_eval), FIELD(mtmd_context_params, cb_eval_user_data),
    SIZE(mtmd_input_text), FIELD(mtmd_input_text, text), FIELD(mtmd_input_text, add_special), FIELD(mtmd_input_text, parse_special),
    SIZE(mtmd_decoder_pos),
    { NULL, NULL, 0 },
};

const se_layout * se_layouts(void) { return LAYOUTS; }

const char * se_built_against_llama(void) { return STAR_EDGE_LLAMA; }
