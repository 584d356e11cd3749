"""The next step's rows, tokens and layout, made in a thread while the device runs this step."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
from collections.abc import Callable

SWITCH_SECONDS = 2e-4  # between threads; with Python's 5 ms the launches of a step would wait for a busy thread


class Prefetcher:
    """Calls `make(step)`, in order, one step ahead. What a step gets does not depend on when it is made.

    In a thread only with `ahead`: on a CPU the step uses all cores itself.
    """

    def __init__(self, make: Callable[[int], object], *, ahead: bool):
        self._make, self._pending = make, None
        self._pool = concurrent.futures.ThreadPoolExecutor(1) if ahead else None

    @contextlib.contextmanager
    def running(self):
        """Keep the thread for the time of the block."""
        before = sys.getswitchinterval()
        if self._pool:
            sys.setswitchinterval(SWITCH_SECONDS)
        try:
            yield self
        finally:
            sys.setswitchinterval(before)
            if self._pool:
                self._pool.shutdown(cancel_futures=True)

    def start(self, step: int) -> None:
        """Begin to make a step in the thread; without one, do nothing."""
        if self._pool:
            self._pending = (step, self._pool.submit(self._make, step))

    def get(self, step: int):
        """Return what `make(step)` returns, or raise its error."""
        pending, self._pending = self._pending, None
        return pending[1].result() if pending and pending[0] == step else self._make(step)
