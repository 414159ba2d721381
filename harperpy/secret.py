"""Secret: a string that no repr, log line or listing gives away, and the rule that finds others."""

import re
from typing import Any, TypeAlias

REDACTED = "[redacted]"

Plain: TypeAlias = "dict[str, Plain] | list[Plain] | tuple[Plain, ...] | str | float | None"

_WORD = r"key(?!word|board)|token(?!iz)|secret|passw|passphrase|pwd|credential|cookie|authorization"
_NAME = rf"(?:{_WORD})[\w.-]{{0,40}}[\"']?\s*"
_SECRET_KEY = re.compile(rf"{_WORD}|bearer|auth(?:$|[-_. ]|header)", re.IGNORECASE)
_NAMES_THE_SECRET = re.compile(
    r"(?:key|token|secrets?|passw(?:or)?ds?|passphrase|pwd|credentials?)$", re.IGNORECASE
)
_NAMES_A_TIME = re.compile(r"(?:timeout|ttl|seconds|lifetime|expiry)$", re.IGNORECASE)
# The user:password or token of a URL, up to the last @; a port and a path with an @ are none.
_IN_URL = re.compile(r"(://)(?:([^\s/?#:@]*:)(?!\d+[/?#])\S*|[^\s/?#:@]+)@")
_BARE = (
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+", rf"\1 {REDACTED}"),
    (r"\b(?:sk|hk|pk)[-_][\w-]{8,}", REDACTED),
)
# `api_key=…` anywhere, `X-Api-Key: …` outside a path: the host `keycloak:8080` is no header.
_NAMED = (
    rf"(?i)((?:(?<![/\w.@-])[\w.-]{{0,40}}{_NAME}:|{_NAME}=)\s*[\"']?)[^\s&#;,\"']+",
    rf"\1{REDACTED}",
)


class Secret:
    """A string that neither `repr`, `str` nor a log line gives away; `reveal()` does."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The secret itself, for the one place that must send or compare it."""
        return self._text

    def __repr__(self) -> str:
        return REDACTED

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reveal() == self._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))


def decode_hook(kind: type, value: Any) -> Any:
    """Lets `msgspec.convert` make a `Secret` of a string; raises ValueError for any other value."""
    if kind is not Secret:
        raise NotImplementedError(kind)
    if not isinstance(value, str) or not value:
        message = "a secret is a string that is not empty"
        raise ValueError(message)
    return Secret(value)


def encode_hook(value: object) -> Any:
    """Lets `msgspec.to_builtins` write a `Secret` as its mask, never as itself."""
    if isinstance(value, Secret):
        return REDACTED
    raise NotImplementedError(type(value))


def names_secret(key: str) -> bool:
    """Whether what stands under this key is to be hidden if it is a string."""
    return _SECRET_KEY.search(key) is not None and _NAMES_A_TIME.search(key) is None


def mask(text: str) -> str:
    """The text with URL passwords, bearer tokens and `key=value` secrets in it hidden."""
    return re.sub(*_NAMED, mask_bare(text))


def mask_bare(text: str) -> str:
    """The text without URL passwords, bearer tokens and keys of a known form: `sk-…`, `hk_…`.

    For a log, which a `KeyError: 'name'` may stand in.
    """
    if "@" in text:
        text = re.sub(r"\S+", _without_password, text)
    for pattern, shown in _BARE:
        text = re.sub(pattern, shown, text)
    return text


def _without_password(word: re.Match[str]) -> str:
    """The word with what its URLs hold before its last @ hidden.

    Behind that one nothing is looked for: it would take the square of the length.
    """
    head, at, tail = word[0].rpartition("@")
    return _IN_URL.sub(rf"\1\2{REDACTED}@", head + at) + tail


def masked(value: Plain, key: str = "") -> Plain:
    """Plain values, standing under `key`, with every secret in them hidden.

    A key is secret if it contains key, token, secret, password, credential, cookie, authorization
    or bearer, or ends in auth, in any case. Under it, at any depth and in lists, every string is
    hidden unless its own key ends as a time does (`tokenTimeout: 1h`). A number is hidden only if
    its own key ends as the secret itself does (`password: 1234`, not `maxTokens: 512`); true, false
    and null never are. In all other strings, `mask` hides what it knows.
    """
    match value:
        case dict():
            prefix = f"{key}." if _SECRET_KEY.search(key) else ""
            return {name: masked(child, f"{prefix}{name}") for name, child in value.items()}
        case list() | tuple():
            return [masked(child, key) for child in value]
        case str():
            return REDACTED if names_secret(key) else mask(value)
        case int() | float() if not isinstance(value, bool):
            return REDACTED if _NAMES_THE_SECRET.search(key) else value
        case _:
            return value
