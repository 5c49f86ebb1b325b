"""What is taken for granted of llama_cpp's Llama: private parts, how a prompt is handed over, what it raises."""

import inspect

import llama_cpp
import numpy as np
import pytest
from helpers import stock
from llama_cpp import Llama, LogitsProcessorList, StoppingCriteriaList, _internals
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, guess_chat_format_from_gguf_metadata
from llama_cpp.llama_grammar import LlamaGrammar

PROMPT = list(range(260, 270))


@pytest.fixture
def llama(families):
    llama = stock.load(families["llama"].text, False, n_threads=1)
    yield llama
    llama.close()


class Calls:
    """What is called on the context of a Llama, in order."""

    def __init__(self, llama, *names):
        self.names = []
        for name in names:
            setattr(llama._ctx, name, self._noting(name, getattr(llama._ctx, name)))

    def _noting(self, name, function):
        def call(*args):
            self.names.append(name)
            return function(*args)

        return call


# ---- private parts ----


def test_llama_has_its_context_model_exit_stack_and_lora_adapter_under_these_names(llama):
    assert isinstance(llama._ctx, _internals.LlamaContext) and isinstance(llama._model, _internals.LlamaModel)
    assert callable(llama._stack.callback) and llama._lora_adapter is None and llama.lora_scale == 1.0
    assert llama._logits_all is False and llama._n_ctx == llama.n_ctx()
    assert llama.ctx == llama._ctx.ctx and llama.model == llama._model.model and llama._model.vocab


def test_llama_has_the_parameters_of_its_context_and_model_as_structures(llama):
    assert isinstance(llama.context_params, llama_cpp.llama_context_params)
    assert isinstance(llama.model_params, llama_cpp.llama_model_params)
    assert llama.n_threads_batch == 1 and llama.metadata["general.architecture"] == "llama"


def test_llama_context_takes_model_params_and_verbose_and_can_stand_for_the_one_of_a_llama(llama):
    expected = llama(PROMPT, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    old, params = llama._ctx, llama.context_params
    llama._ctx = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
    old.close()
    llama.reset()
    assert llama(PROMPT, max_tokens=4, temperature=0.0)["choices"][0]["text"] == expected


def test_closing_a_context_twice_is_harmless_and_its_ctx_is_none_then(llama):
    llama._ctx.close()
    llama._ctx.close()
    assert llama._ctx.ctx is None


def test_a_closed_llama_has_no_model(families):
    llama = stock.load(families["llama"].text, False, n_threads=1)
    llama.close()
    assert llama._model.model is None


def test_a_context_has_the_methods_that_are_overridden(llama):
    expected = {
        "kv_cache_clear": [],
        "kv_cache_seq_rm": ["seq_id", "p0", "p1"],
        "kv_cache_seq_cp": ["seq_id_src", "seq_id_dst", "p0", "p1"],
        "kv_cache_seq_keep": ["seq_id"],
        "kv_cache_seq_shift": ["seq_id", "p0", "p1", "shift"],
        "decode": ["batch"],
        "close": [],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(llama._ctx, name)).parameters) == parameters, name
    assert llama._ctx.memory is not None and llama._batch.n_tokens() == 0


# ---- how the cache is used ----


def test_eval_cuts_the_cache_through_the_context_before_it_decodes(llama):
    calls = Calls(llama, "kv_cache_seq_rm", "kv_cache_clear", "decode")
    llama.eval(PROMPT)
    assert calls.names == ["kv_cache_seq_rm", "decode"]


def test_embed_clears_the_cache_through_the_context(families):
    llama = Llama(str(families["llama"].text), embedding=True, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    calls = Calls(llama, "kv_cache_clear", "decode")
    llama.embed("hello")
    llama.close()
    assert calls.names[0] == "kv_cache_clear" and "decode" in calls.names


def test_reset_forgets_the_prompt_without_touching_the_cache(llama):
    llama.eval(PROMPT)
    calls = Calls(llama, "kv_cache_seq_rm", "kv_cache_clear")
    llama.reset()
    assert llama.n_tokens == 0 and llama._requires_eval is True and calls.names == []


def test_load_state_replaces_input_ids(llama):
    llama.eval(PROMPT)
    before, state = llama.input_ids, llama.save_state()
    llama.load_state(state)
    assert llama.input_ids is not before and llama.input_ids[: llama.n_tokens].tolist() == PROMPT


# ---- the hand-over ----


def handed_over(llama, prompt):
    """The state of a prompt that something else has decoded, as star_edge hands it over; its logits."""
    logits = stock.decode(llama, tokens=prompt, positions=np.arange(len(prompt)))
    llama.input_ids[: len(prompt)] = prompt
    llama.n_tokens = len(prompt)
    llama._requires_eval = False
    return logits


def test_create_completion_samples_from_a_prompt_that_input_ids_n_tokens_and_requires_eval_call_read(llama):
    expected = llama(PROMPT, max_tokens=1, temperature=0.0)["choices"][0]["text"]
    llama.reset()
    stock.clear(llama)
    logits = handed_over(llama, PROMPT)
    calls = Calls(llama, "decode", "kv_cache_clear")
    tokens = []
    for token in llama.generate(PROMPT, temp=0.0, reset=True):
        tokens.append(token)
        break
    assert calls.names == [] and tokens == [int(logits.argmax())]
    assert llama.detokenize(tokens).decode("utf-8", "ignore") in (expected, "")


def test_a_prompt_that_requires_evaluation_has_its_last_token_decoded_again(llama):
    handed_over(llama, PROMPT)
    llama._requires_eval = True
    calls = Calls(llama, "decode")
    next(llama.generate(PROMPT, temp=0.0))
    assert calls.names == ["decode"]


def test_the_first_token_is_compared_with_input_ids_alone(llama):
    """So any id may stand where an image's token is."""
    handed_over(llama, [0] * 5 + PROMPT[:5])
    calls = Calls(llama, "decode")
    next(llama.generate([0] * 5 + PROMPT[:5], temp=0.0))
    assert calls.names == []


def test_logprobs_of_the_first_token_are_taken_from_the_row_of_scores_before_it(families):
    llama = stock.load(families["llama"].text, False, n_threads=1, logits_all=True)
    llama.scores[:] = 0
    handed_over(llama, PROMPT)
    llama.scores[len(PROMPT) - 1] = 0
    llama.scores[len(PROMPT) - 1, 300] = 50.0
    out = llama.create_completion(PROMPT, max_tokens=1, temperature=0.0, logprobs=1)
    llama.close()
    top = out["choices"][0]["logprobs"]["top_logprobs"]
    assert max(top[0].values()) == pytest.approx(0.0, abs=1e-3)


# ---- sampling ----


def test_a_grammar_stands_after_logits_processors_and_penalties_in_the_sampler(llama):
    processors = LogitsProcessorList([lambda ids, scores: scores])
    plain, full = (
        llama._init_sampler(logits_processor=processors, temp=0.5, grammar=grammar)
        for grammar in (None, LlamaGrammar.from_string('root ::= "a"', verbose=False))
    )
    n = llama_cpp.llama_sampler_chain_n
    assert n(full.sampler) == n(plain.sampler) + 1 and len(plain.custom_samplers) == 1
    name = lambda sampler, i: llama_cpp.llama_sampler_name(llama_cpp.llama_sampler_chain_get(sampler.sampler, i))
    assert name(full, 1).endswith(b"penalties") and name(full, 2) == b"grammar"  # "?penalties": none are set
    plain.close()
    full.close()


def test_a_sampler_is_asked_with_the_context_and_an_index(llama):
    assert list(inspect.signature(_internals.LlamaSampler.sample).parameters)[1:3] == ["ctx", "idx"]
    assert "sampler" in vars(llama._init_sampler()) and "_exit_stack" in vars(llama._init_sampler())


def test_a_custom_sampler_has_its_interface_in_sampler_iface(llama):
    custom = _internals.CustomSampler(lambda candidates: None)
    assert custom.sampler.iface.contents.apply and custom.get_sampler()


def test_token_data_are_an_id_a_logit_and_a_probability_of_4_bytes_each():
    assert [name for name, _ in llama_cpp.llama_token_data._fields_] == ["id", "logit", "p"]
    assert [getattr(llama_cpp.llama_token_data, name).offset for name in ("id", "logit", "p")] == [0, 4, 8]


def test_a_grammar_has_its_text_and_root_under_these_names():
    grammar = LlamaGrammar.from_string('root ::= "a"', verbose=False)
    assert grammar._root == "root" and grammar._grammar == 'root ::= "a"'


def test_generate_takes_its_tokens_from_self_sample(llama):
    """Where the benchmark puts its clock."""
    times = []
    sample = llama.sample
    llama.sample = lambda **options: times.append(1) or sample(**options)
    llama(PROMPT, max_tokens=3, temperature=0.0)
    assert len(times) >= 1


def test_stopping_criteria_get_the_tokens_and_the_logits(llama):
    seen = []
    stop = lambda ids, logits: bool(seen.append((len(ids), len(logits)))) or True
    llama(PROMPT, max_tokens=3, temperature=0.0, stopping_criteria=StoppingCriteriaList([stop]))
    assert seen and seen[0][1] == llama.n_vocab()


# ---- what it raises ----


def test_a_context_that_cannot_be_made_is_a_value_error_with_context_in_its_text(llama):
    """And a model that cannot be loaded is one without."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_ctx, params.n_batch, params.n_ubatch = 256, 0, 0
    params.n_seq_max = 100_000  # more than LLAMA_MAX_SEQ
    with pytest.raises(ValueError, match="context"):
        _internals.LlamaContext(model=llama._model, params=params, verbose=False)


def test_a_model_that_cannot_be_loaded_is_a_value_error_without_context_in_its_text(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError) as caught:
        Llama(str(tmp_path / "model.gguf"), verbose=False)
    assert "context" not in str(caught.value)


# ---- chat templates ----


def test_jinja2_chat_formatter_renders_with_the_tokens_that_it_is_given():
    formatter = Jinja2ChatFormatter(
        template="{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}{{ eos_token }}"
        "{% if add_generation_prompt %}>{% endif %}{{ extra }}",
        eos_token="</s>",
        bos_token="",
    )
    out = formatter(messages=[{"role": "user", "content": "hi"}], extra="!")
    assert out.prompt == "[user] hi</s>>!"


def test_a_chat_format_that_is_guessed_is_one_of_four():
    from star_edge.llamacpp.handover import _GUESSED

    with_templates = inspect.getsource(guess_chat_format_from_gguf_metadata)
    assert all(f'"{name}"' in with_templates for name in _GUESSED if name != "llama-2")


def test_llama_cpp_lists_its_own_templates_by_name():
    from star_edge.chat import _OF_FAMILY
    from star_edge.llamacpp.vocabulary import template_names

    assert set(_OF_FAMILY.values()) <= set(template_names())


def test_a_vocabulary_gives_the_text_of_a_token_as_bytes(llama):
    assert isinstance(llama_cpp.llama_vocab_get_text(llama._model.vocab, 260), bytes)
    assert llama_cpp.llama_vocab_is_eog(llama._model.vocab, llama.token_eos())
