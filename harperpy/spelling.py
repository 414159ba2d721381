"""What helps after a name that nobody knows: the nearest one that somebody does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Nothing is called by a longer name, and to compare a body of one takes a second.
_LONGEST = 256


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The nearest of the known names, whatever their case, dashes and underscores, or None.

    `likeness` is how near it has to be: 1 is the same, as `difflib` counts.
    """
    if len(name) > _LONGEST:
        return None
    spelled = {_letters(each): each for each in known}
    near = difflib.get_close_matches(_letters(name), spelled, n=1, cutoff=likeness)
    return spelled[near[0]] if near else None


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """The half-sentence that helps after a name that nobody knows."""
    names = sorted(known)
    if near := closest(name, names):
        return f"did you mean '{near}'?"
    listed = ", ".join(names)
    return f"the known {what} are {listed}" if listed else f"there are no {what}"


def _letters(name: str) -> str:
    return re.sub("[-_]", "", name).lower()
