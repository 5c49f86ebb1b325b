"""The `star-edge` command.

Each subcommand is a thin front end in a module of its own. An error that a user can fix is one line on stderr, with a
remedy, and exit status 2. A traceback means a bug.

Errors are put into the words of the command line here, for all commands (see `words`).
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..suggestions import did_you_mean
from .words import in_cli_words

# Imported when used: `star-edge --help` should not load llama.cpp.
COMMANDS = {
    "run": "Answer a question about images.",
    "chat": "Chat about pictures: several turns, several pictures.",
    "serve": "Serve a model: OpenAI's API, and a page that shows what is pruned.",
    "demo": "Ask the shipped reference model about a picture, stock beside pruned.",
    "tune": "Find the cheapest config that keeps the accuracy on your own questions.",
    "inspect": "Attention of any layer, and the tokens that stay, as arrays and as a picture.",
    "eval": "Accuracy and speed of presets and other configs on your own questions, beside the unpruned model.",
    "bench": "Time to the first token, decoding speed and memory, beside stock llama-cpp-python.",
    "doctor": "Versions, devices, what a model supports, and what would be pruned how.",
    "completion": "Completion of commands, options, presets and files by bash, zsh or fish.",
}
COMPLETE_VARIABLE = "_STAR_EDGE_COMPLETE"  # click's own name for a command called star-edge
EXIT_STATUSES = {
    0: "done",
    1: "whoever reads the output has gone",
    2: "wrong use, or an error: one line on stderr says what and what to do",
    3: "some requests of a batch failed, or a picture could not be drawn",
    130: "ended by Ctrl-C",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f".{name}", __name__), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            remedy = did_you_mean(args[0], COMMANDS, f"use one of {', '.join(COMMANDS)}.")
            ctx.fail(f"No such command {args[0][:60]!r}. {remedy[0].upper()}{remedy[1:]}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with in_cli_words(lambda: self.get_command(ctx, ctx.invoked_subcommand or "")):
                return super().invoke(ctx)
        except click.UsageError as error:
            if error.ctx is None:  # raised inside a command
                command = self.get_command(ctx, ctx.invoked_subcommand or "") or self
                error.ctx = click.Context(command, parent=ctx, info_name=ctx.invoked_subcommand)
            raise

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=about) for name, about in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in EXIT_STATUSES.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="star-edge")
def cli() -> None:
    """Vision-language GGUF models that do not compute the image tokens that do not matter."""


def _open_standard_streams() -> None:
    """Opens standard streams that were closed when the command started.

    Otherwise the next file would get such a number, and llama.cpp would write its log there. A closed stdout stays
    unwritable, so that a result is not lost unnoticed.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, flags)
        try:
            os.fstat(number)  # a library that was imported may have it by now
        except OSError:
            os.dup2(opened, number)
            os.close(opened)
            opened = number
        setattr(sys, name, open(opened, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115 (to the end)
    if hasattr(sys.stdout, "reconfigure"):  # for a terminal that lacks characters of an answer
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Discards what is still buffered, so that the interpreter does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: click.ClickException, program: str) -> str:
    """One line: what is wrong, and the help page of the command that was used wrongly."""
    context = getattr(error, "ctx", None)
    path = program if context is None else context.command_path
    return f"{' '.join(error.format_message().split())} (see {path} --help)"


def main(program: str = "star-edge") -> None:
    """Entry point: runs a command and turns errors into one line and exit status 2.

    Args:
        program: What the user has typed to start it.
    """
    # Ctrl-C ends the process where it stands: llama_cpp's log callback is Python, in which a KeyboardInterrupt would be
    # lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_standard_streams()
    from ..errors import StarEdgeError

    try:
        status = cli.main(prog_name=program, complete_var=COMPLETE_VARIABLE, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Abort:
        status = 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        status = 2
    except click.ClickException as error:
        click.echo(f"error: {_usage(error, program)}", err=True)
        status = 2
    except StarEdgeError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        status = 2
    except BrokenPipeError:  # the reader of a pipe has gone
        _drop_stdout()
        status = 1
    except OSError as error:
        click.echo(f"error: output cannot be written ({error.strerror or error}): use another place", err=True)
        _drop_stdout()
        status = 2
    sys.exit(status if isinstance(status, int) else 0)
