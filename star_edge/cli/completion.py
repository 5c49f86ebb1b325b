"""star-edge completion: the script that makes a shell complete commands, options, presets and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .options import Choice, examples

VARIABLE = "_STAR_EDGE_COMPLETE"  # click's own name for a command called star-edge


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
    from . import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "star-edge", VARIABLE).source())
