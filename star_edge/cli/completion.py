"""star-edge completion: the script that makes a shell complete commands, options, presets and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from . import COMPLETE_VARIABLE, cli
from .options import Choice, examples


@click.command(
    epilog=examples(
        'eval "$(star-edge completion bash)"    # in ~/.bashrc',
        'eval "$(star-edge completion zsh)"     # in ~/.zshrc',
        "star-edge completion fish > ~/.config/fish/completions/star-edge.fish",
    )
)
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script for SHELL (bash, zsh or fish). It completes commands, options, presets and files."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "star-edge", COMPLETE_VARIABLE).source())
