"""How an answer is sampled and what form it has, for `star-edge run` and `star-edge chat`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click
from llama_cpp import Llama
from llama_cpp.llama_grammar import LlamaGrammar

from ..errors import ConfigError
from ..io.json_input import read_json
from ..llamacpp.grammar import MAX_BYTES, check_grammar
from ..llamacpp.guarded import MAX_STOPS
from ..llamacpp.json_schema import schema_grammar
from .options import SEED, FilePath, Number

_DEFAULTS = {name: p.default for name, p in inspect.signature(Llama.create_completion).parameters.items()}
_MOST = 1e6


@dataclass(frozen=True)
class Sampling:
    """Sampling options, as they were typed.

    Attributes:
        max_tokens: Most tokens of the answer.
        system: A system message, or None.
        grammar: File of a GBNF grammar, or None.
        json_schema: File of a JSON schema, or None.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    system: str | None
    grammar: str | None
    json_schema: str | None

    def options(self) -> dict[str, Any]:
        """Arguments of `StarVLM.generate` and `StarVLM.chat`, without max_tokens. Files are read here.

        Raises:
            ConfigError: A file cannot be read or used, or there are two.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
        options = {name: getattr(self, name) for name in names} | {"stop": list(self.stop)}
        if self.grammar is not None and self.json_schema is not None:
            raise ConfigError("--grammar and --json-schema each fix the answer's form", "give one of them")
        if self.grammar is not None:
            options["grammar"] = _read_grammar(self.grammar)
        if self.json_schema is not None:
            options["grammar"] = _read_schema(self.json_schema)
        return options

    def check_batch(self) -> None:
        """Raises ConfigError for options that a batch does not take."""
        for field in fields(self):
            value = getattr(self, field.name)
            default = () if field.name == "stop" else _DEFAULTS.get(field.name)
            if field.name not in ("max_tokens", "temperature", "seed") and value != default:
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} is for one request, and --each and --tasks make several",
                    "leave it out",
                )


def _read_grammar(path: str) -> LlamaGrammar:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _unreadable("--grammar", path, error, "give a file with a GBNF grammar") from error
    try:
        check_grammar(text, "root", 2**31, lambda _: True)  # tokens are looked up once the model is there
    except ConfigError as error:
        raise ConfigError(f"--grammar {path}: {error.cause}", error.remedy) from error
    return LlamaGrammar.from_string(text, verbose=False)


def _read_schema(path: str) -> LlamaGrammar:
    try:
        schema = read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable("--json-schema", path, error, "give a file with a JSON schema") from error
    try:
        return schema_grammar(schema)
    except ConfigError as error:
        raise ConfigError(f"--json-schema {path}: {error.cause}", error.remedy) from error


def _unreadable(flag: str, path: str, error: Exception, remedy: str) -> ConfigError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return ConfigError(f"{flag} {path} cannot be read ({reason})", remedy)


def _stops(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("an empty text ends every answer at once.", ctx, param)
    if len(values) > MAX_STOPS:
        raise click.BadParameter(f"{len(values)} texts are too many, use {MAX_STOPS} at most.", ctx, param)
    return tuple(value.replace("\\n", "\n") for value in values)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-n, --temperature, ... and --json-schema. They reach the command as `sampling`, a Sampling."""
    parameters = [
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(min=1, max=2**31 - 1),
            default=256,
            show_default=True,
            help="Most tokens of an answer.",
        ),
        click.option(
            "--temperature",
            "--temp",
            type=Number(min=0, max=_MOST),
            default=0.0,
            help="0 takes the likeliest token.",
            show_default=True,
        ),
        click.option(
            "--top-p",
            type=Number(min=0, max=1),
            default=_DEFAULTS["top_p"],
            help="Sample among the likeliest tokens that together have this probability.",
            show_default=True,
        ),
        click.option(
            "--top-k",
            type=click.IntRange(-1, 2**31 - 1),
            default=_DEFAULTS["top_k"],
            help="Sample among so many tokens; 0 for all.",
            show_default=True,
        ),
        click.option(
            "--min-p",
            type=Number(min=0, max=1),
            default=_DEFAULTS["min_p"],
            help="Leave out tokens below this share of the likeliest one's probability.",
            show_default=True,
        ),
        click.option(
            "--repeat-penalty",
            type=Number(min=0, max=_MOST, min_open=True),
            default=_DEFAULTS["repeat_penalty"],
            help="Above 1: tokens that were there are less likely.",
            show_default=True,
        ),
        click.option("--seed", type=SEED, help="Of the sampling. Default: another one for each request."),
        click.option(
            "--stop",
            multiple=True,
            callback=_stops,
            help=r"End the answer before this text; repeat for several. \n is a new line.",
        ),
        click.option("--system", help="A system message before the prompt."),
        click.option(
            "--grammar", type=FilePath(dir_okay=False), help="File of a GBNF grammar that the answer follows."
        ),
        click.option(
            "--json-schema", type=FilePath(dir_okay=False), help="File of a JSON schema that the answer follows."
        ),
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> Any:
        sampling = Sampling(**{field.name: given.pop(field.name) for field in fields(Sampling)})
        return command(sampling=sampling, **given)

    for parameter in reversed(parameters):
        with_options = parameter(with_options)
    return with_options
