"""In which order plugins start: as config.yaml has them, each after those that it requires."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from .errors import RegistrationError
from .spelling import nearest

Requires = Mapping[str, Sequence[str]]


def required(plugin: object) -> tuple[str, ...]:
    """The plugins that this one says it requires. Raises `RegistrationError` for what is no list.

    A text would be a list of letters to Python, so it is refused like a number.
    """
    names: object = getattr(plugin, "requires", ())
    if isinstance(names, list | tuple):
        given = cast("Sequence[Any]", names)
        if all(isinstance(name, str) for name in given):
            return tuple(given)
    message = f"requires: expected a list of plugins such as ['users'], got {names!r}"
    raise RegistrationError(message)


def missing(needs: Iterable[str], on: Iterable[str], off: Iterable[str]) -> str | None:
    """What is wrong with the names of required plugins, if one is not on."""
    names = list(on)
    for need in needs:
        if need in off:
            return f"it requires '{need}', which config.yaml turns off (plugins.{need}: false)"
        if need not in names:
            hint = nearest(need, names, "plugins")
            return f"it requires '{need}', which is no plugin of config.yaml; {hint}"
    return None


def ordered(requires: Requires) -> tuple[list[str], dict[str, str]]:
    """The names, each after what it requires, and what is wrong with those in a circle.

    Whoever may start next is the first such in the given order. Names that are not given do not
    count.
    """
    left = dict(requires)
    order: list[str] = []
    wrong: dict[str, str] = {}
    while left:
        free = next((name for name in left if not _waits(left[name], left)), None)
        if free is not None:
            names = [free]
        else:
            circles = {name: _circle(name, left) for name in left}
            names = [name for name, circle in circles.items() if circle]
            wrong |= {name: _told(circles[name]) for name in names}
        order += names
        for name in names:
            del left[name]
    return order, wrong


def _waits(needs: Iterable[str], left: Requires) -> bool:
    return any(need in left for need in needs)


def _circle(name: str, requires: Requires) -> tuple[str, ...]:
    """The shortest way from a name back to itself; empty if there is none."""
    ways: deque[tuple[str, ...]] = deque([(name,)])
    seen: set[str] = set()
    while ways:
        way = ways.popleft()
        for need in requires.get(way[-1], ()):
            if need == name:
                return way
            if need not in seen:
                seen.add(need)
                ways.append((*way, need))
    return ()


def _told(circle: tuple[str, ...]) -> str:
    if len(circle) == 1:
        return f"it requires itself: take '{circle[0]}' out of its 'requires'"
    links = ", which requires ".join(f"'{name}'" for name in (*circle[1:], circle[0]))
    return f"it requires {links}: none of them can start first"
