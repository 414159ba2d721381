"""Leaves: what a key of config.yaml may hold, how its text is read, and how a refusal words it."""

import datetime as dt
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from .document import Tree
from .secret import Secret

_TIME_UNITS = {"": 1, "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DECIMAL_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_BYTE_UNITS = {**_DECIMAL_BYTES, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _in_units(units: Mapping[str, int]) -> Callable[[Tree], Tree]:
    def parse(value: Tree) -> Tree:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", value, re.IGNORECASE | re.ASCII)
        if match is None or match[2].lower() not in units:
            raise ValueError(value)
        return int(match[1]) * units[match[2].lower()]

    return parse


def _false_is_zero(value: Tree) -> Tree:
    if isinstance(value, int | float) and 0 < value < 0.1:
        raise ValueError(value)
    return 0 if value is False else value


def as_it_is(value: Tree) -> Tree:
    """How a value is read whose type says nothing of it."""
    return value


def _null_is_true(value: Tree) -> Tree:
    return True if value is None else value


def _no_bare_variable(value: Tree) -> Tree:
    # A file that it was read from may have left its newline there, which no header takes.
    if isinstance(value, str) and (re.match(r"\$|os\.environ\b", value) or not value.isprintable()):
        raise ValueError
    return value


_TIME = {"parse": _in_units(_TIME_UNITS)}
_TIME_TEXT = "a duration such as '30m', '12h' or '1d', or a number of milliseconds"
_SIZE_TEXT = "a size such as '10MB', or a number of bytes above 0"

Flag = Annotated[bool, Meta(description="true or false")]
Text = Annotated[str, Meta(min_length=1, description="a string that is not empty")]
FilePath = Annotated[str, Meta(pattern=r"^[^\x00]+$", description="the path of a folder or a file")]
Host = Annotated[
    str,
    # What is between two dots has a length, or no resolver takes it; one colon is for a port.
    Meta(
        pattern=r"^(?![^:]*:[^:]*$)[^\s\x00./]{1,63}(\.[^\s\x00./]{1,63})*\.?$",
        description="the name of a host or its address",
    ),
]
ApiKey = Annotated[
    Secret,
    Meta(
        description='a key of one line that is not empty, or "${NAME}" for that of the environment',
        extra={"parse": _no_bare_variable},
    ),
]
Kind = Annotated[str, Meta(min_length=1, description="a kind of backend, such as echo or openai")]
Port = Annotated[int, Meta(ge=0, le=65535, description="an integer between 0 and 65535")]
Positive = Annotated[int, Meta(ge=1, description="an integer above 0")]
WorkerCount = Annotated[
    Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"],
    Meta(description="an integer between 1 and 1024, or auto"),
]
Count = Annotated[int, Meta(ge=0, description="an integer of 0 or more")]
# More no store could count.
Limit = Annotated[int, Meta(ge=1, le=2**53, description="an integer between 1 and 2^53")]
LimitOrZero = Annotated[int, Meta(ge=0, le=2**53, description="an integer between 0 and 2^53")]
Size = Annotated[int, Meta(ge=1, description=_SIZE_TEXT, extra={"parse": _in_units(_BYTE_UNITS)})]
SizeOrOff = Annotated[
    int,
    Meta(
        ge=0,
        description="a size such as '10MB', or a number of bytes (0 is off)",
        extra={"parse": _in_units(_BYTE_UNITS)},
    ),
]
Duration = Annotated[int, Meta(ge=1, description=_TIME_TEXT, extra=_TIME)]
# SQLite counts it in an int of 32 bits.
LockTimeout = Annotated[
    int, Meta(ge=1, le=2**31 - 1, description=f"{_TIME_TEXT}, up to 24 days", extra=_TIME)
]
DurationOrOff = Annotated[int, Meta(ge=0, description=f"{_TIME_TEXT} (0 is off)", extra=_TIME)]
SecondsOrOff = Annotated[
    float,
    Meta(
        le=86_400,
        description="a number of seconds from 0.1 to 86400 (0, less or false is off)",
        extra={"parse": _false_is_zero},
    ),
]
Patience = Annotated[int, Meta(ge=0, description=f"{_TIME_TEXT} (0 is not at all)", extra=_TIME)]
HttpUrl = Annotated[str, Meta(pattern="^https?://.", description="an http:// or https:// URL")]
SqliteUrl = Annotated[
    str,
    Meta(
        pattern=r"^sqlite:///(?!:memory:$)[^\x00]+$",
        description="an SQLite URL such as sqlite:///data/system.db (no other database works yet)",
    ),
]
Level = Annotated[
    Literal["debug", "info", "warn", "error"], Meta(description="debug, info, warn or error")
]
HashFunction = Annotated[Literal["argon2id"], Meta(description="argon2id")]
Durability = Annotated[Literal["process", "fsync"], Meta(description="process or fsync")]
Money = Annotated[float, Meta(ge=0, le=1e9, description="an amount of money (0 is free)")]
Day = Annotated[dt.date, Meta(description="a day such as 2026-01-31")]
Dimension = Annotated[
    Literal["key", "user", "tenant", "model", "backend"],
    Meta(description="key, user, tenant, model or backend"),
]
Period = Annotated[Literal["day", "month"], Meta(description="day or month")]
TransportName = Annotated[Literal["own", "aiohttp"], Meta(description="own or aiohttp")]
Unpriced = Annotated[Literal["refuse", "allow"], Meta(description="refuse or allow")]
MeterStore = Annotated[
    str,
    Meta(
        pattern=r"^(memory|database|valkeys?://[^/?#]+(/[0-9]*)?(\?[^#]*)?)$",
        description="memory, database or a URL such as valkey://127.0.0.1:6379/0",
    ),
]
PluginBlock = Annotated[
    bool | dict[str, Any],
    Meta(description="true, false or a map of options", extra={"parse": _null_is_true}),
]
