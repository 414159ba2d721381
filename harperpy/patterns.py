"""Pattern: a mount path with parameters, such as `users/:id` or `files/*path`."""

from __future__ import annotations

from urllib.parse import unquote

from .errors import RegistrationError
from .request import decoded

_STATIC, _PARAMETER, _WILDCARD, _END = range(4)
_KINDS = {":": _PARAMETER, "*": _WILDCARD}


def has_parameters(path: str) -> bool:
    """Whether a mount path is a pattern."""
    return any(segment[:1] in _KINDS for segment in path.split("/"))


class Pattern:
    """`:name` stands for one segment, `*name` at the end for all that is left, one at least.

    `shape` is the path without its names: two of one shape answer the same requests. In the order
    of `rank` the first that matches answers: at the first segment where two differ a fixed one
    goes before a parameter, a parameter before a wildcard, and any before the end.
    """

    __slots__ = ("_segments", "rank", "shape")

    def __init__(self, path: str) -> None:
        """Raises `RegistrationError` for a name that is none or comes twice, or a `*` midway."""
        self._segments = [_segment(text, path) for text in path.split("/")]
        kinds = [kind for kind, _ in self._segments]
        names = [name for kind, name in self._segments if kind != _STATIC]
        if _WILDCARD in kinds[:-1]:
            message = f"{path!r}: '*' takes all that is left of a path, so it can only stand last"
            raise RegistrationError(message)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            message = f"{path!r}: the parameter {twice[0]!r} is named twice"
            raise RegistrationError(message)
        self.rank = (*kinds, _END)
        self.shape = "/".join(
            name if kind == _STATIC else ":*"[kind - 1] for kind, name in self._segments
        )

    def match(self, segments: list[str]) -> tuple[dict[str, str], int] | None:
        """The decoded values, and how many of a path's raw segments they took."""
        values: dict[str, str] = {}
        for at, (kind, name) in enumerate(self._segments):
            if kind == _WILDCARD:
                end = len(segments) - (segments[-1] == "")
                values[name] = "/".join(map(decoded, segments[at:end]))
                return (values, end) if values[name] else None
            if at >= len(segments) or not segments[at]:
                return None
            if kind == _PARAMETER:
                values[name] = decoded(segments[at])
            elif decoded_segment(segments[at]) != name:
                return None
        return values, len(self._segments)


def decoded_segment(segment: str) -> str:
    """A percent-decoded segment; one that would smuggle in a slash stays as it is."""
    told = unquote(segment) if "%" in segment else segment
    return segment if "/" in told else told


def _segment(text: str, path: str) -> tuple[int, str]:
    kind = _KINDS.get(text[:1], _STATIC)
    if kind == _STATIC:
        return kind, text
    name = text[1:] or ("wildcard" if kind == _WILDCARD else "")
    if not name.isidentifier():
        message = f"{path!r}: expected a name after {text[0]!r}, such as '{text[0]}name'"
        raise RegistrationError(message)
    return kind, name
