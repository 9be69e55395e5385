"""How much memory of its own a block of code takes at its highest, on Linux."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any


class Peak:
    """The highest anonymous memory of the process inside a `with` block, looked at every millisecond.

    Pages of mapped files do not count: the system takes them back when it wants.

    Attributes:
        top: In bytes, at its highest.
        rise: The same above what it was at the start.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        self.start = self.top = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        self.rise = self.top - self.start

    def _look(self) -> None:
        while not self._done.wait(1e-3):
            self.top = max(self.top, anonymous())


def anonymous() -> int:
    """Bytes of the process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def held_apart() -> None:
    """Have memory above 64 KiB given back to the system as soon as it is free, so that what is used can be seen."""
    threshold = -3  # M_MMAP_THRESHOLD of glibc
    ctypes.CDLL(None).mallopt(threshold, 2**16)
