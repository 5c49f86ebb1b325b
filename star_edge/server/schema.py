"""A chat completion request, with fields of llama-cpp-python, OpenAI and star_edge; and OpenAI's form of an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llama_cpp.server.types import CreateChatCompletionRequest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import JSONResponse

from ..errors import (
    ConfigError,
    ContextLengthError,
    ImageError,
    PromptError,
    RequestCancelledError,
    StarEdgeError,
    UnsupportedModelError,
)
from ..pruning.config import PruneConfig
from ..pruning.presets import PRESETS
from ..suggestions import use_one_of
from .messages import FieldError, check_tool_choice, read_functions, read_tools, suggestion

_OF_THE_CLIENT = (ConfigError, ContextLengthError, ImageError, PromptError, UnsupportedModelError)
_MAX_VALUES = (
    500_000  # JSON values of a body: each takes some 60 bytes and more when it is read, whatever it took in the body
)
_MAX_DEPTH = 100
_MAX_STOPS = 64
_MAX_DIGITS = 600  # of a whole number


class ReportOptions(BaseModel):
    """The request's `star_edge` field."""

    model_config = ConfigDict(extra="forbid")

    kept: bool = Field(
        default=False,
        description="Add to the response's star_edge which image tokens each stage kept, and where they lie.",
    )
    frames: bool = Field(
        default=False,
        description="Add to the response's star_edge the frames that were taken of videos, as small pictures.",
    )
    afresh: bool = Field(
        default=False, description="Compute everything: use nothing that an earlier request left, and leave nothing."
    )


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = Field(default=False, description="One chunk more at the end, with the usage and no choices.")
    include_obfuscation: Literal[False] = False


class ChatRequest(CreateChatCompletionRequest):
    """llama-cpp-python's request, with OpenAI's further fields, and how to prune. Unknown fields are refused.

    `messages` and the handler check the parts of messages, tools and response_format.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # Wider types than the base class has: JSON as it comes, which is checked further on
    messages: list[dict[str, Any]] = Field(min_length=1)  # type: ignore[assignment]
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None  # type: ignore[assignment]
    function_call: str | dict[str, Any] | None = None  # type: ignore[assignment]
    response_format: dict[str, Any] | None = None  # type: ignore[assignment]
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    max_tokens: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="-1, like null: as many as fit the context."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="OpenAI's newer name of max_tokens."
    )
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int = Field(default=40, ge=-1, le=2**31 - 1, description="-1 and 0: all tokens.")
    repeat_penalty: float = Field(default=1.1, gt=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    n: Literal[1] = 1
    # Fields without effect
    model: str | None = Field(default=None, max_length=1000)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] = False
    modalities: list[Literal["text"]] = Field(default=["text"])
    parallel_tool_calls: bool = True

    prune: Any = Field(
        default=None,
        description="A preset's name, an object of PruneConfig's fields, or null for none. Without the field: the "
        "server's.",
    )
    star_edge: ReportOptions = Field(default_factory=ReportOptions)

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _some_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("0 asks for no answer")
        return None if value == -1 else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = value if isinstance(value, list) else [value]
        if len(stops) > _MAX_STOPS or "" in stops:
            raise ValueError(f"at most {_MAX_STOPS} texts, none of them empty")
        return value

    @field_validator("response_format")
    @classmethod
    def _known_format(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = None if value is None else value.get("type")
        if kind not in ("text", "json_object", "json_schema"):
            raise ValueError("its type is not text, json_object or json_schema")
        schema = value.get("json_schema") if value is not None and kind == "json_schema" else None
        if kind == "json_schema" and (
            not isinstance(schema, dict) or not isinstance(schema.get("schema"), (dict, bool))
        ):
            raise ValueError("json_schema has no schema")
        return value

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer; None: as many as fit the context."""
        return min((n for n in (self.max_tokens, self.max_completion_tokens) if n is not None), default=None)


def read_request(body: bytes | bytearray) -> ChatRequest:
    """The request in a body. A null stands for a field's default, but turns `prune` off, like None in Python.

    Raises:
        FieldError: The first field that cannot be used.
        PromptError: The body is not a JSON object.
    """
    return as_chat_request(read_json_object(body))


def as_chat_request(values: dict[str, Any]) -> ChatRequest:
    """The request that some fields make. Raises FieldError for the first one that cannot be used."""
    unknown = sorted(set(values) - set(ChatRequest.model_fields))
    if unknown:
        raise FieldError(unknown[0][:60], "unknown field", suggestion(unknown[0], ChatRequest.model_fields))
    prune = {"prune": values["prune"]} if "prune" in values else {}
    values = _without_nulls({name: value for name, value in values.items() if name != "prune"})
    for name in ("star_edge", "stream_options"):
        if isinstance(values.get(name), dict):
            values[name] = _without_nulls(values[name])
    try:
        request = ChatRequest(**values, **prune)
    except ValidationError as error:
        raise _invalid(error) from error
    if request.tools is not None:
        request.tools = read_tools(request.tools)
    if request.functions is not None:
        request.functions = read_functions(request.functions, "functions")
    names = [tool["function"]["name"] for tool in request.tools or ()]
    check_tool_choice(request.tool_choice, names)
    if request.tool_choice == "none":
        request.tools = None  # the model need not know of them
    return request


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _invalid(error: ValidationError) -> FieldError:
    """The first error that pydantic found."""
    found = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(step) for step in found["loc"])
    cause = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        nested: dict[int | str, type[BaseModel]] = {"star_edge": ReportOptions, "stream_options": StreamOptions}
        known = nested[found["loc"][0]].model_fields
        return FieldError(field[:100], "unknown field", suggestion(str(found["loc"][-1]), known))
    remedies = {"n": "ask again for another answer", "messages": "send one or more"}
    return FieldError(
        field[:100], cause[:1].lower() + cause[1:], remedies.get(str(found["loc"][0]), "change it, or leave it out")
    )


def read_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """The object in a body. Raises PromptError unless it is one, without NaN, infinity and half surrogate pairs."""
    n = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if n > _MAX_VALUES:
        raise PromptError(f"the request has {n} JSON values", f"send at most {_MAX_VALUES}")
    try:
        values = json.loads(body, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
        _check_text(values)
    except UnicodeError as error:
        raise PromptError(
            "the request has bytes or characters that are not text", "send UTF-8, and surrogates in pairs"
        ) from error
    except RecursionError as error:
        raise PromptError("the request is nested too deeply", "send fewer lists and objects in each other") from error
    except ValueError as error:
        raise PromptError(f"the request cannot be read as JSON ({error})", "send one JSON object") from error
    if not isinstance(values, dict):
        raise PromptError(f"the request is a JSON {type(values).__name__}", "send an object")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:30]} is not a finite number")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:  # sys.get_int_max_str_digits() may be lower, and its error speaks to programmers
        raise ValueError(f"{digits[:30]}... has {len(digits)} digits")
    return int(digits)


def _check_text(value: Any, depth: int = 0) -> None:
    """Raises UnicodeEncodeError for half a surrogate pair, which JSON can write as \\ud800, and RecursionError for
    values deeper than _MAX_DEPTH.
    """
    if depth > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check_text(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, depth + 1)


@dataclass(frozen=True)
class Configs:
    """The configs that requests may name.

    Attributes:
        default: Of requests without `prune`.
        default_name: What it is called.
        named: Those that the server was started with, by name. None: no pruning.
    """

    default: PruneConfig | None
    default_name: str
    named: Mapping[str, PruneConfig | None] = field(default_factory=dict)

    def of(self, request: ChatRequest) -> tuple[PruneConfig | None, str]:
        """The config of a request, and its name: "custom" for one by fields.

        Raises:
            ConfigError: See `parse_prune`.
        """
        if "prune" not in request.model_fields_set:
            return self.default, self.default_name
        config = parse_prune(request.prune, self.named)
        name = request.prune if isinstance(request.prune, str) else "off" if request.prune is None else "custom"
        return config, name


def parse_prune(value: Any, named: Mapping[str, PruneConfig | None] = {}) -> PruneConfig | None:
    """The config of a request's `prune` field. null turns pruning off. A name is never that of a file.

    named: Configs by name, beside the presets.

    Raises:
        ConfigError: The name or a field is unknown, or PruneConfig refuses a value.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value in named:
            return named[value]
        if value not in PRESETS:
            remedy = use_one_of(value, (*named, *PRESETS), ", or an object")
            raise ConfigError(f"prune: there is no preset {value[:60]!r}", remedy)
        return PRESETS[value]
    if not isinstance(value, dict):
        raise ConfigError(
            f"prune is a {type(value).__name__}",
            'use a preset\'s name, or an object such as {"vision_keep": 0.5, "decoder_keep": 0.25}',
        )
    names = [field.name for field in fields(PruneConfig)]
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ConfigError(f"prune has no field {unknown[0][:60]!r}", use_one_of(unknown[0], names))
    for name in ("encoder_keep", "vision_keep", "decoder_keep", "image_max_tokens"):
        if type(value.get(name)) is int and value[name] == 1:  # JavaScript writes 1.0 like that
            raise ConfigError(
                f"prune: {name}=1 may be one token or all of them",
                "leave it out for all, or use a fraction or 2 and more",
            )
    try:
        return PruneConfig(**value)
    except TypeError as error:  # a list where a number belongs
        raise ConfigError(f"prune cannot be used ({error})", "check the types of its fields") from error


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for an error. The client sees only errors of star_edge."""
    if isinstance(error, ContextLengthError):
        return 400, error_body(str(error), "invalid_request_error", "context_length_exceeded", "messages")
    if isinstance(error, _OF_THE_CLIENT):
        param = error.field if isinstance(error, FieldError) else None
        return 400, error_body(str(error), "invalid_request_error", type(error).__name__, param)
    if isinstance(error, RequestCancelledError):
        return 503, error_body("the server is stopping: ask again", "server_error", "stopping")
    if isinstance(error, StarEdgeError):
        return 500, error_body(str(error), "server_error", type(error).__name__)
    return 500, error_body("internal error: see the server's log", "server_error")


def error_response(error: Exception) -> JSONResponse:
    status, body = describe(error)
    return JSONResponse(body, status)
