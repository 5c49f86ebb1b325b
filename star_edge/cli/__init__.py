"""The `star-edge` command.

Each subcommand is a thin front end in a module of its own. Errors that a user can mend are one line on stderr, with a remedy,
and exit status 2; a traceback means a bug.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

# Imported when used: `star-edge --help` should not load llama.cpp.
COMMANDS = {
    "run": "Answer a question about images.",
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
        return getattr(importlib.import_module(f".{name}", __name__), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="star-edge")
def cli() -> None:
    """Vision-language GGUF models that do not compute the image tokens that do not matter."""


def _drop_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: runs a command and turns errors into one line and exit status 2."""
    # Ctrl-C ends the process where it stands: llama_cpp's log callback is Python, in which a KeyboardInterrupt would be lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ..errors import StarEdgeError

    try:
        status = cli.main(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Abort:
        status = 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        status = 2
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())} (see star-edge --help)", err=True)
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
