"""What a chat completion request may say beyond llama-cpp-python's own fields, and OpenAI's form of an error."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastapi.responses import JSONResponse
from llama_cpp.server.types import CreateChatCompletionRequest
from pydantic import BaseModel, ConfigDict, Field

from ..config import PRESETS, PruneConfig
from ..errors import (
    ConfigError,
    ContextLengthError,
    ImageError,
    PromptError,
    RequestCancelledError,
    StarEdgeError,
    UnsupportedModelError,
)

_OF_THE_CLIENT = (ConfigError, ContextLengthError, ImageError, PromptError, UnsupportedModelError)


class ReportOptions(BaseModel):
    """The request's `star_edge` field."""

    model_config = ConfigDict(extra="forbid")

    kept: bool = Field(default=False, description="Add to the response's star_edge which image tokens each stage kept, and where they lie.")


class ChatRequest(CreateChatCompletionRequest):
    """llama-cpp-python's request, and how to prune for it."""

    prune: Any = Field(default=None, description="A preset's name, an object of PruneConfig's fields, or null for none. Without the field: the server's.")
    star_edge: ReportOptions = Field(default_factory=ReportOptions)
    max_completion_tokens: int | None = Field(default=None, description="OpenAI's newer name of max_tokens.")


def parse_prune(value: Any) -> PruneConfig | None:
    """The config of a `prune` field that a request has. null is "off", as None is in Python; a name is never that of a file.

    Raises:
        ConfigError: no preset, an unknown field, or a value that PruneConfig refuses.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value not in PRESETS:
            raise ConfigError(f"prune: there is no preset {value[:60]!r}", f"use one of {', '.join(PRESETS)}, or an object")
        return PRESETS[value]
    if not isinstance(value, dict):
        raise ConfigError(
            f"prune is a {type(value).__name__}", 'use a preset\'s name, or an object such as {"vision_keep": 0.5, "decoder_keep": 0.25}'
        )
    names = [field.name for field in fields(PruneConfig)]
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ConfigError(f"prune has no field {unknown[0][:60]!r}", f"use {', '.join(names)}")
    try:
        return PruneConfig(**value)
    except TypeError as error:  # a list where a number belongs
        raise ConfigError(f"prune cannot be used ({error})", "check the types of its fields") from error


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for what went wrong with a request. What is not star_edge's own error is not shown to the client."""
    if isinstance(error, ContextLengthError):
        return 400, error_body(str(error), "invalid_request_error", "context_length_exceeded", "messages")
    if isinstance(error, _OF_THE_CLIENT):
        return 400, error_body(str(error), "invalid_request_error", type(error).__name__)
    if isinstance(error, RequestCancelledError):
        return 503, error_body("the server is stopping: ask again", "server_error", "stopping")
    if isinstance(error, StarEdgeError):
        return 500, error_body(str(error), "server_error", type(error).__name__)
    return 500, error_body("internal error: see the server's log", "server_error")


def error_response(error: Exception) -> JSONResponse:
    status, body = describe(error)
    return JSONResponse(body, status)
