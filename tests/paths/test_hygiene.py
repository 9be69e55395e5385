"""Walks leave the model, the data and the process as they were, whatever the model is and whoever raises on the way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fipgeo import MetricField, PathResult, Sparsity, adapt, sparsify, walk

from ..hygiene import unchanged
from ..models import CASES, build
from .toys import CORRECTORS, FIRST_ORDER, GAUSS_NEWTON, draw, inputs, labels, method, mlp, sparse_path, stored


class Trouble(Exception):
    """Raised in the middle of things."""


@pytest.fixture(scope="module", autouse=True)
def warmed_up() -> None:
    """Modules that torch imports at the first derivative add their own warning filters; let them."""
    model, data = build("mlp")
    sparse_path(model.double(), data.double(), 0.2)
    adapt(model, [(data.double(), torch.zeros(5))], first_loss, keep=data.double())


def used(norm: bool = True) -> nn.Module:
    """A model in mixed modes, with gradients, a hook and a frozen tensor, as a training loop leaves it."""
    model = mlp(0, norm=norm, dropout=True).train()
    model[0].eval()
    for p in list(model.parameters())[:2]:
        p.grad = torch.ones_like(p)
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    model[-1].register_forward_hook(lambda m, a, out: None)
    return model


def first_loss(outputs: Any, target: Tensor) -> Tensor:
    f = outputs[0] if isinstance(outputs, tuple) else outputs
    return f.reshape(len(f), -1).square().mean()


@pytest.mark.parametrize("name", [n for n in CASES if n != "frozen_part"])
def test_every_kind_of_network_becomes_sparse_and_stays_itself(name: str) -> None:
    model, data = build(name)
    for corrector in (FIRST_ORDER, GAUSS_NEWTON):
        with unchanged(model, data):
            path = sparse_path(model, data, 0.3, corrector=corrector, options={"max_steps": 1})
        assert len(path) > 1 and path[-1].sparsity > path[0].sparsity


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("keywords", "text")])
def test_every_kind_of_network_learns_and_stays_itself(name: str) -> None:
    model, data = build(name)
    new = [(data[:3], torch.zeros(3)), (data[3:], torch.zeros(2))]
    with unchanged(model, data, new):
        path = adapt(model, new, first_loss, keep=data, lr=0.01, budget=None)
    assert path.outcome == "reached"


@pytest.mark.parametrize("name", ["keywords", "text"])
def test_networks_with_keywords_learn_and_stay_themselves(name: str) -> None:
    model, data = build(name)
    new = [{k: v[:3] for k, v in data.items()}, {k: v[3:] for k, v in data.items()}]
    with unchanged(model, data, new):
        path = adapt(model, new, lambda f, batch: f.square().mean(), keep=data, lr=0.01, budget=None)
    assert path.outcome == "reached"


def test_sparsify_leaves_no_trace() -> None:
    model, x = used(), inputs(1, 30)
    held = inputs(2, 12)
    with unchanged(model, x, held):
        path = sparsify(model, x, 0.1, corrector=GAUSS_NEWTON, held_out=held, callback=lambda info: None)
    assert path.outcome == "reached"


def test_adapt_leaves_no_trace() -> None:
    model, keep, new = used(), inputs(1, 30), (draw(2, 30, 5), labels(2, 30))
    with unchanged(model, keep, new):
        assert adapt(model, new, cross_entropy, keep=keep, batch_size=10).outcome == "reached"


def test_loaders_and_their_generators_stay_where_they_were() -> None:
    model = used()
    source = torch.Generator().manual_seed(1)
    keep = DataLoader(TensorDataset(inputs(1, 30)), batch_size=7, shuffle=True, generator=source)
    new = DataLoader(TensorDataset(draw(2, 30, 5), labels(2, 30)), batch_size=10, shuffle=True)
    with unchanged(model, keep, new, source):
        sparse_path(model, keep, 0.2, corrector=FIRST_ORDER)
        adapt(model, new, cross_entropy, keep=keep)


def test_points_share_no_memory_with_the_model() -> None:
    model = mlp(0, norm=True)
    path = sparse_path(model, inputs(1, 30), 0.3)
    with unchanged(model):
        for point in path:
            for tensor in stored(point).values():
                tensor.fill_(3.0)
    assert float(path.state["theta"].abs().max()) != 3.0  # nor with the state to resume from


def calls(at: int, kind: type[BaseException]) -> tuple[Callable[[nn.Module, Any], Any], list[int]]:
    """A forward that raises at one of its calls, and the count of its calls."""
    count = [0]

    def forward(model: nn.Module, batch: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            raise kind("in the middle")
        return model(batch[0] if isinstance(batch, tuple) else batch)

    return forward, count


def sparse_with(forward: Any, model: nn.Module, x: Tensor, kind: str) -> PathResult:
    field = MetricField(model, x, forward_fn=forward, batch_size=10)
    return walk(field, Sparsity(0.2, samples=2), method(CORRECTORS[kind]))


def adapt_with(forward: Any, model: nn.Module, x: Tensor, kind: str) -> PathResult:
    del kind
    return adapt(model, (x[:20], labels(2, 20)), cross_entropy, keep=x, batch_size=10, forward_fn=forward)


WALKS: dict[str, tuple[Callable[..., PathResult], str]] = {
    **{kind: (sparse_with, kind) for kind in CORRECTORS},
    "adapt": (adapt_with, ""),
}


@pytest.mark.parametrize("kind", WALKS)
@given(share=st.floats(0, 1), error=st.sampled_from([Trouble, KeyboardInterrupt]))
@settings(max_examples=3)
def test_a_forward_that_raises_leaves_no_trace(kind: str, share: float, error: type[BaseException]) -> None:
    walked, corrector = WALKS[kind]
    model, x = used(), inputs(1, 30)
    forward, count = calls(-1, Trouble)
    walked(forward, model, x, corrector)
    forward, _ = calls(1 + round(share * (count[0] - 1)), error)
    with unchanged(model, x):
        try:
            walked(forward, model, x, corrector)
        except BaseException as caught:
            assert type(caught) is error or type(caught.__cause__) is error
        else:
            assert error is Trouble  # taken for a missing derivative rule, and gone round


@pytest.mark.parametrize("kind", ["sparsify", "adapt"])
def test_a_callback_that_raises_leaves_no_trace(kind: str) -> None:
    model, x = used(), inputs(1, 30)

    def callback(info: Any) -> None:
        raise Trouble

    with unchanged(model, x), pytest.raises(Trouble):
        if kind == "adapt":
            adapt(model, (x, labels(2, 30)), cross_entropy, keep=x, batch_size=10, callback=callback)
        else:
            sparse_path(model, x, 0.4, callback=callback, progress=True)


def test_a_loss_that_raises_leaves_no_trace() -> None:
    model, x = used(), inputs(1, 30)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        raise Trouble

    with unchanged(model, x), pytest.raises(Trouble):
        adapt(model, (x, labels(2, 30)), loss, keep=x, batch_size=10)


def test_a_loader_that_raises_leaves_no_trace() -> None:
    model, x = used(), inputs(1, 30)

    class Broken:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield torch.rand(10, 5)  # on the loader's own streams
            if self.passes > 1:
                raise Trouble
            yield x[:10]

    with unchanged(model, x), pytest.raises(Trouble):
        sparse_path(model, Broken(), 0.4)
