"""Batches: every kind of input, the same order in every pass, no trace in anybody's random streams."""

import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from fipgeo import as_batches
from fipgeo.data import Batches, ListBatches, LoaderBatches, TensorBatches, preserved_rng
from fipgeo.trees import same_batch

from .hygiene import unchanged

X = torch.arange(20.0, dtype=torch.float64).reshape(10, 2)
Y = torch.arange(10)


def joined(batches: Batches) -> list[float]:
    """First column of every example, in the order of the batches."""
    first = (b[0] if isinstance(b, list | tuple) else b["x"] if isinstance(b, dict) else b for b in batches)
    return torch.cat(list(first))[:, 0].tolist()


IN_ORDER = X[:, 0].tolist()


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (X, TensorBatches),
        (X.numpy(), TensorBatches),
        ({"x": X, "y": Y}, TensorBatches),
        ((X, Y), TensorBatches),
        ([X[:4], X[4:]], ListBatches),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])], ListBatches),
        (([X[:4], Y[:4]], [X[4:], Y[4:]]), ListBatches),
        (DataLoader(TensorDataset(X, Y), batch_size=3), LoaderBatches),
    ],
)
def test_every_kind_can_be_passed_over_again(inputs: Any, kind: type[Batches]) -> None:
    batches = as_batches(inputs)
    assert isinstance(batches, kind) and as_batches(batches) is batches
    assert joined(batches) == joined(batches) == IN_ORDER
    assert same_batch(batches.first(), next(iter(batches)))


@given(size=st.integers(1, 12))
def test_batch_sizes(size: int) -> None:
    lengths = [len(batch) for batch in as_batches(X, batch_size=size)]
    assert sum(lengths) == 10 and all(n == min(size, 10) for n in lengths[:-1]) and 0 < lengths[-1] <= size


class Words(Dataset):
    """A data set that is no more than its two methods."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return X[index]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, r"inputs: got 0 examples \(shape \[0, 3\]\); expected at least one"),
        ([], ValueError, "inputs: got an empty list; expected at least one batch"),
        ((), ValueError, "inputs: got an empty list"),
        (torch.zeros(()), ValueError, "inputs: tensors of lengths None; expected one common number"),
        ({"x": X, "y": Y[:3]}, ValueError, "inputs: tensors of lengths 10, 3; expected one common number"),
        ((X, Y[:3]), ValueError, r"lengths 10, 3; expected one common .* \(a list, not a tuple, holds batches\)"),
        ((x for x in X), TypeError, r"inputs: got generator, which can be passed over only once; .* list\(inputs\)"),
        (iter([X]), TypeError, "inputs: got list_iterator, which can be passed over only once"),
        (map(len, [X]), TypeError, "inputs: got map, which can be passed over only once"),
        (TensorDataset(X), TypeError, "inputs: got the data set TensorDataset; wrap it in a DataLoader"),
        (Words(), TypeError, "inputs: got the data set Words; wrap it in a DataLoader"),
        (Stream(), TypeError, "inputs: got the data set Stream; wrap it in a DataLoader"),
        ({"x": X, "name": "digits"}, TypeError, r"inputs: got a mapping with entries of \['str'\]; expected tensors"),
        ("digits", TypeError, "inputs: got str; expected a tensor, a list of batches or a re-iterable loader"),
        (None, TypeError, "inputs: got NoneType; expected a tensor"),
        (3, TypeError, "inputs: got int; expected a tensor"),
    ],
)
def test_bad_inputs(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_batches(inputs)


def test_bad_batch_sizes() -> None:
    with pytest.raises(ValueError, match="batch_size: got 0, expected at least 1"):
        as_batches(X, batch_size=0)
    with pytest.raises(ValueError, match="batch_size: got 4, but keep already comes in batches; leave batch_size out"):
        as_batches([X], batch_size=4, argument="keep")


def test_an_empty_loader_has_no_first_batch() -> None:
    with pytest.raises(ValueError, match="inputs: no batch came; expected at least one example"):
        as_batches(DataLoader(TensorDataset(X), batch_size=20, drop_last=True)).first()


class Shaky(Dataset):
    """Noise from all three global streams on every example, as augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return X[index] + torch.rand(1) + np.random.rand() + random.random()


def loaders() -> dict[str, DataLoader]:
    """Loaders that draw their order in every way there is."""
    data = TensorDataset(X, Y)
    own = torch.Generator().manual_seed(7)
    torch.rand(3, generator=own)
    return {
        "global": DataLoader(data, batch_size=3, shuffle=True),
        "own generator": DataLoader(data, batch_size=3, shuffle=True, generator=own),
        "sampler": DataLoader(data, batch_size=3, sampler=RandomSampler(data, generator=own)),
        "weighted": DataLoader(data, batch_size=3, sampler=WeightedRandomSampler([1.0] * 10, 10, replacement=False)),
        "augmented": DataLoader(Shaky(), batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("name", loaders())
def test_a_shuffling_loader_gives_one_order_and_moves_no_stream(name: str) -> None:
    loader = loaders()[name]
    with unchanged(nn.Linear(1, 1), loader):
        batches = as_batches(loader)
        first = [batch[0] if isinstance(batch, list) else batch for batch in batches]
        again = [batch[0] if isinstance(batch, list) else batch for batch in batches]
        assert all(map(torch.equal, first, again)) and not torch.equal(
            torch.cat(first), torch.cat(first).sort(0).values
        )
        other = [batch[0] if isinstance(batch, list) else batch for batch in batches.shuffled(5)]
        assert not all(map(torch.equal, first, other))
    expected = torch.Generator().manual_seed(1)
    with preserved_rng():
        torch.default_generator.manual_seed(1)
        for batch, before in zip(batches, first, strict=True):  # nor do draws of the caller between batches matter
            assert torch.equal(torch.rand(2), torch.rand(2, generator=expected))
            assert torch.equal(batch[0] if isinstance(batch, list) else batch, before)


@pytest.mark.parametrize("name", loaders())
def test_a_pass_that_is_left_early_leaves_no_trace(name: str) -> None:
    loader = loaders()[name]
    batches = as_batches(loader)
    with unchanged(nn.Linear(1, 1), loader):
        kept = iter(batches)  # still alive when the streams are looked at
        next(kept)
    with unchanged(nn.Linear(1, 1), loader), pytest.raises(ZeroDivisionError):
        for _ in batches:
            raise ZeroDivisionError
    del kept
    with unchanged(nn.Linear(1, 1), loader):
        gc.collect()


def test_two_passes_may_overlap() -> None:
    batches = as_batches(loaders()["own generator"])
    alone = joined(batches)
    pairs = list(zip(batches, batches, strict=True))
    assert (
        torch.cat([a[0] for a, _ in pairs])[:, 0].tolist()
        == alone
        == torch.cat([b[0] for _, b in pairs])[:, 0].tolist()
    )


def test_worker_processes_give_the_same_order() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, num_workers=1)
    batches = as_batches(loader)
    with unchanged(nn.Linear(1, 1), loader):
        assert joined(batches) == joined(batches) != IN_ORDER


@pytest.mark.parametrize("inputs", [X, {"x": X, "y": Y}, [X[:3], X[3:]], DataLoader(TensorDataset(X, Y), batch_size=3)])
@given(seed=st.integers(0, 2**20), fraction=st.floats(0.01, 0.99))
def test_a_split_is_a_partition(inputs: Any, seed: int, fraction: float) -> None:
    kept, held = as_batches(inputs).split(fraction, seed)
    assert sorted(joined(kept) + joined(held)) == IN_ORDER
    assert len(joined(held)) == min(max(round(10 * fraction), 1), 9)
    again = as_batches(inputs).split(fraction, torch.Generator().manual_seed(seed))
    assert joined(again[0]) == joined(kept) and joined(again[1]) == joined(held)


def test_unlike_batches_are_split_whole() -> None:
    uneven = [torch.full((2, 1 + i), float(i)) for i in range(5)]
    kept, held = as_batches(uneven).split(0.4, 0)
    assert sorted(float(b[0, 0]) for b in [*kept, *held]) == [0, 1, 2, 3, 4] and len(list(held)) == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_fractions_lie_between(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction: got .*, expected a number between 0 and 1"):
        as_batches(X).split(fraction)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="inputs: got 1 examples; at least two are needed"):
        as_batches(X[:1]).split(0.5)
    with pytest.raises(ValueError, match=r"inputs: got 1 batches \(of unlike shapes"):
        as_batches(["text"]).split(0.5)


def test_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = as_batches(X).sample(4, generator)
    assert len(set(sample[:, 0].tolist())) == 4 and set(sample[:, 0].tolist()) <= set(IN_ORDER)
    assert len(as_batches(X).sample(40, generator)) == 10
    assert any(torch.equal(as_batches([X[:3], X[3:]]).sample(4, generator), part) for part in (X[:3], X[3:]))
    held = as_batches(DataLoader(TensorDataset(X, Y), batch_size=4)).hold()
    assert isinstance(held, TensorBatches) and held.batch_size == 4 and joined(held) == IN_ORDER
    assert len(as_batches(DataLoader(TensorDataset(X, Y), batch_size=4)).sample(4, generator)[0]) == 4


@given(seed=st.integers(0, 2**20))
def test_shuffles_depend_on_the_seed_alone(seed: int) -> None:
    for inputs in (X, [X[:3], X[3:6], X[6:]]):
        batches = as_batches(inputs)
        once, again = list(batches.shuffled(seed)), list(batches.shuffled(seed))
        assert all(map(torch.equal, once, again)) and sorted(torch.cat(once)[:, 0].tolist()) == IN_ORDER
    cut = [len(batch) for batch in as_batches(X, batch_size=4).shuffled(seed)]
    assert cut == [4, 4]


def test_nested_structures() -> None:
    tree = {"a": (X, {"b": Y})}
    batches = TensorBatches(tree, 4)
    assert [len(batch["a"][1]["b"]) for batch in batches] == [4, 4, 2]
    assert same_batch(batches.first(), {"a": (X[:4], {"b": Y[:4]})})
    assert not same_batch(batches.first(), {"a": (X[:4], {"b": Y[1:5]})})
    assert not same_batch(X, X[:3]) and not same_batch([X], X) and same_batch("a", "b")
    holes = X.clone().fill_(torch.nan)
    assert same_batch(holes, holes.clone()) and not same_batch(holes, X)
