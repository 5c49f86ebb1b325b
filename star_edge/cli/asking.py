"""What `star-edge eval` and `star-edge tune` share: the engine, the results file and the progress bar around the
questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import __version__
from ..evaluation.configs import NamedConfig
from ..evaluation.results import Record, Results, fingerprint_file
from ..evaluation.runner import run_tasks
from ..evaluation.tasks import Task
from .options import AFRESH, load_engine

Ask = Callable[[Sequence[Task], Sequence[NamedConfig]], Mapping[tuple[str, str], Record]]


@contextmanager
def asking(
    model: dict[str, Any],
    questions: Sequence[Task],
    configs: Sequence[NamedConfig],
    *,
    out: str | None,
    fresh: bool,
    metric: str | None,
    max_tokens: int,
    prompt_suffix: str,
    quiet: bool,
) -> Iterator[Ask]:
    """Yields ask(tasks, configs): answers what is missing, with a progress bar unless quiet or no terminal, and returns
    all records.

    model: the parameters of `options.model_options`. questions, configs: all that may be asked. out: results file, or
        None.

    Raises:
        EvaluationError: see `Results`. Errors of the model files as `load_engine` has them.
    """
    prompt_suffix = prompt_suffix.replace("\\n", "\n")
    options = {name: value for name, value in model.items() if name not in _FILES}
    if options["chat_template"] is None:  # as in files of results from before it could be given
        del options["chat_template"]
    header = {
        "star_edge": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "metric": metric,
        "max_tokens": max_tokens,
    }
    header |= {"prompt_suffix": prompt_suffix, **options}
    console = Console(stderr=True)
    with load_engine(**model, **AFRESH) as vlm:
        text_model = vlm.llama.model_path
        mmproj = vlm.encoder.path if vlm.encoder is not None else None
        files = {"model": fingerprint_file(text_model), "mmproj": fingerprint_file(mmproj) if mmproj else None}
        with Results(out, {**files, **header}, questions, configs, fresh) as results:
            progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=quiet or not console.is_terminal,
            )

            def ask(tasks: Sequence[Task], configs: Sequence[NamedConfig]) -> Mapping[tuple[str, str], Record]:
                bar = progress.add_task("asking", total=len(tasks) * len(configs))
                run_tasks(
                    vlm,
                    tasks,
                    configs,
                    results,
                    metric=metric,
                    max_tokens=max_tokens,
                    prompt_suffix=prompt_suffix,
                    progress=lambda n: progress.advance(bar, n),
                )
                progress.remove_task(bar)
                return results.records

            with progress:
                console.show_cursor(
                    True
                )  # rich hides it, and Ctrl-C, which ends the process where it stands, would leave it so
                yield ask


# Their content is in the header, as fingerprints
_FILES = ("model", "mmproj", "hf_repo", "no_mmproj", "verbose")
