"""Options of a model: how it is loaded, how its encoder works, and what is kept from request to request.

Each is named, described and checked here. StarVLM, StarChatHandler, the server, the command and the benchmarks take
them by these names and pass them on.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, ClassVar, TypeVar

from .arguments import Range, check_value, parameters
from .errors import ConfigError, quoted
from .llamacpp.names import KV_TYPES
from .suggestions import use_one_of
from .vision.cache import DEFAULT_BYTES, check_bytes, check_directory
from .vision.precision import check_type
from .vision.repair import check_encoder

_INT32 = 2**31 - 1
_Class = TypeVar("_Class", bound=type)
_Group = TypeVar("_Group", bound="_Options")


class _Options:
    """What the groups share: values have the types of their annotations, and are within `ranges`."""

    ranges: ClassVar[Mapping[str, Range]] = {}
    own_checks: ClassVar[tuple[str, ...]] = ()  # fields whose values `check` looks at

    def __post_init__(self) -> None:
        known = parameters(type(self).__init__)
        for name in names_of(type(self)):
            if name not in self.own_checks:
                value = check_value(name, getattr(self, name), known[name], self.ranges.get(name))
                object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError where values do not go together."""

    @classmethod
    def take(cls: type[_Group], options: dict[str, Any]) -> _Group:
        """The group's own of some options, which are removed from them."""
        return cls(**{name: options.pop(name) for name in names_of(cls) if name in options})


@dataclass(frozen=True)
class LoadOptions(_Options):
    """How the text model is loaded.

    Attributes:
        n_ctx: Context in tokens. 0: the model's own.
        n_batch: Most rows of one llama_decode.
        n_ubatch: Most rows of one graph.
        n_gpu_layers: Layers on the GPU, -1 for all.
        flash_attn: Flash attention in the decoder.
        type_k: Type of the cached K: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0".
        type_v: Type of the cached V, the same names. A quantized V needs flash attention.
        n_threads: CPU threads. None: the physical cores, estimated.
        verbose: Show llama.cpp's log.

    Raises:
        ConfigError: A value cannot be used.
    """

    n_ctx: int = 4096
    n_batch: int = 2048
    n_ubatch: int = 512
    n_gpu_layers: int = 0
    flash_attn: bool = True
    type_k: str = "f16"
    type_v: str = "f16"
    n_threads: int | None = None
    verbose: bool = False

    ranges: ClassVar[Mapping[str, Range]] = {
        "n_ctx": Range(0, _INT32),
        "n_batch": Range(2, _INT32),
        "n_ubatch": Range(1, _INT32),
        "n_gpu_layers": Range(-1, _INT32),
        "n_threads": Range(1, 4096),
    }
    own_checks: ClassVar[tuple[str, ...]] = ("type_k", "type_v")

    def check(self) -> None:
        """Raises ConfigError for types of the cache that do not exist, and values that do not go together."""
        if self.n_ctx == 1:
            raise ConfigError(
                "n_ctx=1 has no room for a prompt and an answer", "use 2 or more, or 0 for the model's own"
            )
        for name in ("type_k", "type_v"):
            kind: object = getattr(self, name)
            if not isinstance(kind, str) or kind not in KV_TYPES:
                raise ConfigError(f"{name}={quoted(kind)} is not a KV cache type", use_one_of(kind, KV_TYPES))
        if self.type_v not in ("f32", "f16", "bf16") and not self.flash_attn:
            raise ConfigError(
                f"type_v={self.type_v!r} needs flash attention", "use flash_attn=True or an unquantized type_v"
            )

    @property
    def uses_gpu(self) -> bool:
        """Whether any layer is on the GPU. The encoder is there too then."""
        return self.n_gpu_layers != 0

    @property
    def has_spare_cores(self) -> bool:
        """Whether decoder and encoder can work at the same time with a core for each of their threads."""
        cores = _physical_cores()
        return 2 * (self.n_threads or cores) <= cores

    def for_llama(self) -> dict[str, Any]:
        """The same as arguments of llama_cpp.Llama."""
        values = {name: getattr(self, name) for name in names_of(type(self))}
        n_threads = self.n_threads or _physical_cores()
        types = {"type_k": KV_TYPES[self.type_k], "type_v": KV_TYPES[self.type_v]}
        return values | types | {"n_threads": n_threads, "n_threads_batch": n_threads}


@dataclass(frozen=True)
class EncoderOptions(_Options):
    """How the vision encoder works.

    Attributes:
        encoder_flash_attn: Flash attention in the encoder. None: as in the decoder.
        image_min_tokens: Least tokens of an image, for encoders with dynamic resolution. -1: the model's own.
        image_max_tokens: Most tokens of an image, in the same way.
        encoder: "repaired" puts right what this llama.cpp gets wrong with some encoders, and the report says so
            (star_edge.vision.repair). "stock" leaves it. A model that was trained with one answers worse with the
            other.
        mmproj_type: Type of the matrices that the encoder computes with: "file" is that of the mmproj file, "f16" or
            "bf16" another, and "auto" the fastest on this processor (star_edge.vision.precision). A converted copy of
            the file is kept in the user's cache folder, or in the one that STAR_EDGE_CACHE names.

    Raises:
        ConfigError: A value cannot be used.
    """

    encoder_flash_attn: bool | None = None
    image_min_tokens: int = -1
    image_max_tokens: int = -1
    encoder: str = "repaired"
    mmproj_type: str = "file"

    ranges: ClassVar[Mapping[str, Range]] = {
        "image_min_tokens": Range(-1, _INT32),
        "image_max_tokens": Range(-1, _INT32),
    }
    own_checks: ClassVar[tuple[str, ...]] = ("encoder", "mmproj_type")

    def check(self) -> None:
        """Raises ConfigError for an unknown encoder or type, and where no image can have as few and as many tokens."""
        check_encoder(self.encoder)
        check_type(self.mmproj_type)
        least, most = self.image_min_tokens, self.image_max_tokens
        if 0 < most < least:
            raise ConfigError(f"image_min_tokens={least} is more than image_max_tokens={most}", "lower it")


@dataclass(frozen=True)
class CacheOptions(_Options):
    """What is kept from one request for the next.

    Attributes:
        image_cache_bytes: Bytes of encoder outputs that are kept in memory, 0 for none.
        image_cache_dir: A directory to keep them in as well (2 GiB at most), for later processes. Only you and people
            you trust should be able to write there. One that cannot be written to is read.
        reuse: Keep what the decoder read of a prompt, up to its last image, for the next prompt that begins alike.
        prompt_cache_bytes: Bytes of memory in which the same of earlier prompts waits while others are answered, for
            conversations that take turns. 0: the last prompt's alone is kept. With reuse=False nothing is kept.

    Raises:
        ConfigError: A value cannot be used.
    """

    image_cache_bytes: int = DEFAULT_BYTES
    image_cache_dir: str | PathLike[str] | None = None
    reuse: bool = True
    prompt_cache_bytes: int = 0

    ranges: ClassVar[Mapping[str, Range]] = {"prompt_cache_bytes": Range(0, 2**63 - 1)}
    own_checks: ClassVar[tuple[str, ...]] = ("image_cache_bytes", "image_cache_dir")

    def check(self) -> None:
        """Raises ConfigError for a size or a directory that cannot be used."""
        check_bytes(self.image_cache_bytes)
        check_directory(self.image_cache_dir)


# Options for where nothing may come from an earlier request: times are compared, or two ways of reading a prompt
AFRESH: dict[str, Any] = {"image_cache_bytes": 0, "reuse": False}


def names_of(*groups: type[_Options]) -> tuple[str, ...]:
    """Names of the options of some groups."""
    return tuple(field.name for group in groups for field in fields(group))  # type: ignore[arg-type]


def describe_options(*groups: type[_Options]) -> Callable[[_Class], _Class]:
    """Decorator: "name: As in a group." in a class's docstring becomes what the group's own says of that option."""

    def decorate(kind: _Class) -> _Class:
        lines = []
        for line in (kind.__doc__ or "").splitlines():
            match = re.fullmatch(r"( +)(\w+): As in (\w+)\.", line)
            group = next((group for group in groups if match and group.__name__ == match[3]), None)
            lines.append(line if match is None or group is None else _description(group, match[2], match[1]))
        kind.__doc__ = "\n".join(lines) or None
        return kind

    return decorate


def _description(group: type[_Options], name: str, indent: str) -> str:
    """An entry of the group's Attributes, with its further lines."""
    text = inspect.getdoc(group) or ""
    found = re.search(rf"^    {name}: .*(\n {{8}}.*)*", text, re.MULTILINE)
    assert found is not None, f"{group.__name__} does not describe {name}"
    return "\n".join(indent + line.removeprefix("    ") for line in found[0].splitlines())


def _physical_cores() -> int:
    """llama.cpp is fastest with one thread for each physical core; small machines rarely have two threads on one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable if usable <= 4 else max(4, usable // 2)
