"""The sides of a benchmark: stock llama-cpp-python in several settings, and star_edge with several configs.

All sides answer through `Llama.create_chat_completion`, as a user's program does, from an encoded picture to sampled
tokens. All share one model in memory: llama.cpp repacks weights, and two copies differ in speed by more than an idle
callback costs. Each side has its own context and chat handler. The stock sides run llama_cpp's MTMDChatHandler in a
context without a callback. They are watched from outside, through the module of libmtmd functions that it calls.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from os import PathLike
from typing import Any

from ..chat import ChatFormat
from ..chat_handler import StarChatHandler
from ..engine import StarVLM
from ..errors import ContextLengthError, EngineError, StarEdgeError
from ..llamacpp.gguf import read_gguf_info
from ..llamacpp.mtmd import MEDIA_MARKER
from ..llamacpp.stock import (
    Watched,
    context_of,
    install,
    is_end,
    sequence_bytes,
    stock_context,
    stock_handler,
)
from ..options import AFRESH, EncoderOptions, LoadOptions
from ..pruning.config import PruneConfig
from ..pruning.selection import average_tokens
from ..report import PruneReport
from ..vision.chunks import ImageChunk
from ..vision.encoder import VisionEncoder
from ..vision.profiles import METADATA_KEYS, find_profile

# In order of time. redundancy, encoder_stage, vision_stage and decoder_stage are scoring and choosing alone. prefill is
# all decoder work but probe and resume: everything on stock, and the text before the first image with a decoder stage.
# first_token is the rest of the time to the first token: sampling, and Python.
STAGES = (
    "preprocess",
    "redundancy",
    "encode",
    "encoder_stage",
    "vision_stage",
    "prefill",
    "probe",
    "decoder_stage",
    "resume",
    "first_token",
)
DECODER_STAGES = ("prefill", "probe", "decoder_stage", "resume")


@dataclass(frozen=True)
class Request:
    """What every side is asked.

    Attributes:
        messages: As `Llama.create_chat_completion` takes them.
        fewer: The same with smaller pictures, for each share of the tokens that stock is asked with.
    """

    messages: list[Any]
    fewer: list[list[Any]]


@dataclass(frozen=True)
class SideSpec:
    """A side to measure.

    Attributes:
        name: Unique name.
        kind: "stock" or "star_edge".
        prune: Config of a star_edge side.
        flash_attn: Flash attention of a stock side, in decoder and encoder.
        image_max_tokens: For a stock side that asks with smaller pictures, otherwise None.
        fewer: Its index into `Request.fewer`.
        converted: A stock side with the converted mmproj file that the star_edge sides have.
    """

    name: str
    kind: str
    prune: PruneConfig | None = None
    flash_attn: bool = True
    image_max_tokens: int | None = None
    fewer: int = 0
    converted: bool = False


@dataclass
class Sample:
    """One request. Times are in seconds.

    Attributes:
        first_token: From the call to the first sampled token.
        stages: Time of each of STAGES; they add up to first_token.
        tokens: Time of each further token.
        n_text: Text tokens of the prompt.
        n_image: Image tokens before pruning.
        n_cells: KV cells that hold the prompt when generation starts.
        average_tokens: Image tokens per decoder layer.
        cache_bytes: Bytes of those cells in all layers, as llama.cpp counts them to save the sequence. Only taken if
            one token was asked for, so that it costs no time elsewhere.
        text: The answer.
        report: The report of a star_edge side.
    """

    first_token: float
    stages: dict[str, float]
    tokens: list[float]
    n_text: int
    n_image: int
    n_cells: int
    average_tokens: float
    cache_bytes: int | None
    text: str
    report: PruneReport | None = None


@dataclass
class _Side:
    spec: SideSpec
    context: Any
    context_params: Any
    handler: Any
    watch: Watched | None = None


@dataclass
class _Clock:
    """Replaces Llama.sample: records when each token is there, and lets no answer end early.

    cache_of: a context whose cache size to take at the first token, when only the prompt is in it. None: none.
    """

    sample: Any
    llama: Any
    other: int
    cache_of: Any
    times: list[float] = field(default_factory=list)
    cache_bytes: int | None = None

    def __call__(self, **options: Any) -> int:
        token = self.sample(**options)
        self.times.append(time.perf_counter())
        if self.cache_of is not None and self.cache_bytes is None:
            self.cache_bytes = sequence_bytes(self.cache_of)
        return self.other if is_end(self.llama, token) else token


class Workbench:
    """One model in memory, and its sides, which are made when they are first asked.

    Args:
        model: The text model.
        mmproj: Its mmproj file.
        **options: Arguments of StarVLM. flash_attn is that of the star_edge sides.

    Raises:
        StarEdgeError: As StarVLM.
        EngineError: A side's context cannot be made.
    """

    def __init__(self, model: str | PathLike[str], mmproj: str | PathLike[str], **options: Any) -> None:
        self._vlm = StarVLM(model, None, **options)  # loads and checks; StarChatHandler adds the encoder
        self.llama = self._vlm.llama
        projector = find_profile(read_gguf_info(mmproj, METADATA_KEYS).values)[0]
        chat = ChatFormat(self.llama, options.get("chat_template"), projector)
        if chat.exists:  # where MTMDChatHandler looks for it
            self.llama.metadata["tokenizer.chat_template"] = chat.one_turn()
        self.n_layers = self._vlm.decoder.n_layers
        self.n_ctx = self._vlm.decoder.n_ctx
        self._mmproj, self._use_gpu = str(mmproj), LoadOptions.take(dict(options)).uses_gpu
        self._of_encoder = EncoderOptions.take(dict(options))
        self._tapped = context_of(self.llama)
        self._params = self.llama.context_params
        self._star: StarChatHandler | None = None
        self._sides: dict[SideSpec, _Side] = {}
        self._other = self.llama.tokenize(b"a", add_bos=False)[-1]

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        install(self.llama, self._tapped, self._params)
        self._vlm.close()

    # ---- requests ----

    def ask(self, spec: SideSpec, request: Request, n_generate: int) -> Sample:
        """Asks for one greedy answer of n_generate tokens. Nothing comes from an earlier request.

        Raises:
            ContextLengthError: Prompt and answer do not fit the context.
            EngineError: llama.cpp failed, or could not make the side's context.
            StarEdgeError: As StarChatHandler: the model or the pictures cannot be used.
        """
        side = self._side(spec)
        llama = self.llama
        install(llama, side.context, side.context_params)
        clock = _Clock(llama.sample, llama, self._other, side.context if n_generate == 1 else None)
        watch = side.watch
        if watch is not None:
            watch.begin()
        llama.chat_handler = side.handler
        llama.sample = clock  # type: ignore[assignment, method-assign]  # a clock in its place, for this answer
        messages = request.messages if spec.image_max_tokens is None else request.fewer[spec.fewer]
        pruning = self._star.pruning(spec.prune) if watch is None and self._star else contextlib.nullcontext()
        try:
            start = time.perf_counter()
            with pruning:
                answer: Any = llama.create_chat_completion(
                    messages, max_tokens=n_generate, temperature=0.0, repeat_penalty=1.0
                )
        except StarEdgeError:
            raise
        except (ValueError, RuntimeError, AssertionError) as error:
            raise EngineError(f"llama-cpp-python failed ({error})", "see its log with --verbose") from error
        finally:
            del llama.sample
            llama.chat_handler = None
        sample = self._sample(start, clock, watch, answer["choices"][0]["message"]["content"])
        if len(clock.times) < n_generate:
            raise ContextLengthError(
                f"a prompt of {sample.n_text + sample.n_image} tokens leaves no room for {n_generate} more in a "
                f"context of {self.n_ctx}",
                "raise n_ctx (-c), or generate fewer tokens (-n)",
            )
        return sample

    def count_image_tokens(self, request: Request) -> tuple[int, int]:
        """Number of the request's image tokens, and of its pictures.

        Raises:
            StarEdgeError: As StarChatHandler, for the model and the pictures.
        """
        handler = self._side(SideSpec("count", "star_edge")).handler
        handler.attach(self.llama)
        pictures = [handler.load_image(url) for url in handler.get_image_urls(request.messages)]
        prompt = handler.reader.encoder.tokenize(MEDIA_MARKER * len(pictures), pictures)
        try:
            return sum(c.n_tokens for c in prompt.chunks if isinstance(c, ImageChunk)), len(pictures)
        finally:
            prompt.close()

    def context(self, spec: SideSpec) -> Any:
        """The llama_cpp context of a side (`_internals.LlamaContext`)."""
        return self._side(spec).context

    def encoder_problem(self) -> str | None:
        """What the vision stage cannot do with this encoder, once a star_edge side has been asked."""
        encoder = self._encoder
        if encoder is None or encoder.profile.reads_attention:
            return None
        return f"by embeddings only: projector type {encoder.projector!r} {encoder.profile.why_embeddings}"

    @property
    def projector(self) -> str | None:
        encoder = self._encoder
        return None if encoder is None else encoder.projector

    @property
    def encoder_type(self) -> str | None:
        """The type that the encoder of the star_edge sides computes in."""
        encoder = self._encoder
        return None if encoder is None else encoder.precision.kind

    @property
    def converted(self) -> str | None:
        """The converted mmproj file of the star_edge sides, once one has been asked. None: there is none."""
        encoder = self._encoder
        return encoder.file if encoder is not None and encoder.precision.is_converted else None

    @property
    def _encoder(self) -> VisionEncoder | None:
        """Of the star_edge sides, once one has been asked."""
        reader = self._star._reader if self._star is not None else None
        return None if reader is None else reader.encoder

    def _sample(self, start: float, clock: _Clock, watch: Watched | None, text: str) -> Sample:
        times = clock.times
        total = times[0] - start
        tokens = [after - before for before, after in pairwise(times)]
        if watch is not None:
            stages = {
                "preprocess": watch.tokenized - start,
                "encode": watch.encode,
                "prefill": watch.decoded - watch.tokenized - watch.encode,
            }
            n = watch.n_text + watch.n_image
            return Sample(
                total,
                _with_rest(stages, total),
                tokens,
                watch.n_text,
                watch.n_image,
                n,
                float(watch.n_image),
                clock.cache_bytes,
                text,
            )
        assert self._star is not None and self._star.last_report is not None  # which has answered
        report = self._star.last_report
        average = average_tokens(report.n_vision_kept, report.windows, report.n_layers)
        return Sample(
            total,
            _with_rest(stages_of(report), total),
            tokens,
            report.n_text_tokens,
            report.n_image_tokens,
            report.n_kv_cells,
            average,
            clock.cache_bytes,
            text,
            report,
        )

    # ---- sides ----

    def _side(self, spec: SideSpec) -> _Side:
        if spec not in self._sides:
            self._sides[spec] = self._stock_side(spec) if spec.kind == "stock" else self._star_side(spec)
        return self._sides[spec]

    def _star_side(self, spec: SideSpec) -> _Side:
        if self._star is None:
            self._star = StarChatHandler(
                self._mmproj, False, self._use_gpu, prune=None, **asdict(self._of_encoder), **AFRESH
            )
        return _Side(spec, self._tapped, self._params, self._star)

    def _stock_side(self, spec: SideSpec) -> _Side:
        context, params = stock_context(self.llama, self._params, spec.flash_attn)
        watch = Watched(spec.image_max_tokens, self.n_ctx)
        mmproj = self.converted if spec.converted else self._mmproj
        if mmproj is None:
            raise EngineError("the mmproj file is not converted", "add --mmproj-type, or leave the side out")
        return _Side(spec, context, params, stock_handler(mmproj, self._use_gpu, watch), watch)


# Steps of a report in each of STAGES
_STEPS = {
    "preprocess": ("preprocess",),
    "redundancy": ("redundancy",),
    "encode": ("encode",),
    "encoder_stage": ("encoder_stage",),
    "vision_stage": ("vision_stage",),
    "prefill": ("prefix", "prefill", "fallback"),
    "probe": ("probe",),
    "decoder_stage": ("look_ahead", "decoder_scores", "decoder_stage"),
    "resume": ("resume",),
}


def stages_of(report: PruneReport) -> dict[str, float]:
    """Seconds of a report's steps, by the names of STAGES."""
    return {stage: sum(report.milliseconds.get(s, 0.0) for s in steps) / 1e3 for stage, steps in _STEPS.items()}


def _with_rest(stages: dict[str, float], total: float) -> dict[str, float]:
    complete = {name: stages.get(name, 0.0) for name in STAGES}
    complete["first_token"] = total - sum(complete.values())
    return complete
