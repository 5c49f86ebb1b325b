"""JSON schemas as grammars: llama_cpp's converter, with bounds and with escaped strings.

The converter writes out repetitions, and visits a definition once for each reference. So 50 bytes of schema can become
gigabytes of grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar, SchemaConverter

from ..errors import ConfigError
from .grammar import MAX_BYTES

MAX_SCHEMA_DEPTH = 100
MAX_SCHEMA_VALUES = 20_000  # keys and items of the schema itself
MAX_COUNT = 900  # repetitions: llama.cpp's parser nests at most about 1000 optional parts
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_REPETITION = re.compile(r"\{([^}]*)\}")


class _Converter(SchemaConverter):
    """llama_cpp's converter, with bounds on its output and on its steps. It has no annotations."""

    def __init__(self) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False
        )
        self._n_bytes = self._n_visits = 0

    def _add_rule(self, name: str, rule: str) -> str:
        self._n_bytes += len(name) + len(rule)
        if self._n_bytes > 2 * MAX_BYTES:  # a rule that is written twice counts twice
            raise ConfigError(f"the JSON schema comes to a grammar of more than {MAX_BYTES} bytes", "make it smaller")
        reference: str = super()._add_rule(name, rule)  # type: ignore[no-untyped-call]
        return reference

    def visit(self, schema: Any, name: str) -> str:
        self._n_visits += 1
        if self._n_visits > MAX_SCHEMA_VALUES:
            raise ConfigError("the JSON schema's references come to too many definitions", "make it smaller")
        reference: str = super().visit(schema, name)  # type: ignore[no-untyped-call]
        return reference

    def _format_literal(self, literal: str) -> str:
        """Escapes JSON text. The original leaves its backslashes, which the grammar then reads as escapes."""
        try:
            text = json.dumps(json.loads(literal), ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair: only an escape can express it
            text = literal
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def schema_grammar(schema: Any) -> LlamaGrammar:
    """The grammar of the JSON texts that a schema allows. llama_cpp's converter ignores keywords that it does not know.

    Raises:
        ConfigError: It is not a JSON schema, the converter cannot follow it, or the grammar is too large.
    """
    if not isinstance(schema, (Mapping, bool)):
        raise ConfigError(f"the JSON schema is a {type(schema).__name__}", "give an object")
    if schema is False:
        raise ConfigError("the JSON schema is false, which no answer fits", "give an object")
    if schema is True:
        return LlamaGrammar.from_string(JSON_GBNF)
    _check_schema(schema)
    try:
        converter: Any = _Converter()
        converter.visit(converter.resolve_refs(json.loads(json.dumps(schema)), "stdin"), "")
        return LlamaGrammar.from_string(converter.format_grammar())
    except ConfigError:
        raise
    except Exception as error:  # the converter asserts, indexes and recurses, so it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"the JSON schema cannot be followed ({reason})", "see llama_cpp.llama_grammar for what it may say"
        ) from error


def _check_schema(schema: Any) -> None:
    """Size, depth and counts of a schema, without recursion."""
    n = 0
    todo = [(schema, 0)]
    while todo:
        value, depth = todo.pop()
        n += 1
        if n > MAX_SCHEMA_VALUES or depth > MAX_SCHEMA_DEPTH:
            raise ConfigError(
                f"the JSON schema has more than {MAX_SCHEMA_VALUES} values or is more than {MAX_SCHEMA_DEPTH} deep",
                "make it smaller",
            )
        if isinstance(value, Mapping):
            for name in _COUNTS:
                count = value.get(name)
                # A property may have such a name. Its value is a schema then.
                if count is not None and not isinstance(count, (Mapping, bool)) and not _is_count(count):
                    raise ConfigError(
                        f"the JSON schema has {name}={str(count)[:40]}", f"use a whole number of 0 to {MAX_COUNT}"
                    )
            pattern = value.get("pattern")
            if isinstance(pattern, str):
                _check_pattern(pattern)
            todo += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple)):
            todo += [(item, depth + 1) for item in value]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _check_pattern(pattern: str) -> None:
    total = 0
    for repetition in _REPETITION.findall(pattern):
        numbers = [n.strip() for n in repetition.split(",")]
        if not all(n.isdigit() or not n for n in numbers):
            continue  # these braces are not a repetition: the converter reports it where it matters
        counts = [min(int(n[:9]), 10**9) for n in numbers if n]
        if len(counts) == 2 and counts[1] < counts[0]:
            raise ConfigError(
                f"the JSON schema's pattern repeats {{{repetition[:40]}}} times", "write the smaller number first"
            )
        total += max(counts, default=0)
        if total > MAX_COUNT:
            raise ConfigError(
                f"the JSON schema's pattern repeats more than {MAX_COUNT} times", "use smaller counts, or no limit"
            )
    if pattern.count("(") > MAX_SCHEMA_DEPTH:
        raise ConfigError(f"the JSON schema's pattern has more than {MAX_SCHEMA_DEPTH} groups", "use a simpler pattern")


def response_grammar(response_format: Any) -> LlamaGrammar | None:
    """The grammar of an OpenAI response_format, or None if it asks for plain text.

    {"type": "text"}, {"type": "json_object"} (with "schema", as llama_cpp has it), or {"type": "json_schema",
    "json_schema": {"name": ..., "schema": ..., "strict": ...}}. A schema holds whether or not it says strict.

    Raises:
        ConfigError: It has another form, or its schema cannot be used.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        remedy = 'its "type" is "text", "json_object" or "json_schema"'
        raise ConfigError(f"response_format={str(response_format)[:100]} is unknown", remedy)
    unknown = set(response_format) - {"type", {"json_object": "schema", "json_schema": "json_schema"}.get(kind, "type")}
    if unknown:
        raise ConfigError(
            f"response_format has {sorted(map(str, unknown))[0][:60]!r}, which is unknown for {kind}", "leave it out"
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_grammar(True if response_format.get("schema") is None else response_format["schema"])
    inner = response_format.get("json_schema")
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise ConfigError("response_format has no json_schema.schema", 'give {"name": ..., "schema": {...}}')
    return schema_grammar(inner["schema"])
