"""A `Llama` in which no argument of a request, and no callback, can end the process.

StarVLM, StarChatHandler and llama_cpp's server all sample through `Llama.create_completion`. The guards are a subclass
that overrides it; an existing Llama becomes an instance of that subclass. Sampling stays llama_cpp's.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import llama_cpp
import numpy as np
from llama_cpp import Llama, LlamaState, LogitsProcessorList, StoppingCriteriaList, _internals
from llama_cpp.llama_grammar import LlamaGrammar

from ..arguments import Range, check, parameters
from ..errors import ConfigError, ContextLengthError, EngineClosedError, EngineError
from .context import tapped
from .grammar import check_grammar

if TYPE_CHECKING:
    _Mixin = Llama  # what _Guards is mixed into
else:
    _Mixin = object

_CREATE_COMPLETION = inspect.signature(Llama.create_completion)
_INT32 = 2**31 - 1
# What the annotations of Llama.create_completion cannot say. A range without a comment is what llama.cpp takes; most
# numbers are C floats there.
RANGES: Mapping[str, Range] = {
    "max_tokens": Range(-1, _INT32),  # 0 and less: until the context is full
    "temperature": Range(0, 1e6),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1),
    "top_k": Range(-1, _INT32),  # 0 and less: all
    "tfs_z": Range(1, 1),  # llama.cpp no longer has this sampler, and llama_cpp ignores the argument
    "frequency_penalty": Range(-1e6, 1e6),
    "presence_penalty": Range(-1e6, 1e6),
    "repeat_penalty": Range(0, 1e6, above=True),
    "mirostat_mode": Range(0, 2),
    "mirostat_tau": Range(0, 1e6),
    "mirostat_eta": Range(0, 1e6),
    "seed": Range(-(2**63), 2**64 - 1),  # its low 32 bits
    "logprobs": Range(0, _INT32),
    "top_logprobs": Range(0, _INT32),
}
MAX_STOPS = 1000  # each is looked for after every token


def check_options(llama: Llama, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks arguments of Llama.create_completion, and converts them to its annotations. Ignores other names.

    Raises:
        ConfigError: An argument cannot be used, such as a grammar.
    """
    options = dict(options)
    if isinstance(options.get("logits_processor"), (list, tuple)):
        options["logits_processor"] = LogitsProcessorList(options["logits_processor"])
    if isinstance(options.get("stopping_criteria"), (list, tuple)):
        options["stopping_criteria"] = StoppingCriteriaList(options["stopping_criteria"])
    if isinstance(options.get("logit_bias"), Mapping):  # OpenAI's keys are strings, as JSON's are

        def number(key: Any) -> Any:
            return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key

        options["logit_bias"] = {number(key): value for key, value in options["logit_bias"].items()}
    bias = options.pop("logit_bias", None)
    options = check(Llama.create_completion, options, RANGES)
    if bias is not None:
        options["logit_bias"] = _check_bias(bias, llama.n_vocab())
    for name in ("logits_processor", "stopping_criteria"):
        for function in options.get(name) or ():
            if not callable(function):
                raise ConfigError(f"{name} holds a {type(function).__name__}", "give functions")
    if options.get("stop") is not None:
        options["stop"] = _check_stops(options["stop"])
    if options.get("logprobs") is not None and not llama._logits_all:
        raise ConfigError("logprobs were asked for, and the Llama keeps none", "make it with logits_all=True")
    if options.get("grammar") is not None:
        check_llama_grammar(llama, options["grammar"])
    return options


def _check_bias(bias: Any, n_vocab: int) -> dict[int, float]:
    bias = check(Llama.create_completion, {"logit_bias": bias})["logit_bias"]
    for token, value in bias.items():
        if not 0 <= token < n_vocab:
            raise ConfigError(f"logit_bias has token {token}", f"the model has tokens 0 to {n_vocab - 1}")
        if value not in Range(-np.inf, 1e6, infinite=True) or value == np.inf:
            raise ConfigError(f"logit_bias has {value} for token {token}", "use a number, or -inf to forbid the token")
    checked: dict[int, float] = bias
    return checked


def _check_stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"stop has {len(stops)} texts", f"use {MAX_STOPS} at most")
    for text in stops:
        if not text:
            raise ConfigError("stop has an empty text, which every answer begins with", "leave it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                "stop has characters that are not text (surrogates)", "decode its bytes as UTF-8 first"
            ) from None
    return stops


def check_llama_grammar(llama: Llama, grammar: LlamaGrammar) -> None:
    """Checks a grammar.

    Raises:
        ConfigError: llama.cpp could not take it (star_edge.llamacpp.grammar).
    """
    if not isinstance(grammar, LlamaGrammar):
        raise ConfigError(f"the grammar is a {type(grammar).__name__}", "use llama_cpp.LlamaGrammar.from_string(text)")
    is_token = lambda text: len(llama.tokenize(text.encode(), add_bos=False, special=True)) == 1
    check_grammar(grammar._grammar, grammar._root, llama.n_vocab(), is_token)


def check_length(llama: Llama, text: str) -> None:
    """Refuses text that cannot fit into the context, by its bytes: tokenizing takes quadratic time.

    Raises:
        ContextLengthError: It has more bytes than n_ctx of the longest tokens.
    """
    n_bytes, n_ctx = len(text.encode("utf-8", "replace")), llama.n_ctx()
    if n_bytes <= n_ctx:
        return
    guards = cast(_Guards, llama)
    if not hasattr(llama, "_longest_token"):
        vocab = llama._model.vocab
        lengths = (len(llama_cpp.llama_vocab_get_text(vocab, token) or b"") for token in range(llama.n_vocab()))
        guards._longest_token = max(4, *lengths)  # an unknown character has up to 4 bytes
    if n_bytes > n_ctx * guards._longest_token:
        most = f"{n_ctx} tokens of {guards._longest_token} bytes"
        raise ContextLengthError(
            f"the prompt has {n_bytes} bytes, which are more than {most}", "shorten it, or raise n_ctx"
        )


@contextlib.contextmanager
def request_of(llama: Llama) -> Iterator[None]:
    """A request of the Llama. Its callbacks may neither close the Llama nor make another request.

    The caller holds the lock.

    Raises:
        EngineClosedError: A request is under way.
    """
    guards = cast(_Guards, llama)  # `guard` has made it one
    if guards._n_requests or guards._n_steps:
        raise EngineClosedError(
            "the engine is busy with a request, and a callback cannot interrupt it", "wait for its answer"
        )
    guards._n_requests += 1
    try:
        yield
    finally:
        guards._n_requests -= 1


def guard(llama: Llama) -> None:
    """Makes a Llama a guarded one, permanently."""
    if not isinstance(llama, _Guards):
        llama.__class__ = (
            GuardedLlama if type(llama) is Llama else type(f"Guarded{type(llama).__name__}", (_Guards, type(llama)), {})
        )


class _Limit(StoppingCriteriaList):
    """Ends an answer after max_tokens.

    llama_cpp looks at the count only when a character is complete, which may never happen.

    Attributes:
        reached: Whether it had to end the answer.
    """

    def __init__(self, criteria: StoppingCriteriaList | None, max_tokens: int | None) -> None:
        super().__init__(criteria or ())
        self.max_tokens = max_tokens if max_tokens is not None and max_tokens > 0 else None
        self.reached = False

    def __call__(self, input_ids: np.ndarray, logits: np.ndarray) -> bool:
        return self.reached or super().__call__(input_ids, logits)


class _Guards(_Mixin):
    """Mixed into the class of a Llama.

    Attributes:
        _n_requests: Requests that run at this moment.
        _n_steps: Steps of an answer that run at this moment.
        n_sampled: Tokens that were sampled since it was last set to 0. Each but the first took a decode.
        n_generated: Those of them that belong to an answer, as `usage` counts them, without the one that ends it (EOS).
        grammar_instead: While it is set, completions use it in place of the grammar that they are given.
    """

    _longest_token: int
    _n_requests = _n_steps = 0
    n_generated = n_sampled = 0
    grammar_instead: LlamaGrammar | None = None

    def close(self) -> None:
        """Frees the model.

        Raises:
            EngineClosedError: A request is using it, in this thread or in another.
        """
        if self._n_requests or self._n_steps:
            raise EngineClosedError(
                "the engine is busy with a request and cannot be closed", "wait for its answer, or leave its stream"
            )
        super().close()

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As in Llama.

        Raises:
            ConfigError: An argument cannot be used.
            ContextLengthError: The prompt is too long to tokenize.
            EngineClosedError: The Llama is closed.
        """
        if self._model.model is None:
            raise EngineClosedError("the Llama is closed", "make a new one")
        try:
            options = _CREATE_COMPLETION.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(
                f"create_completion: {error}", f"it takes {', '.join(parameters(Llama.create_completion))}"
            ) from None
        options.pop("self")
        if self.grammar_instead is not None:
            options["grammar"] = self.grammar_instead
        options = check_options(self, options)
        prompt = options["prompt"]
        if isinstance(prompt, str):
            check_length(self, prompt)
        elif any(not 0 <= token < self.n_vocab() for token in prompt[self._n_known(prompt) :]):
            raise ConfigError("the prompt has a token that the model does not have", f"use 0 to {self.n_vocab() - 1}")
        bias = options.pop("logit_bias", None)
        if bias:  # Llama._create_completion forgets both when it has a logits_processor as well
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), _Bias(bias)])
        limit = options["stopping_criteria"] = _Limit(options.get("stopping_criteria"), options.get("max_tokens", 16))
        result: Any = super().create_completion(**options)
        return _labelled(result, limit) if isinstance(result, dict) else _labelled_chunks(result, limit)

    def load_state(self, state: LlamaState) -> None:
        """As in Llama. Ends an unfinished request: the positions and masses of its prompt are not those of the state.

        Raises:
            EngineClosedError: The Llama is closed.
        """
        if self._model.model is None:
            raise EngineClosedError("the Llama is closed", "make a new one")
        tapped(self).forget_prompt()
        super().load_state(state)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        limit = kwargs.get("stopping_criteria")
        most: int | None = None
        if isinstance(limit, _Limit):
            most = self._n_ctx - len(tokens)
            most = most if limit.max_tokens is None else min(most, limit.max_tokens)
        inner, n = super().generate(tokens, *args, **kwargs), 0
        sent: Any = None
        try:
            while True:
                with self._step():
                    try:
                        token = inner.send(sent)
                    except StopIteration:
                        return
                self.n_sampled += 1
                ends = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
                if isinstance(limit, _Limit) and n == most and not ends:
                    # create_completion has as many as it wanted, and still asks for more
                    limit.reached = True
                    return
                n += 1
                self.n_generated += not ends
                sent = yield token
        finally:
            inner.close()

    def _n_known(self, prompt: Sequence[int]) -> int:
        """Number of tokens at the start of a prompt that are in the cache and are not evaluated again.

        MTMDChatHandler writes no ids for image tokens, so anything may stand there.
        """
        known = self.input_ids[: min(self.n_tokens, len(prompt))]
        differs = np.flatnonzero(known != np.asarray(prompt[: len(known)], np.int64))
        return int(differs[0]) if len(differs) else len(known)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        if self._n_steps:
            raise EngineClosedError(
                "the engine is busy with a request, and a callback cannot interrupt it", "wait for its answer"
            )
        self._n_steps += 1
        try:
            yield
        finally:
            self._n_steps -= 1

    def _init_sampler(self, *args: Any, **kwargs: Any) -> _Sampler:
        options = inspect.signature(super()._init_sampler).bind(*args, **kwargs).arguments
        grammar, processors = options.pop("grammar", None), options.pop("logits_processor", None)
        failure = _Failure()
        if grammar is not None:
            check_llama_grammar(self, grammar)
        if processors:
            options["logits_processor"] = LogitsProcessorList([_Processors(processors, failure)])
        sampler = super()._init_sampler(**options)
        if grammar is not None:
            _add_grammar(sampler, self._model, grammar, failure)
        return _Sampler(sampler, failure, self._n_vocab)


class GuardedLlama(_Guards, Llama):
    """A Llama with guards: see `guard`."""


def _labelled(response: dict[str, Any], limit: _Limit) -> dict[str, Any]:
    if limit.reached and response["choices"][0]["finish_reason"] is not None:
        response["choices"][0]["finish_reason"] = "length"  # Llama._create_completion says "stop" for every criterion
    return response


def _labelled_chunks(chunks: Any, limit: _Limit) -> Iterator[dict[str, Any]]:
    try:
        for chunk in chunks:
            yield _labelled(chunk, limit)
    finally:
        chunks.close()  # a generator's


class _Failure:
    """The error of a callback from C. The callback itself cannot raise it."""

    error: BaseException | None = None


class _Bias:
    """logit_bias as a logits processor."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._values = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        biased = np.copy(scores)
        biased[self._tokens] += self._values
        return biased


class _Processors:
    """Logits processors whose exceptions come out of `_Sampler.sample`."""

    def __init__(self, processors: Sequence[Callable[..., Any]], failure: _Failure) -> None:
        self._processors, self._failure = processors, failure

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        try:
            for processor in self._processors:
                changed = processor(input_ids, scores)
                try:
                    scores[:] = changed
                except (TypeError, ValueError):
                    raise ConfigError(
                        f"a logits_processor returned a {type(changed).__name__}, not {len(scores)} numbers",
                        "return one number for each token",
                    ) from None
            if np.isnan(scores).any():  # llama.cpp sorts them, and NaN can make its sort read out of bounds
                raise ConfigError("a logits_processor returned NaN", "return a number for each token, or -inf")
            if not (scores > -np.inf).any():
                raise ConfigError("logit_bias or a logits_processor leaves no token", "leave at least one above -inf")
        except BaseException as error:  # KeyboardInterrupt as well
            self._failure.error = error
            scores[:] = 0.0  # values that the samplers after it can handle
        return scores


class _Sampler:
    """A LlamaSampler that raises errors from inside it."""

    def __init__(self, sampler: _internals.LlamaSampler, failure: _Failure, n_vocab: int) -> None:
        self._sampler, self._failure, self._n_vocab = sampler, failure, n_vocab

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, ctx: _internals.LlamaContext, idx: int = -1) -> int:
        logits = llama_cpp.llama_get_logits_ith(ctx.ctx, idx)
        if not logits:
            raise EngineError("llama.cpp has no logits to sample from")
        if np.isnan(np.ctypeslib.as_array(logits, (self._n_vocab,))).any():
            raise EngineError(
                "the model computes logits that are not numbers (NaN)", "check its files: they may be damaged"
            )
        token = self._sampler.sample(ctx, idx)
        if self._failure.error is not None:
            raise self._failure.error
        return token


class _GrammarSampler(_internals.CustomSampler):
    """llama.cpp's grammar sampler, with a check before a token is accepted.

    If the grammar allows no token, one is sampled anyway, and llama_grammar_accept_impl would end the process.
    """

    def __init__(self, grammar: llama_cpp.llama_sampler_p, n_vocab: int, failure: _Failure) -> None:
        self._grammar, self._failure = grammar, failure
        self._allowed = np.zeros(n_vocab, bool)
        super().__init__(self._apply)
        self._accept_reference = llama_cpp.llama_sampler_i_accept(self._accept)
        self.sampler.iface.contents.accept = self._accept_reference

    def _apply(self, candidates: Any) -> None:
        if self._failure.error is not None:
            return
        try:
            llama_cpp.llama_sampler_apply(self._grammar, candidates)
            array = candidates.contents
            data = np.ctypeslib.as_array(ctypes.cast(array.data, ctypes.POINTER(ctypes.c_uint32)), (array.size, 3))
            logits = data.view(np.float32)[:, 1]
            self._allowed[:] = False
            self._allowed[data[:, 0]] = logits > -np.inf
            if not self._allowed.any():
                self._failure.error = ConfigError(
                    "the grammar allows no token of the model here", "let it go on, or end, at every place"
                )
                logits[:] = 0.0
        except BaseException as error:
            self._failure.error = error

    def _accept(self, sampler: llama_cpp.llama_sampler_p, token: int) -> None:
        if self._failure.error is not None:
            return
        if not self._allowed[token]:
            self._failure.error = EngineError(f"token {token} was sampled against the grammar")
            return
        llama_cpp.llama_sampler_accept(self._grammar, token)


def _add_grammar(
    sampler: _internals.LlamaSampler, model: _internals.LlamaModel, grammar: LlamaGrammar, failure: _Failure
) -> None:
    """Puts the grammar where Llama._init_sampler does: after logits processors and penalties."""
    pointer = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
    if not pointer:
        raise ConfigError("llama.cpp cannot parse the grammar", "see llama.cpp's grammars/README.md")
    sampler._exit_stack.callback(llama_cpp.llama_sampler_free, pointer)
    chain, place = sampler.sampler, len(sampler.custom_samplers) + 1
    after = [
        llama_cpp.llama_sampler_chain_remove(chain, place)
        for _ in range(llama_cpp.llama_sampler_chain_n(chain) - place)
    ]
    custom = _GrammarSampler(pointer, model.n_vocab(), failure)
    sampler.custom_samplers.append((place, custom))
    for each in (custom.get_sampler(), *after):
        llama_cpp.llama_sampler_chain_add(chain, each)
