"""Ending: a process that is told to end does, whatever keeps its loop, its tasks or its threads."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

# The last one is a terminal's that is closed.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = signal.SIGUSR1
WHERE = signal.SIGUSR2
# Ten for the requests that run, and some for the plugins to close.
END_SECONDS = 20.0
HARD_STOP = 128 + signal.SIGINT
# One Ctrl-C may come twice: from the terminal, and from who started us.
_DOUBLED_SECONDS = 0.5


def heeded() -> list[signal.Signals]:
    """Those that end this process: started by nohup, it outlives its terminal."""
    deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPS if not (deaf and number is signal.SIGHUP)]


class Ending:
    """What the signals say: `begin` is called with the first, `hurry` with a Ctrl-C after it."""

    def __init__(self, begin: Callable[[], object], hurry: Callable[[], object]) -> None:
        self._begin = begin
        self._hurry = hurry
        self._since = 0.0
        self.again = False
        """Whether the process is to be started again when it has ended."""

    def heard(self, number: int, _: object = None) -> None:
        """A signal has come."""
        now = time.monotonic()
        # Who is told to end does not come back, whatever was said before or is said after.
        self.again = number == AGAIN and (self.again or not self._since)
        if not self._since:
            self._since = now
            self._begin()
        elif number == signal.SIGINT and now - self._since > _DOUBLED_SECONDS:
            self._hurry()


def alone() -> Ending:
    """The end of a process that nobody else ends: by force, where it does not come in time.

    To be told of signals while the loop is kept busy, it is their handler itself.
    """

    def begin() -> None:
        # No `Thread`: whoever is interrupted here may hold the lock that one takes to start.
        _thread.start_new_thread(force, ())

    def force() -> None:
        time.sleep(END_SECONDS)
        cut_off()
        if ending.again:
            start_again()
        os._exit(0)

    def hurry() -> None:
        cut_off()
        os._exit(HARD_STOP)

    ending = Ending(begin, hurry)
    return ending


def cut_off() -> None:
    """Say that somebody is not waited for."""
    # No stream: who was interrupted may be about to write to it.
    with contextlib.suppress(OSError):
        os.write(2, b"harperpy: what did not end in time is cut off\n")


def start_again() -> NoReturn:
    """Become the command that was given, anew."""
    # What was blocked for the end would stay blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # our own command
