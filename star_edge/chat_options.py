"""Options of a chat completion. Each is put into a form that MTMDChatHandler honours, or refused.

Knows OpenAI's names and what llama_cpp makes of them. Knows neither images nor the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, MTMDChatHandler
from llama_cpp.llama_grammar import LlamaGrammar

from .arguments import check, parameters
from .errors import ConfigError
from .llamacpp.guarded import RANGES, check_llama_grammar, check_options
from .llamacpp.handover import keeps_logits
from .llamacpp.json_schema import response_grammar, schema_grammar
from .suggestions import nearest

_NO_PARAMETERS = {"type": "object", "properties": {}}


def check_chat_options(
    llama: Llama, options: Mapping[str, Any], template: Callable[[], str], named: Iterable[str] = ()
) -> tuple[dict[str, Any], LlamaGrammar | None]:
    """Checks options, and translates them for MTMDChatHandler.

    Args:
        llama: The Llama.
        options: The options.
        template: Gives the chat template's source. Further options are its variables.
        named: Names that the caller takes itself, for suggestions.

    Returns:
        Arguments of MTMDChatHandler.__call__; and the grammar to use in place of the one that it makes of a chosen
        tool, or None.

    Raises:
        ConfigError: An option is unknown, or cannot be honoured.
    """
    options = dict(options)
    known = parameters(MTMDChatHandler.__call__)
    for_template = check_template_variables(
        {name: value for name, value in options.items() if name not in known}, template, [*named, *known]
    )
    options = {name: value for name, value in options.items() if name in known}

    sampling = {
        name: value
        for name, value in options.items()
        if name in parameters(Llama.create_completion) and name != "logprobs"
    }
    options |= check_options(llama, sampling)
    names: dict[str, Any] = {name: options[name] for name in ("logprobs", "top_logprobs") if name in options}
    options |= check(MTMDChatHandler.__call__, names, RANGES)
    if options.get("logprobs"):
        if not keeps_logits(llama):
            raise ConfigError("logprobs were asked for, and the Llama keeps none", "make it with logits_all=True")
        if options.get("top_logprobs") is None:
            options["top_logprobs"] = 0  # MTMDChatHandler only passes on this number
    elif options.get("top_logprobs"):
        raise ConfigError(
            f"top_logprobs={options['top_logprobs']} without logprobs gives nothing", "set logprobs to True"
        )

    given = options.get("grammar")
    response = response_grammar(options.pop("response_format", None))
    tool = _choose_tool(options)
    chosen = None if tool is None else schema_grammar(tool.get("parameters", _NO_PARAMETERS))
    if sum(grammar is not None for grammar in (given, response, chosen)) > 1:
        raise ConfigError("grammar, response_format and a chosen tool each fix the answer's form", "give one of them")
    for grammar in (response, chosen):
        if grammar is not None:
            check_llama_grammar(llama, grammar)
    if response is not None:
        options["grammar"] = response
    return {**options, **for_template}, chosen


def _choose_tool(options: dict[str, Any]) -> Mapping[str, Any] | None:
    """The function that the model must call, or None. Puts tools and tool_choice into MTMDChatHandler's form."""
    for name in ("tools", "functions"):
        if options.get(name) is not None:
            options[name] = _check_tools(name, options[name])
    functions = options.get("functions")
    tools = options.get("tools") if functions is None else [{"type": "function", "function": f} for f in functions]
    choice, call = options.get("tool_choice"), options.get("function_call")
    if not (
        choice is None
        or isinstance(choice, Mapping)
        or (isinstance(choice, str) and choice in ("none", "auto", "required"))
    ):
        raise ConfigError(
            f"tool_choice={str(choice)[:60]!r} is unknown",
            'use "none", "auto", "required" or {"type": "function", ...}',
        )
    if not (call is None or isinstance(call, Mapping) or (isinstance(call, str) and call in ("none", "auto"))):
        raise ConfigError(f"function_call={str(call)[:60]!r} is unknown", 'use "none", "auto" or {"name": ...}')
    if isinstance(choice, str) and choice == "required":
        if not tools or len(tools) > 1:
            remedy = 'give one tool, or name one: {"type": "function", "function": {"name": ...}}'
            raise ConfigError(f'tool_choice="required" with {len(tools or ())} tools', remedy)
        choice = options["tool_choice"] = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    if isinstance(call, Mapping):
        wanted: Any = call.get("name")
    elif call is not None or not isinstance(choice, Mapping):  # function_call overrides tool_choice
        return None
    else:
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(wanted, str):
        raise ConfigError("the tool choice names no tool", 'use {"type": "function", "function": {"name": ...}}')
    for tool in tools or ():
        if tool["function"]["name"] == wanted:
            chosen: Mapping[str, Any] = tool["function"]
            return chosen
    raise ConfigError(f"Tool choice {wanted[:60]!r} not found in tools", "name one of them")


def _check_tools(name: str, tools: Any) -> list[Any]:
    """Checks tools. Those without parameters get a schema that takes none."""
    if not isinstance(tools, (list, tuple)):
        raise ConfigError(f"{name} is a {type(tools).__name__}", "give a list")
    checked = []
    for tool in tools:
        function = tool if name == "functions" else tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            remedy = 'use {"type": "function", "function": {"name": ...}}'
            raise ConfigError(f"{name} has an entry that is not a function with a name", remedy)
        if function.get("parameters") is None:
            function = {**function, "parameters": _NO_PARAMETERS}
        checked.append(function if name == "functions" else {**tool, "function": function})
    return checked


def check_template_variables(
    options: Mapping[str, Any], template: Callable[[], str], known: Iterable[str] = ()
) -> dict[str, Any]:
    """The options, and those in chat_template_kwargs, as variables of the chat template. known: for suggestions.

    Raises:
        ConfigError: The template does not read one of them.
    """
    options = dict(options)
    inner = options.pop("chat_template_kwargs", None)
    if inner is not None and not (isinstance(inner, Mapping) and all(isinstance(name, str) for name in inner)):
        raise ConfigError(
            f"chat_template_kwargs is a {type(inner).__name__}", "give a dict with the names of variables"
        )
    options |= inner or {}
    if options:
        unread = sorted(set(options) - _variables(template()))
        taken = sorted(set(options) & (set(parameters(MTMDChatHandler.__call__)) | _RENDERED))
        if unread or taken:
            name = (unread or taken)[0]
            near = nearest(name, (one for one in known if one != name))
            raise ConfigError(
                f"{name[:60]!r} is neither an option nor a variable of the chat template that can be set",
                "leave it out" if near is None else f"did you mean {near}=?",
            )
    return options


_RENDERED = {
    "add_generation_prompt",
    "eos_token",
    "bos_token",
    "raise_exception",
    "strftime_now",
}  # MTMDChatHandler sets these itself


@functools.lru_cache(maxsize=4)
def _variables(source: str) -> frozenset[str]:
    """Names that a chat template reads and does not set itself."""
    environment = jinja2.Environment(extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, jinja2.ext.loopcontrols])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateError:
        return frozenset()  # rendering raises the error
