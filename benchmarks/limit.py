"""A limit of time for what a benchmark calls."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import report

POLL = 0.1  # seconds
QUIET = 10  # polls without a new child: another file may be queued behind the one just compiled


class Exceeded(BaseException):
    """What takes longer than its limit; what was called, which may handle any Exception, does not handle this one."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Ends a block after so many seconds; None: never. For the main thread.

    The block ends between two of Python's instructions: an operator, or a call of another library, is finished first.
    Processes that it has started, such as compilers, are waited for as long again, so that others are not timed beside
    them.

    Raises Exceeded.
    """
    if seconds is None:
        yield
        return

    def ring(number, frame):
        raise Exceeded(f"over the limit of {seconds:g} s: preparing and checking")

    children = _children()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # repeatedly: a destructor would swallow the first
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exceeded:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it may have rung just before the line above
        _wait_for_children(children, seconds)
        raise
    finally:
        signal.signal(signal.SIGALRM, before)


def project(function: Callable[[], object], calls: int, seconds: float | None, clock: type) -> None:
    """Times one call. Raises Exceeded if so many would take longer than the limit; None: no limit, and no call."""
    if seconds is None:
        return
    start = clock.mark()
    function()
    one = clock.seconds(start, clock.mark())
    if calls * one > seconds:
        all_of_them = f"{calls} batches would take {report.number(calls * one)} s, by one of {report.number(one)} s"
        raise Exceeded(f"over the limit of {seconds:g} s: {all_of_them}")


def _children() -> set[int]:
    """The processes that this one has started, where the system lists them."""
    found = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found.update(map(int, listed.read_text().split()))
    return found


def _wait_for_children(others: set[int], seconds: float) -> None:
    """Until there are none but the others, or so many seconds are over."""
    end, quiet = time.monotonic() + seconds, 0
    while quiet < QUIET and time.monotonic() < end:
        time.sleep(POLL)
        quiet = 0 if _children() - others else quiet + 1
