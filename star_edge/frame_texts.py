"""What a model's own template writes around the frames of a video.

Each rule is that of the family's processor in transformers. Families whose processor writes nothing get frames side by
side. llama.cpp takes the frames as pictures: models of the Qwen2-VL kind, which fold two frames into one in their own
videos, get each frame for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

Texts = tuple[list[str], str]  # before each frame; after the last


def frame_texts(projector: str | None, n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    """The texts around n frames.

    Args:
        projector: The model's projector type, as its GGUF file has it.
        n: Number of frames.
        seconds: Their times. None: unknown, and no times are written.
        duration: Seconds of the whole video, or None.

    Returns:
        A text before each frame, and one after the last; empty where the family has none.
    """
    write = _OF_FAMILY.get(projector or "")
    return ([""] * n, "") if write is None else write(n, seconds, duration)


def _qwen3(n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    return ([""] * n, "") if seconds is None else ([f"<{second:.1f} seconds>" for second in seconds], "")


def _glm4v(n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    """The time comes after its frame."""
    if seconds is None:
        return [""] * n, ""
    texts = [f"{int(second)}" for second in seconds]
    return ["", *texts[:-1]], texts[-1]


def _internvl(n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    return [f"{'' if i == 0 else chr(10)}Frame{i + 1}: " for i in range(n)], ""


def _gemma4(n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    if seconds is None:
        return [""] * n, ""
    return [f"{'' if i == 0 else ' '}{_clock(second)} " for i, second in enumerate(seconds)], ""


def _smolvlm(n: int, seconds: Sequence[float] | None, duration: float | None) -> Texts:
    if seconds is None:
        return [""] * n, ""
    whole = int(seconds[-1] if duration is None else duration)
    length = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    intro = f"You are provided the following series of {_in_words(n)} frames from a {length} [H:MM:SS] video.\n"
    before = [f"\nFrame from {_clock(second)}:" for second in seconds]
    return [intro + before[0], *before[1:]], "\n\n"


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _in_words(n: int) -> str:
    """A number as num2words writes it, up to 999."""
    if n < 20:
        return _UNITS[n]
    if n < 100:
        tens = _TENS[n // 10 - 2]
        return tens if n % 10 == 0 else f"{tens}-{_UNITS[n % 10]}"
    rest = f" and {_in_words(n % 100)}" if n % 100 else ""
    return f"{_UNITS[n // 100]} hundred{rest}"


_OF_FAMILY: dict[str, Callable[[int, Sequence[float] | None, float | None], Texts]] = {
    "qwen3vl_merger": _qwen3,
    "glm4v": _glm4v,
    "internvl": _internvl,
    "gemma4v": _gemma4,
    "gemma4uv": _gemma4,
    "idefics3": _smolvlm,
}
