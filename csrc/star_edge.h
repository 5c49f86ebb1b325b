/* star_edge: the C core.
 *
 * A tap sits behind ggml's evaluation callback (`cb_eval`) of a llama_context or an mtmd_context. It observes the graph while
 * it runs, reads attention out of it, stops it, skips nodes, and overwrites inputs. It knows graphs and tensors; it does not
 * know images, prompts or policies.
 *
 * Nothing here allocates or frees ggml objects, and no ggml library is linked: the functions that the tap needs are bound at
 * run time (se_bind) from the library that the process has already loaded, so there is never a second copy of ggml.
 *
 * Threading: one tap belongs to one context and is used by one thread at a time, as the context itself is.
 */
#ifndef STAR_EDGE_H
#define STAR_EDGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ggml_tensor;

/* ---- what went wrong; 0 is success ---- */
enum se_error {
    SE_OK = 0,
    SE_ERR_ARGUMENT = 1,      /* a null pointer, a size or an index out of range */
    SE_ERR_MEMORY = 2,        /* out of memory */
    SE_ERR_UNBOUND = 3,       /* se_bind has not been called for every function */
    SE_ERR_NO_LAYER_OUT = 4,  /* the graph names no layer output where the window begins or ends, or not the plan's source_node */
    SE_ERR_NO_ATTENTION = 5,  /* a layer that the plan names has no attention */
    SE_ERR_NO_ROPE = 6,       /* positions were given, and no ROPE node was seen */
    SE_ERR_SHAPE = 7,         /* a tensor has another shape or type than the plan expects, or a mask other values */
    SE_ERR_CAPACITY = 8,      /* an output buffer of the plan is too small */
    SE_ERR_SEVERAL_GRAPHS = 9, /* the decode was split into more than one graph while a window was armed */
    SE_ERR_LATE_INPUT = 10,   /* a layer of the window reads more of the layers before it than their hidden state */
    SE_ERR_ROWS = 11          /* rows cannot leave this graph, or not so many: what it does with them is not known, or needs all */
};
const char * se_error_text(int error);

/* ---- ggml functions, bound at run time ---- */
int se_bind(const char * name, uintptr_t address); /* SE_ERR_ARGUMENT: not a name that the core uses */
const char * se_bind_missing(void);                /* first name that is still unbound, or NULL */
const char * se_built_against(void);               /* version of llama-cpp-python whose headers were compiled in */

/* ---- llama.cpp's structures as they were compiled, to be compared with how Python lays them out ---- */
typedef struct {
    const char * structure;
    const char * field; /* NULL: `bytes` is the size of the structure, otherwise the offset of the field */
    size_t bytes;
} se_layout;
const se_layout * se_layouts(void);      /* ends with a NULL structure */
const char * se_built_against_llama(void); /* what llama_version() said when the core was compiled, or "" */

/* ---- libmtmd's log, of the calling thread ---- */
void se_log_callback(int level, const char * text, void * user_data); /* a ggml_log_callback: keeps warnings and errors */
uintptr_t se_log_callback_address(void);
void se_log_clear(void);
const char * se_log_text(void);

/* ---- attention scores ---- */
enum se_reduce { SE_KEEP = 0, SE_MEAN_HEADS = 1, SE_MEAN_ROWS = 2, SE_MEAN_ALL = 3 };

/* softmax(scale * q k^T + mask) for some query rows. Strides are in bytes. k may be any ggml type that has to_float. */
typedef struct {
    const void * q;        /* float32, head_dim contiguous */
    int64_t q_row_stride, q_head_stride;
    int32_t n_rows, n_head, head_dim;
    const void * k;        /* head_dim contiguous (in blocks, when quantized) */
    int32_t k_type;        /* enum ggml_type */
    int64_t k_row_stride, k_head_stride;
    int32_t n_kv, n_head_kv; /* n_head is a multiple of n_head_kv (GQA) */
    const void * mask;     /* (n_rows, n_kv) added to the scaled products, or NULL */
    int32_t mask_is_f16;
    int64_t mask_row_stride;
    float scale;
    float softcap;         /* 0: none; otherwise softcap * tanh(x / softcap) before the mask (Gemma 2) */
    float max_bias;        /* 0: none; otherwise ALiBi slopes multiply the mask, as ggml's soft_max does */
    const float * sinks;   /* (n_head) logits that join the denominator only, or NULL */
} se_attention;

/* out is (n_head, n_rows, n_kv) float32, less the axes that `reduce` averages over. */
int se_attention_scores(const se_attention * a, int reduce, int n_threads, float * out, int64_t out_size);

/* ---- choosing among the tokens of an image ---- */

/* out: (n, n) products of all pairs of vectors (n, d), symmetric to the bit. Like all below, the same for any number of threads. */
int se_cosines(const float * unit, int32_t n, int32_t d, int32_t n_threads, float * out);

typedef struct {
    const float * products;    /* (n, n) of vectors of length 1. Distances are 1 - product, at least 0 */
    int32_t n;
    const float * places;      /* (n, n), symmetric: distances on the image, or NULL */
    float place_weight;        /* far(i, j) = distance / mean distance of all pairs + place_weight * places, 0 for i = j */
} se_points;

/* Picks k points, the first the farthest from all others together, each further one the farthest from those before it. With r, how far
 * the last one was from them (0 if it is the only one), first[i] is the lowest point within r / 2 of pick i. */
int se_farthest(const se_points * points, int32_t k, int32_t * first);

/* Out, (n) each, 0 or 1. flat: is like a point that touches it, which is one row, column or both away; like is a distance of at most
 * `bound`. unlike: touches one that it is not like. ground: flat, and like the flat point that has the most flat ones like it. */
int se_edges(const se_points * points, float bound, const int32_t * row, const int32_t * column, uint8_t * flat, uint8_t * unlike, uint8_t * ground);

/* star_edge/pruning/representatives.py, cluster: what it means and where it comes from is said there. */
typedef struct {
    const double * mass;       /* (n) */
    const int32_t * best;      /* (n_best) points that stay in any case */
    int32_t n_best;
    int32_t k, most;           /* points that stay at least, and at most with a bound */
    float bound;               /* the largest distance between a point and the one that represents it; INFINITY: none */
    const int32_t * row, * column; /* (n) places on the grid, with a bound; a point without one is far from all. Or NULL: no reach */
    int32_t reach;
    int32_t medoids;           /* 1: the medoid of each group takes over from its representative */
    float rounding;            /* by how much a medoid may be farther from its group */
} se_groups;

/* kept: out, (n), ascending, of which n_kept are used. group: out, (n), index into kept. too_few: out, 1 if the bound asked for more. */
int se_cluster(const se_points * points, const se_groups * groups, int32_t * kept, int32_t * n_kept, int32_t * group, int32_t * too_few);

/* out: (k, d), the means of the vectors (n, d) of each of k groups. group: (n), 0..k-1; a group without members is 0. */
int se_group_means(const float * vectors, int32_t n, int32_t d, const int32_t * group, int32_t k, int32_t n_threads, float * out);

/* ---- the tap ---- */
typedef struct se_tap se_tap;

enum { SE_MAX_EXTRA = 8, SE_MAX_LAYERS = 1024 };
/* A sample of a tensor: its size, 8 bytes, and SE_SAMPLE_PIECES pieces of it, the middles of as many equal parts, as floats have their bounds. */
enum { SE_SAMPLE_PIECES = 8, SE_SAMPLE_PIECE = 4096, SE_SAMPLE_BYTES = 32776 };
enum se_concat { SE_CONCAT_NONE = 0, SE_CONCAT_FIRST = 1, SE_CONCAT_LAST = 2 };

/* What one decode (or one encode) should do. All pointers stay owned by the caller and must outlive se_tap_finish. */
typedef struct {
    /* Layer window [first, last) of n_layer.
     * n_layer == 0: no window, only observe.
     * first > 0: what earlier layers compute from the input embeddings is skipped, and `inject` stands for the output of layer first-1.
     *   The embeddings themselves are still read: some models add more of them at later layers.
     * last < n_layer: the graph ends at the attention of layer `last`, when the K and V of that layer are in the cache. No
     *   layer from `last` on touches its recurrent state.
     * first == last, within 1..n_layer-1: only the K and V of that layer are computed, from `inject`. */
    int32_t n_layer, first, last;
    int32_t count_only;          /* 1: nothing is computed; the graph is looked at, and n_skipped is the number of its nodes */
    int32_t n_rows, n_embd;
    const float * inject;        /* (n_rows, n_embd) */
    float * hidden;              /* out: (n_rows, n_embd), the output of layer last-1, or NULL */
    const int32_t * positions;   /* (n_pos_per_row, n_rows) RoPE positions to run with, or NULL */
    int32_t n_pos_per_row;       /* 1, or 4 for M-RoPE */
    /* 1: the graph is a vision encoder's. A window with last < n_layer ends with its `hidden`, which must be given, instead of at an
     * attention. What a later layer or the graph's end reads of layers before `first` besides the hidden state (DeepStack) is
     * given or taken as the hidden states of further layers, ascending and below first - 1 (in) or last - 1 (out). */
    int32_t encoder;
    const int32_t * extra_layers;
    int32_t n_extra;             /* at most SE_MAX_EXTRA */
    const float * extra_inject;  /* (n_extra, n_rows, n_embd), or NULL */
    float * extra_hidden;        /* out: the same, or NULL */
    /* Source `source` of the node `source_node`, which another node has computed: replaced by source_in before the node runs, or taken as
     * source_out; then the graph ends there, and of what comes before nothing that depends on the input embeddings is computed. Nodes
     * up to it run one by one. */
    const char * source_node;    /* NULL: none */
    int32_t source;
    const void * source_in;
    void * source_out;
    size_t source_bytes;
    int64_t * cells;             /* out: (n_rows) KV cells that the rows were written to, or NULL */
    int32_t only_cells;          /* 1: a plain decode of which the result need say nothing. No node is looked at once the cells are known */
    /* Attention: these layers (ascending), these query rows. The layer of an attention operation is the one after the
     * last layer output. Where the graph names none (encoders) the operations are counted. */
    const int32_t * attn_layers;
    int32_t n_attn_layers;
    int32_t row_first, row_count, row_step; /* row_count < 0: up to the end */
    int32_t reduce;
    int32_t n_threads;
    float * attn;                /* out: one block of attn_block floats for each layer */
    int64_t attn_block;
    int32_t * attn_n_kv;         /* out: columns of each layer's scores, or NULL */
    /* Rows that leave a vision encoder's running graph (shrink.h): of the hidden state that enters encoder layer keep_layer, the rows
     * `keep` (n_keep, each once) go on, in that order. A window may begin there: the rows are then those of `inject`. Attention of this
     * layer and later ones is that of the rows that stay. NULL: none leave.
     * With count_only this is a rehearsal: nothing is computed, and the result says whether it can be done, and with what:
     * keep_node and n_nodes are the result's, of a rehearsal with as many rows. */
    const int32_t * keep;
    int32_t n_keep, keep_layer;
    int32_t keep_node, n_nodes;
    /* Whether a graph input looks like a known one: `sample` (SE_SAMPLE_BYTES) gets a sample of the input of that name when its first
     * consumer is asked about. If it is one of `known` (n_known, SE_SAMPLE_BYTES), nothing is computed from there on, as with count_only,
     * and se_result.known says which. For plans without a window, rows that leave and a source. NULL: no input is looked at. */
    const char * compare_input;
    const uint8_t * known;
    int32_t n_known;
    uint8_t * sample;
} se_plan;

typedef struct {
    int32_t error;               /* enum se_error of the first thing that went wrong inside the callback */
    int32_t n_attention;         /* attention operations seen */
    int32_t n_graphs;            /* graphs seen since se_tap_arm */
    int32_t n_skipped;           /* nodes that were skipped */
    int32_t stopped;             /* 1: the graph was ended early */
    int32_t flash;               /* 1: attention is flash attention */
    int32_t attn_rows, attn_heads; /* query rows and heads of the scores that were read */
    int32_t last_unmasked;       /* index of the last attention operation without a mask, or -1 */
    int32_t rope;                /* 1: a ROPE of the batch's positions was seen */
    uint64_t attention_layers[16]; /* SE_MAX_LAYERS bits: one for each layer whose attention was seen */
    int32_t concat;              /* enum se_concat: where the leaf of se_tap_find_concat stands */
    int32_t n_nodes;             /* nodes of the graph that were seen */
    int32_t keep_node;           /* which of them, from 1 on, rows left at; 0: none */
    int32_t n_rows;              /* rows of the hidden state there, before */
    int32_t n_out;               /* rows of the last node, with the rows that stay */
    int32_t sampled;             /* 1: the plan's compare_input was seen */
    int32_t known;               /* which of the plan's known samples it has, from 1 on; 0: none */
    double score_seconds;        /* time spent in the score kernels, reading q and k included */
} se_result;

/* What a tap cost the backend, since the last se_tap_take_traffic. An idle tap counts nothing. */
typedef struct {
    int64_t n_asked;             /* nodes that it was asked about while it was at work */
    int64_t n_stops;             /* nodes that it said yes to: all up to there is computed and waited for, and the callback is called again */
    int64_t n_reads, n_writes;   /* of tensors' memory. On a GPU each is a copy that is waited for; the host's own memory may be read in place */
    int64_t read_bytes, written_bytes;
} se_traffic;

se_tap * se_tap_new(void);
void se_tap_free(se_tap * tap);
uintptr_t se_tap_callback_address(void); /* a ggml_backend_sched_eval_callback; its user_data is the se_tap */
bool se_tap_callback(struct ggml_tensor * tensor, bool ask, void * tap);

/* Before one llama_decode of at most n_ubatch rows, or one encode. Checks the plan; on an error nothing is armed. */
int se_tap_arm(se_tap * tap, const se_plan * plan);
/* After it, whatever it returned: restores every flag, disarms, and says what happened. */
int se_tap_finish(se_tap * tap, se_result * result);

/* Lasting settings, for plain decodes between windows (generation). */
/* What the graph calls the output of a layer, without "-N"; NULL: "l_out". */
int se_tap_set_layer_out(se_tap * tap, const char * name);
/* RoPE positions >= from get `offset` added (M-RoPE: in the first three sections). offset 0: off. */
int se_tap_set_position_shift(se_tap * tap, int32_t from, int32_t offset);
/* bias (n_cells) is added to the attention mask, column by column: exp(bias) is how much a cell counts. NULL: off. Copied. */
int se_tap_set_cell_bias(se_tap * tap, const float * bias, int32_t n_cells);
/* What rows of plain decodes see of a prompt, by layer: from layers[i] on (ascending, the first 0; n_levels of them), up to
 * layers[i + 1], column c of the attention mask is bias[i * n_cells + c] wherever it may be seen, and -inf hides it there.
 * witness (n_cells): c may be seen where the column witness[c] may (a cell that llama.cpp itself hides, because it is in no
 * sequence of the rows); -1: where llama.cpp's own mask lets it. It stands for the cell bias while it is set. n_levels 0: off. Copied. */
int se_tap_set_levels(se_tap * tap, const int32_t * layers, int32_t n_levels, const float * bias, const int32_t * witness, int32_t n_cells);
/* Bytes that replace a graph input of that name before its first consumer runs. data NULL: off. Copied. */
int se_tap_set_input(se_tap * tap, const char * name, const void * data, size_t n_bytes);
/* Find out at which end of a CONCAT this leaf stands: se_result.concat, known when the whole graph has gone by. NULL: off. */
int se_tap_find_concat(se_tap * tap, const char * leaf);
/* Copy a graph input of that name out while the graph runs; se_tap_watched_bytes says how many bytes came, 0 if it was not seen. NULL: off. */
int se_tap_watch_input(se_tap * tap, const char * name, void * out, size_t capacity);
size_t se_tap_watched_bytes(const se_tap * tap);
/* What went wrong in plain decodes since the last call (a shift, a bias or an input that could not be applied), and forget it. */
int se_tap_take_error(se_tap * tap);
/* The traffic since the last call, and forget it. */
void se_tap_take_traffic(se_tap * tap, se_traffic * traffic);
/* Called before every plain decode: a new graph begins, in which position shift and cell bias are due. */
void se_tap_begin(se_tap * tap);

#endif
