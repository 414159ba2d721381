"""Attempts: how many wrong passwords came, for whom and from where, and who has to wait."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_network
from typing import Literal, TypeAlias

import msgspec

from .errors import TooManyAttempts

_Key: TypeAlias = tuple[Literal["user", "address", "both"], str, str]

_FREE = {"user": 5, "address": 20, "both": 5}
_FIRST_SECONDS, _MOST_SECONDS = 1.0, 60.0
_FORGOTTEN_SECONDS = 900.0
_REMEMBERED = 4096
_LONGEST_NAME = 256


class _Failures(msgspec.Struct):
    count: int = 0
    last: float = 0.0
    until: float = 0.0


class Attempts:
    """Slows down who guesses passwords; each process counts by itself.

    After five wrong ones for a user, or twenty from an address (of IPv6, from its /64), the next
    one is not looked at for a second, then for two, four, and so on up to a minute: a right one
    neither. A quarter of an hour without a wrong one forgets them, a right one those of its user.
    Whoever has logged in from an address before is counted by both together, so that no stranger's
    guesses lock them out.

    `blocked` is told whose passwords are not looked at, `clock` gives seconds. Not `slow`: nobody
    waits.
    """

    def __init__(
        self,
        blocked: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        slow: bool = True,
    ) -> None:
        self._slow = slow
        self._blocked = blocked
        self._clock = clock
        self._failures: OrderedDict[_Key, _Failures] = OrderedDict()
        self._known: OrderedDict[_Key, None] = OrderedDict()

    def check(self, username: str, address: str) -> None:
        """Raises `TooManyAttempts` for who has to wait. No `address` is the trusted socket."""
        now = self._clock()
        found = (self._failures.get(key) for key in self._keys(username, address))
        left = max((one.until - now for one in found if one), default=0.0)
        if left > 0:
            refusal = TooManyAttempts(headers={"Retry-After": str(math.ceil(left))})
            refusal.username = username
            raise refusal

    def failed(self, username: str, address: str) -> None:
        """A password was wrong."""
        now = self._clock()
        for key in self._keys(username, address):
            known = self._failures.pop(key, None)
            if known is None or now - known.last > _FORGOTTEN_SECONDS:
                known = _Failures()
            known.count += 1
            known.last = now
            if (beyond := known.count - _FREE[key[0]]) >= 0:
                known.until = now + min(_FIRST_SECONDS * 2.0 ** min(beyond, 10), _MOST_SECONDS)
                self._blocked(username)
            self._failures[key] = known
        while len(self._failures) > _REMEMBERED:
            self._failures.popitem(last=False)

    def succeeded(self, username: str, address: str) -> None:
        """A password was right."""
        if not address:
            return
        both = _both(username, _network(address))
        for key in (_of_user(username), both):
            self._failures.pop(key, None)
        self._known[both] = None
        self._known.move_to_end(both)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _keys(self, username: str, address: str) -> tuple[_Key, ...]:
        if not (address and self._slow):
            return ()
        network = _network(address)
        both = _both(username, network)
        return (both,) if both in self._known else (_of_user(username), ("address", "", network))


def _network(address: str) -> str:
    """An address, of IPv6 its first 64 bits: who has one of these has all."""
    try:
        network = ip_network((address.partition("%")[0], 64), strict=False)
    except ValueError:
        return address
    return str(network)


def _of_user(username: str) -> _Key:
    return ("user", username[:_LONGEST_NAME], "")


def _both(username: str, address: str) -> _Key:
    return ("both", username[:_LONGEST_NAME], address)
