"""Messages in the words of the command line.

Errors and notes of the package name parameters as Python has them: `n_ctx=1`, `chat=False`. Here, and only here, they
become what a user of the running command types: `--ctx-size 1`, `--raw`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import fields

import click

from ..errors import InputFileError, StarEdgeError
from ..io.image_bytes import PASS_ONE_OF
from ..pruning.config import PruneConfig

# Python's ways out that a command line does not have, and values by another name
_PHRASES = (
    (re.escape(PASS_ONE_OF), "give a path, or a data: or http(s) URL"),
    (r",? or (raise|set) ImageLimits\([^)]*\)", ""),
    (r",? or a PruneConfig\b", ""),
    (r"\bNone to have it chosen\b", "leave it out to have it chosen"),
    (r"\ban int is a count\b", "a whole number is a count"),
)
# What another option says: Python's text, the parameter of the command, what is typed
_OTHER_OPTIONS = (
    (r"\bchat=False\b", "raw", "--raw"),
    (r"\breuse=False\b", "cache", "--no-cache"),
    (r"\bprune=(?=\S)", "preset", "--preset "),
)
_BEFORE = r"(?<![-\w./\\?&])"  # not within a path, a URL or another name
_AFTER = r"(?![\w/\\=-]|\.\w)"


@contextmanager
def in_cli_words(find_command: Callable[[], click.Command | None] = lambda: None) -> Iterator[None]:
    """Errors inside the block are in the words of a command. find_command says after an error which; None: the running
    one.
    """
    try:
        yield
    except InputFileError:  # fields of a file have the file's names
        raise
    except StarEdgeError as error:
        command = find_command()
        raise type(error)(cli_words(error.cause, command), cli_words(error.remedy, command)) from error


def cli_words(text: str, command: click.Command | None = None, keep: Container[str] = ()) -> str:
    """A message in the words of a command.

    Args:
        text: The message.
        command: The command. None: the running one; without one the text stays as it is.
        keep: Names that stay, because a file that the message is about has them.
    """
    context = click.get_current_context(silent=True)
    command = command or (context.command if context is not None else None)
    if command is None:
        return text
    options = {param.name: param for param in command.params if isinstance(param, click.Option)}
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    for pattern, name, words in _OTHER_OPTIONS:
        text = re.sub(_BEFORE + pattern, words, text) if name in options and name not in keep else text
    for name, param in options.items():
        if name is None or name in keep:
            continue
        flag = max(param.opts, key=len)
        if param.is_flag:
            off = max(param.secondary_opts, key=len) if param.secondary_opts else None
            text = re.sub(rf"{_BEFORE}{name}=True\b", flag, text)
            text = re.sub(rf"{_BEFORE}{name}=False\b", off, text) if off else text
        text = re.sub(rf"{_BEFORE}{name}=(?=\S)", f"{flag} ", text)
        if "_" in name:  # other names are English words too
            text = re.sub(rf"{_BEFORE}{name}{_AFTER}", flag, text)
    if "sets" in options:
        for field in fields(PruneConfig):
            if field.name not in options:
                text = re.sub(rf"(?<!--set ){_BEFORE}{field.name}=(?=\S)", f"--set {field.name}=", text)
    return text
