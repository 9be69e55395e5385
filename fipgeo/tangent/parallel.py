"""Components of many shards in one call, one after another or in processes, with the same bits."""

from __future__ import annotations

import pickle
import traceback
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import preserved_rng
from fipgeo.space import Where
from fipgeo.tangent.component import Component, base_of, fingerprint
from fipgeo.tangent.model import TangentModel

Train = Callable[[TangentModel, Any], Any]
"""What writes tau into a model from the data of one part, in place."""


class PartError(RuntimeError):
    """The training of one part failed.

    Attributes:
        part: Its name.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(part, message)
        self.part, self.message = part, message

    def __str__(self) -> str:
        return f"part {self.part!r}: {self.message}"


def train_parts(
    base: nn.Module,
    parts: Mapping[str, Any],
    train: Train,
    *,
    trainable: Where = None,
    workers: int = 0,
    seed: int = 0,
) -> list[Component]:
    """A component for each part, trained apart from the others about one base.

    Every part begins with tau = 0 and torch's global random stream at a seed of its own, made of `seed` and its name,
    and is computed with as many threads as the caller has set: how many processes there are, and in which order they
    work, changes no bit. The caller's own random stream stays as it is.

    Processes are spawned, so a script calls this under `if __name__ == "__main__":`, and `base`, data, `train` and
    `trainable` are such that they can be pickled: functions of a module, or `functools.partial` of them. Each process
    holds a copy of the base.

    Args:
        base: The module with theta_0, or a tangent model about it.
        parts: Data by names of parts; `train` gets one at a time.
        train: (tangent model, data of a part) -> anything; it writes tau, as
            `functools.partial(fipgeo.fit_square_, kappa=5.0)` does.
        trainable: See `TangentModel`; None for what a tangent model that is given trains.
        workers: How many processes; 0 trains here.
        seed: Of the random streams.

    Returns:
        The components, in the order of the parts.

    Raises:
        PartError: Training failed, with the name of the part; the error of a process is told with its traceback. Parts
            that have not begun are left out.
        TypeError: Something cannot be pickled.
        ValueError: `workers` is negative.

    Examples:
        >>> from functools import partial
        >>> from fipgeo.tangent import fit_square_
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> halves = {"a": (x[:2], y[:2]), "b": (x[2:], y[2:])}
        >>> train_parts(nn.Linear(4, 2), halves, partial(fit_square_, kappa=5.0))
        [Component('a': 10 weights in 2 tensors), Component('b': 10 weights in 2 tensors)]
    """
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected a number of processes, or 0 to train in this one")
    module, code = base_of(base), fingerprint(base)
    if trainable is None and isinstance(base, TangentModel):
        trainable = base.names
    found = _spawned if workers and parts else _here
    tangents = found(module, parts, train, trainable, workers, seed)
    return [Component(name, tangents[name], code) for name in parts]


def _here(
    module: nn.Module, parts: Mapping[str, Any], train: Train, trainable: Where, workers: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    del workers
    out = {}
    for name, data in parts.items():
        try:
            out[name] = _trained(module, name, data, train, trainable, seed)
        except Exception as error:
            raise PartError(name, f"{type(error).__name__}: {error}") from error
    return out


def _spawned(
    module: nn.Module, parts: Mapping[str, Any], train: Train, trainable: Where, workers: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    shared = _pickled("base, train and trainable", (module, train, trainable))
    jobs = {name: _pickled(f"parts[{name!r}]", data) for name, data in parts.items()}
    setting = torch.get_num_threads(), torch.get_default_dtype()
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), mp_context=get_context("spawn"), initializer=_begin, initargs=(shared, setting)
    )
    out: dict[str, dict[str, Tensor]] = {}
    name = next(iter(parts))
    try:
        futures = {name: pool.submit(_work, name, job, seed) for name, job in jobs.items()}
        for name, future in futures.items():
            done, found = future.result()
            if not done:
                raise PartError(name, found)
            out[name] = pickle.loads(found)
    except BrokenProcessPool as error:
        raise PartError(name, "its process, or that of a part beside it, ended without a word (memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return out


def _trained(module: nn.Module, name: str, data: Any, train: Train, trainable: Where, seed: int) -> dict[str, Tensor]:
    model = TangentModel(module, trainable)
    with preserved_rng():
        torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        train(model, data)
    return {n: t.detach().clone() for n, t in model.tangents().items()}


def _pickled(what: str, thing: Any) -> bytes:
    try:
        return pickle.dumps(thing)
    except Exception as error:
        raise TypeError(
            f"{what}: cannot be sent to a process ({error}); use functions of a module in place of lambdas, tensors or"
            " lists in place of loaders with such, or workers=0"
        ) from error


_SHARED: tuple[nn.Module, Train, Where] | None = None
"""What all parts of a worker process have in common."""


def _begin(shared: bytes, setting: tuple[int, torch.dtype]) -> None:
    """Set up a worker process."""
    global _SHARED
    torch.set_num_threads(setting[0])
    torch.set_default_dtype(setting[1])
    _SHARED = pickle.loads(shared)


def _work(name: str, job: bytes, seed: int) -> tuple[bool, Any]:
    """Whether a part was trained, and its tangents or the error in words."""
    assert _SHARED is not None
    module, train, trainable = _SHARED
    try:
        return True, pickle.dumps(_trained(module, name, pickle.loads(job), train, trainable, seed))
    except Exception as error:
        return False, f"{type(error).__name__}: {error}\n\nin its process:\n{traceback.format_exc()}"
