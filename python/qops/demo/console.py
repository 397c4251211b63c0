"""What the demo shows while it works: errors of one sentence, and progress that suits a terminal or a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TextIO

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_MODEL = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_STARTED = time.monotonic()


class DemoError(Exception):
    """A failure the user can act on. Its text is printed as it stands, without a traceback."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def note(text: str) -> None:
    """Print one diagnostic line to stderr, so that stdout holds nothing but the answer and the tables."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_afterwards() -> Iterator[None]:
    """What others warn about inside is shown when it ends, not in the middle of an answer."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def megabytes(count: int) -> str:
    """`count` bytes as decimal megabytes, the unit in which downloads and memory bandwidth are quoted."""
    return f"{count / 1e6:,.1f} MB"


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, so that the interpreter's own start and every import count.

    Falls back to the time since this module was imported where /proc does not tell.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            # The command name (field 2) may hold spaces and brackets: count fields from behind its last bracket.
            started_ticks = int(stat.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = -1.0
    since_import = time.monotonic() - _STARTED
    # A sandbox may report a start before its own boot or after now; the import time is then the honest lower bound.
    return age if since_import <= age < since_import + 600 else since_import


class Progress:
    """Progress of a known number of bytes: one line that updates on a terminal, ten quiet dots anywhere else.

    Use as a context manager; `update(done)` takes the total so far and never goes back.
    """

    _DOTS = 10
    _MIN_INTERVAL_S = 0.1

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = max(total, 1)
        self.stream = sys.stderr if stream is None else stream
        self.is_tty = self.stream.isatty()
        self._done = 0
        self._dots = 0
        self._last_drawn = float("-inf")

    def __enter__(self) -> Progress:
        if not self.is_tty:
            self._write(f"{self.label} ")
        self.update(0)
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is not None:
            self._write("\n")
        elif self.is_tty:
            self._write(f"\r\033[K{self.label}, {megabytes(self.total)}: done\n")
        else:
            self.update(self.total)
            self._write(" done\n")

    def update(self, done: int) -> None:
        self._done = min(max(done, self._done), self.total)
        if self.is_tty:
            now = time.monotonic()
            if now - self._last_drawn >= self._MIN_INTERVAL_S:
                self._last_drawn = now
                percent = 100 * self._done // self.total
                self._write(f"\r\033[K{self.label}, {megabytes(self.total)}: {percent} %")
        else:
            dots = self._done * self._DOTS // self.total
            self._write("." * (dots - self._dots))
            self._dots = dots

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
