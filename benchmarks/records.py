"""Benchmark records: one json file a benchmark, in which a repeated run replaces its own figures.

Two processes may write to one file at once: each merges its records into what is there under a lock, and the file is
replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fipgeo

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None

RESULTS = Path(__file__).parent / "results"
KEY = ("case", "method", "figure", "seed")


def environment() -> dict[str, Any]:
    """What the figures depend on; in a file, that of its last run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fipgeo": fipgeo.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of `folder/name.json`; none if there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["records"] if path.exists() else []


def measured(name: str, key: str = "value", **about: Any) -> list[Any]:
    """What `key` is in the records that fit a description, in the order of the file.

    Sentences of the documentation are made from these when it is built.

    Args:
        name: Of the file.
        key: Which entry of a record.
        about: Entries of the records meant: figure, case, method, ...

    Raises:
        LookupError: If no record fits.
    """
    values = [r[key] for r in read(name) if all(r.get(k) == v for k, v in about.items())]
    if not values:
        raise LookupError(f"{name}.json has no record with {about}")
    return values


def write(name: str, records: Sequence[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Merge records into `folder/name.json`; those with the same case, method, figure and seed are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with _locked(path):
        new = {tuple(r.get(k) for k in KEY): r for r in [*read(name, folder), *records]}
        body = {
            "environment": environment(),
            "command": _command(),
            "records": list(new.values()),
        }
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
        os.replace(fresh, path)
    return path


def _command() -> str:
    """What was typed, but for the folder of the records."""
    script, *words = sys.argv
    if "--folder" in words:
        at = words.index("--folder")
        del words[at : at + 2]
    return " ".join(["python -m", f"benchmarks.{Path(script).stem}", *words])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with a file among the processes of this machine; the lock is a file of its own in the temporary folder."""
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"fipgeo-{mark}.lock", "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
