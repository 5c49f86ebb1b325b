"""What somebody may have meant who mistyped a name: in arguments, options, files and requests alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 60  # characters of a name that are compared


def nearest(name: object, known: Iterable[object]) -> str | None:
    """The known name that is most like `name`, or None if none is. Case does not count."""
    by_lower = {str(one).lower(): str(one) for one in known}
    text = str(name) if isinstance(name, (str, bool, type(None))) else ""  # others may print anything
    close = difflib.get_close_matches(text[:_LONGEST].lower(), by_lower, 1)
    return by_lower[close[0]] if close else None


def use_one_of(name: object, known: Iterable[object], more: str = "") -> str:
    """A remedy: what may have been meant, if anything, and all that is known.

    Args:
        name: What was given.
        known: The names that can be used.
        more: What else can be given, such as ", or a file".
    """
    names = [str(one) for one in known]
    near = nearest(name, names)
    start = f"did you mean {near}? Use" if near is not None else "use"
    return f"{start} {'one of ' if len(names) > 1 else ''}{', '.join(names)}{more}"


def did_you_mean(name: object, known: Iterable[object], otherwise: str) -> str:
    """A remedy without the list of what is known, where that is long."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near is not None else otherwise
