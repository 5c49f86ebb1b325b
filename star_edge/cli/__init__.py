"""The `star-edge` command.

Each subcommand is a thin front end in a module of its own. An error that a user can fix is one line on stderr, with a
remedy, and exit status 2. A traceback means a bug.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys

import click

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
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(
                f"No such command {args[0]!r}. "
                + (f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(COMMANDS)}.")
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


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


def _help_of(error: click.ClickException) -> str:
    """The help page of the options that were used wrongly."""
    context = getattr(error, "ctx", None)
    if context is not None:
        return f"{context.command_path} --help"
    command = next((argument for argument in sys.argv[1:2] if argument in COMMANDS), None)
    return f"star-edge {command} --help" if command else "star-edge --help"


def _drop_stdout() -> None:
    """Discards what is still buffered, so that the interpreter does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: runs a command and turns errors into one line and exit status 2."""
    # Ctrl-C ends the process where it stands: llama_cpp's log callback is Python, in which a KeyboardInterrupt would be
    # lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_standard_streams()
    from ..errors import StarEdgeError

    try:
        status = cli.main(prog_name="star-edge", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Abort:
        status = 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        status = 2
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())} (see {_help_of(error)})", err=True)
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
