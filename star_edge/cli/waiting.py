"""What is shown on a terminal until the first token: the phase, the part of it that is done, and the time it takes."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..progress import Progress


class Waiting:
    """A line on stderr inside a `with` block, which is gone after it. It may be entered again.

    It is drawn by a thread of rich, a few times a second; `tell` only notes what to draw.

    Args:
        quiet: Show nothing. Without a terminal on stderr nothing is shown either.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self._bar: Bar | None = None

    def __enter__(self) -> Waiting:
        if self.shown:
            console = Console(stderr=True)
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[share]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
                refresh_per_second=5,
            )
            self._task = self._bar.add_task("starting", total=None, share="", left="")
            self._bar.start()
            # rich hides it, and Ctrl-C, which may end the process where it stands, would leave it so
            console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """A phase whose length is not known."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, total=None, share="", left="")

    def tell(self, progress: Progress) -> None:
        """What `StarVLM.generate` says of its progress."""
        bar = self._bar
        if bar is None:
            return
        if progress.phase == "choose":
            bar.update(self._task, description="choosing image tokens", left="")
            return
        text = "reading the prompt"
        if progress.phase == "encode":
            which = f" {progress.picture} of {progress.n_pictures}" if progress.n_pictures > 1 else ""
            text = f"encoding picture{which}" if which else "encoding the picture"
        known, known_all = progress.done > 0, progress.done == 1
        bar.update(
            self._task,
            description=text,
            total=1.0 if known else None,
            completed=progress.done,
            share=f"{progress.done:.0%}" if known else "",
            left="" if progress.seconds_left is None or known_all else f"about {_duration(progress.seconds_left)} left",
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
