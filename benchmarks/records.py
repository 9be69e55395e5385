"""Benchmark records: one json file a benchmark, in which a repeated run replaces its own figures."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fipgeo

RESULTS = Path(__file__).parent / "results"
KEY = ("case", "method", "figure", "seed")


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fipgeo": fipgeo.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(name: str, records: Sequence[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Merge records into `folder/name.json`; those with the same case, method, figure and seed are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    old = json.loads(path.read_text())["records"] if path.exists() else []
    new = {tuple(r.get(k) for k in KEY): r for r in [*old, *records]}
    body = {
        "environment": environment(),
        "command": f"python benchmarks/{name}.py " + " ".join(sys.argv[1:]),
        "records": list(new.values()),
    }
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
