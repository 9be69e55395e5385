"""Components trained in processes: the bits of those trained one after another, and errors that name their part."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor
from torch.nn.functional import cross_entropy

from fipgeo import TangentModel, compose, fit_square_
from fipgeo.tangent import PartError, train_parts


def shuffled(model: TangentModel, data: tuple[Tensor, Tensor]) -> None:
    """SGD on minibatches drawn from the global stream."""
    x, y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for index in torch.randperm(len(y)).split(2):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def picky(model: TangentModel, data: Any) -> None:
    if data == "die":
        os._exit(3)
    raise ValueError(f"cannot read {data!r}")


def parts(count: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(4, 1, 4, 4, generator=generator), torch.randint(3, (4,), generator=generator))
        for name in "cab"[:count]
    }


def test_processes_change_no_bit() -> None:
    net, x = build("convnet", 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_parts(net, parts(), shuffled, trainable="5.*")
    assert torch.equal(torch.get_rng_state(), before)
    two = train_parts(net, parts(), shuffled, trainable="5.*", workers=2)
    assert [c.name for c in one] == [c.name for c in two] == ["c", "a", "b"]
    assert [c.digest() for c in one] == [c.digest() for c in two] and len({c.digest() for c in one}) == 3
    assert all(torch.equal(t, b.tangents[n]) for a, b in zip(one, two, strict=True) for n, t in a.tangents.items())
    backwards = dict(reversed(parts().items()))
    assert {c.name: c.digest() for c in train_parts(net, backwards, shuffled, trainable="5.*")} == {
        c.name: c.digest() for c in one
    }
    assert torch.equal(compose(net, one)(x), compose(net, two)(x))


def test_a_component_is_what_training_alone_gives() -> None:
    net, _ = build("convnet", 1)
    data = parts(1)["c"]
    model = TangentModel(net)
    fit_square_(model, data, kappa=5.0)
    found = train_parts(model, {"c": data}, partial(fit_square_, kappa=5.0))[0]
    found.check(net)
    assert all(torch.equal(t, found.tangents[n]) for n, t in model.tangents().items())
    assert train_parts(net, {}, shuffled, workers=2) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_their_part(workers: int) -> None:
    net, _ = build("convnet", 1)
    with pytest.raises(PartError, match="part 'bad': ValueError: cannot read 'junk'") as caught:
        train_parts(net, {"bad": "junk"}, picky, workers=workers)
    assert caught.value.part == "bad" and (not workers or "in its process" in str(caught.value))


def test_what_cannot_run_is_refused() -> None:
    net, _ = build("convnet", 1)
    with pytest.raises(PartError, match="part 'x': its process"):
        train_parts(net, {"x": "die"}, picky, workers=1)
    with pytest.raises(TypeError, match="functions of a module"):
        train_parts(net, parts(), lambda model, data: None, workers=1)
    with pytest.raises(ValueError, match="workers: got -1"):
        train_parts(net, parts(), shuffled, workers=-1)
