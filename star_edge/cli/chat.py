"""star-edge chat: a conversation about pictures, at a terminal or through a pipe."""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
import numpy as np

from ..answers import AnswerStream
from ..engine import StarVLM
from ..errors import ConfigError, ContextLengthError, InputFileError, RequestCancelledError, StarEdgeError
from ..io.configs import resolve_prune
from ..io.image_limits import ImageLimits
from ..io.images import load_message_image
from ..io.json_input import MAX_CHARACTERS
from ..pruning.presets import PRESETS
from ..report import PruneReport
from ..suggestions import did_you_mean
from .batch import SOME_FAILED
from .options import (
    cli_words,
    examples,
    load_engine,
    model_options,
    quiet_option,
)
from .pruning import Pruning, prune_options
from .run import summary
from .sampling import Sampling, sampling_options
from .waiting import Waiting

_PROMPT, _CONTINUED = "> ", ". "
_BLOCK = '"""'
COMMANDS = {
    "/image": "PATH: ask the next question about this picture too, a file or a URL; without PATH about none that wait",
    "/preset": "NAME: prune with another preset, or a file of star-edge tune; without NAME show them",
    "/system": "TEXT: the system message; without TEXT none",
    "/reset": "begin a new conversation",
    "/report": "what was pruned for the last answer, and where the time went",
    "/help": "show this",
    "/exit": "end (Ctrl-D too)",
}


@click.command(epilog=examples("star-edge chat -m text.gguf --mmproj mmproj.gguf --image a.jpg"))
@click.option(
    "--image", "images", multiple=True, help="Picture of the first question, file or URL; repeat for several."
)
@model_options
@prune_options
@sampling_options
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each answer.")
def chat(
    images: tuple[str, ...],
    pruning: Pruning,
    sampling: Sampling,
    quiet: bool,
    as_json: bool,
    **model: Any,
) -> int:
    """Chat about pictures: several turns, several pictures.

    Each line is a question. \"\"\" begins and ends one of several lines. /image PATH adds a picture, /help shows all
    commands. Ctrl-C ends an answer, Ctrl-D the conversation. A second question about a picture does not read it again.

    Through a pipe each line of stdin is a question or a command. The exit status is 3 when some could not be answered.
    """
    config = pruning.config()
    options = {"max_tokens": sampling.max_tokens, **sampling.options()}
    pictures = [_load(path) for path in images]
    waiting = Waiting(quiet)
    with waiting:
        waiting.say("loading the model")
        vlm = load_engine(**model)
    is_terminal = sys.stdin.isatty()
    with vlm, _Interrupts(is_terminal) as interrupts:
        conversation = _Conversation(
            vlm, config, pruning.preset, sampling.system, pictures, options, waiting, interrupts
        )
        conversation.quiet, conversation.as_json = quiet, as_json
        if is_terminal:
            _complete()
            if not quiet:
                _say("/help lists commands, Ctrl-C ends an answer, Ctrl-D the conversation")
        while (line := _read_question(is_terminal)) is not None:
            try:
                if not conversation.take(line):
                    break
            except StarEdgeError as error:
                conversation.n_failed += 1
                _tell(error, as_json)
            except KeyboardInterrupt:  # while a picture was fetched
                _say("[stopped]")
    return SOME_FAILED if conversation.n_failed and not is_terminal else 0


class _Conversation:
    """A conversation with an engine. An error or Ctrl-C leaves it as it was before the question.

    Attributes:
        n_failed: Questions and commands that failed.
    """

    def __init__(
        self,
        vlm: StarVLM,
        config: Any,
        preset: str,
        system: str | None,
        pictures: list[np.ndarray],
        options: dict[str, Any],
        waiting: Waiting,
        interrupts: _Interrupts,
    ) -> None:
        self._vlm, self._config, self._preset, self._system = vlm, config, preset, system
        self._pictures, self._options = pictures, options  # pictures: of the next question
        self._waiting, self._interrupts = waiting, interrupts
        self._messages: list[dict[str, Any]] = []
        self._report: PruneReport | None = None
        self._noted: set[str] = set()
        self._at_start = True  # of an answer
        self.quiet = self.as_json = False
        self.n_failed = 0

    def take(self, line: str) -> bool:
        """Does what a line says. Returns whether the conversation goes on.

        Raises:
            StarEdgeError: It cannot be done.
        """
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line)
            return True
        if name in ("/exit", "/quit"):
            return False
        if name not in COMMANDS:
            remedy = did_you_mean(
                name, COMMANDS, f"use one of {', '.join(COMMANDS)}; a question begins with another sign"
            )
            raise ConfigError(f"there is no command {name[:60]!r}", remedy)
        commands = {
            "/image": self._add_image,
            "/preset": self._set_preset,
            "/system": self._set_system,
            "/reset": self._begin_anew,
            "/report": self._show_report,
            "/help": self._show_help,
        }
        commands[name](rest.strip())
        return True

    # ---- questions ----

    def _ask(self, question: str) -> None:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self._pictures]
        message: dict[str, Any] = {"role": "user", "content": question}
        if content:
            message["content"] = [*content, {"type": "text", "text": question}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        answer: AnswerStream | None = None
        try:
            for piece in self._pieces([*system, *self._messages, message]):
                if isinstance(piece, AnswerStream):
                    answer = piece
                elif not self.as_json:
                    self._print(piece)
        except ContextLengthError as error:
            remedy = f"{error.remedy}, or begin anew with /reset" if self._messages else error.remedy
            raise ContextLengthError(error.cause, remedy) from error
        except RequestCancelledError:
            _say("\n[stopped]" if answer is not None and answer.text else "[stopped: the question was taken back]")
            if answer is None or not answer.text:
                return
        else:
            self._end_line()
        self._at_start = True
        assert answer is not None  # which has come before its pieces, or an error has
        self._report = answer.report
        self._messages += [message, dict(answer.message)]
        self._pictures = []
        self._conclude(answer)

    def _conclude(self, answer: AnswerStream) -> None:
        report = answer.report
        if self.as_json:
            reason = answer.finish_reason or "stopped"
            _print_json({"text": answer.text, "finish_reason": reason, "report": report.figures()})
        if self.quiet:
            return
        if answer.finish_reason == "length":
            _say(f"[cut: --max-tokens is {self._options['max_tokens']}, and the context {self._vlm.llama.n_ctx()}]")
        _say(f"[{report.summary().splitlines()[0]}]")
        for note in report.notes:
            if note not in self._noted:
                self._noted.add(note)
                _say(f"[note: {cli_words(note)}]")

    def _print(self, piece: str) -> None:
        """A piece of the answer, without the space that it begins with in many vocabularies."""
        piece = piece.lstrip() if self._at_start else piece
        if piece:
            self._at_start = False
            click.echo(piece, nl=False)
            sys.stdout.flush()

    def _end_line(self) -> None:
        if not self.as_json:
            click.echo()

    def _pieces(self, messages: list[dict[str, Any]]) -> Iterator[AnswerStream | str]:
        """The stream, then its pieces. They come from a thread, so that Ctrl-C is seen at once.

        Raises:
            RequestCancelledError: Ctrl-C was pressed.
            StarEdgeError: As StarVLM.chat.
        """
        arrived: queue.Queue[AnswerStream | str | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                with self._vlm.cancellable(stop.is_set):
                    stream = self._vlm.chat(
                        messages, (), self._config, stream=True, progress=self._waiting.tell, **self._options
                    )
                arrived.put(stream)
                for piece in stream:
                    arrived.put(piece)
                arrived.put(None)
            except BaseException as error:
                arrived.put(error)

        with self._interrupts.ending_an_answer(lambda: self._waiting.say("stopping")) as stop:
            thread = threading.Thread(target=work, name="star-edge chat")
            with self._waiting:
                self._waiting.say("starting")
                thread.start()
                item = _next(arrived)
            try:
                while item is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield item
                    item = _next(arrived)
            finally:  # whoever reads the output may have gone
                stop.set()
                thread.join()

    # ---- commands ----

    def _add_image(self, path: str) -> None:
        if not path:
            n, self._pictures = len(self._pictures), []
            self._about(f"{n} pictures taken back" if n else "no picture waits; /image PATH adds one")
            return
        self._pictures.append(_load(path))
        height, width = self._pictures[-1].shape[:2]
        self._about(f"picture {len(self._pictures)} of the next question: {width} x {height} pixels")

    def _set_preset(self, name: str) -> None:
        if name:
            self._config, self._preset = resolve_prune(name), name
        others = ", ".join(one for one in PRESETS if one != self._preset)
        self._about(f"preset {self._preset}" + ("" if name else f"; others: {others}"))

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._about("system message set" if text else "no system message")

    def _begin_anew(self, _: str) -> None:
        self._messages, self._pictures, self._report = [], [], None
        self._about("a new conversation")

    def _show_report(self, _: str) -> None:
        _say("nothing has been answered yet" if self._report is None else summary(self._report))

    def _show_help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for name, about in COMMANDS.items():
            _say(f"{name:{width}}  {about}")

    def _about(self, text: str) -> None:
        if not self.quiet:
            _say(f"[{text}]")


# ---- input ----


class _Interrupts:
    """What Ctrl-C does. At a terminal it drops the line that is typed, or ends the answer that comes; a second one in
    the same answer ends the process. Through a pipe it ends the process, as in all commands.
    """

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal

    def __enter__(self) -> _Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        if self._is_terminal:  # raises KeyboardInterrupt: nothing of llama.cpp runs in this thread, which would lose it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def ending_an_answer(self, on_stop: Callable[[], None]) -> Iterator[threading.Event]:
        """Ctrl-C inside the block sets the event."""
        stop = threading.Event()

        def handle(number: int, frame: Any) -> None:
            stop.set()
            on_stop()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a decode may take long: the second one does not wait for it

        if self._is_terminal:
            signal.signal(signal.SIGINT, handle)
        try:
            yield stop
        finally:
            if self._is_terminal:
                signal.signal(signal.SIGINT, signal.default_int_handler)


def _next(arrived: queue.Queue[Any]) -> Any:
    while True:
        with suppress(queue.Empty):  # a wait without an end cannot be interrupted on Windows
            return arrived.get(timeout=0.5)


def _read_question(is_terminal: bool) -> str | None:
    """The next line that is not blank, or several in triple quotes. None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = _read_line(_CONTINUED if lines else _PROMPT, is_terminal)
        except KeyboardInterrupt:
            lines = []
            _say("")
            continue
        if line is None:
            if is_terminal:
                _say("")
            return "\n".join(lines).replace(_BLOCK, "").strip() or None
        if not lines and not line.strip():
            continue
        lines.append(line)
        text = "\n".join(lines).strip()
        if not text.startswith(_BLOCK):
            return text
        if text.count(_BLOCK) > 1:
            text = text.replace(_BLOCK, "").strip()
            if text:
                return text
            lines = []


def _read_line(prompt: str, is_terminal: bool) -> str | None:
    try:
        if is_terminal and sys.stdout.isatty():
            return input(prompt)
        if is_terminal:
            click.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline(MAX_CHARACTERS)
        return line.rstrip("\n") if line else None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise ConfigError("stdin is not UTF-8 text", "convert it") from error


def _complete() -> None:
    """Line editing, history and the Tab key, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        return

    def complete(text: str, n: int) -> str | None:
        found = list(_completions(readline.get_line_buffer(), text))
        return found[n] if n < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def _completions(line: str, text: str) -> Iterator[str]:
    """What the word `text` at the end of a line may become."""
    if line == text:
        yield from (f"{name} " for name in COMMANDS if name.startswith(text) and text.startswith("/"))
    elif line.startswith("/preset "):
        yield from (name for name in PRESETS if name.startswith(text))
    elif line.startswith("/image "):
        folder, name = os.path.split(text)
        with suppress(OSError):
            for entry in sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name):
                if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
                    yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")


def _load(path: str) -> np.ndarray:
    """The pixels of a picture. A path may be quoted, as terminals write one that is dropped there."""
    if not os.path.lexists(os.path.expanduser(path)) and "://" not in path:
        with suppress(ValueError):
            words = shlex.split(path)
            path = words[0] if len(words) == 1 else path
    return load_message_image(path, ImageLimits())


# ---- output ----


def _say(text: str) -> None:
    """About the conversation, not of it."""
    click.echo(text, err=True)


def _print_json(data: dict[str, Any]) -> None:
    """One line."""
    click.echo(json.dumps(data, allow_nan=False))
    sys.stdout.flush()


def _tell(error: StarEdgeError, as_json: bool) -> None:
    text = " ".join(str(error).split())
    if not isinstance(error, InputFileError):  # fields of a file have the file's names
        text = cli_words(text)
    if as_json:
        _print_json({"error": text})
    else:
        _say(f"error: {text}")
