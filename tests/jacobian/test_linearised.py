"""The root with its forward pass kept: right again and again, apart from the module, on the rung that fits."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, linearised
from fipgeo.jacobian.linearised import RUNGS, LinearisedRoot, kept_bytes
from fipgeo.jacobian.tape import NotTapedError, Tape
from fipgeo.linalg import adjoint_gap
from fipgeo.outputs import Categorical, Euclidean

from .. import oracles
from ..hygiene import unchanged
from ..models import CASES, build, cut


def function_of(module: nn.Module, inputs: Any, params: Any = None, geometry: Any = None) -> EmbeddedOutputs:
    return EmbeddedOutputs(OutputMap(module, params), geometry or Euclidean(), as_batches(inputs))


def root_of(module: nn.Module, inputs: Any, params: Any = None, **kwargs: Any) -> LinearisedRoot:
    function = function_of(module, inputs, params)
    theta = function.map.point()
    return LinearisedRoot(function, theta, function.survey(theta), **kwargs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(found: LinearisedRoot, expected: Tensor) -> None:
    m, n = expected.shape
    x, y = draw(3, n), draw(3, m)
    for call in range(2):
        x, y = draw(3, n, seed=call), draw(3, m, seed=call + 10)
        assert oracles.relative(found(x), x @ expected.T) < 1e-10
        assert oracles.relative(found(x[0]), expected @ x[0]) < 1e-10
        assert oracles.relative(found.adjoint(y), y @ expected) < 1e-10
        assert oracles.relative(found.adjoint(y[0]), y[0] @ expected) < 1e-10
    assert oracles.relative(found.normal(x), x @ expected.T @ expected) < 1e-10
    assert oracles.relative(found.normal(x[0]), x[0] @ expected.T @ expected) < 1e-10
    assert oracles.relative(found(x), torch.stack([found(v) for v in x])) < 1e-12
    assert oracles.relative(found.adjoint(y), torch.stack([found.adjoint(u) for u in y])) < 1e-12
    assert adjoint_gap(found) < 1e-12


SPECIAL = ["mlp", "convnet", "in_place", "attention", "lstm", "gru", "weight_norm", "text"]


@pytest.mark.parametrize(("name", "rung"), [(n, "tape") for n in CASES] + [(n, r) for n in SPECIAL for r in RUNGS[1:]])
def test_every_rung_is_right_every_time(name: str, rung: str) -> None:
    module, inputs = build(name)
    if rung != "double backward" and not CASES[name].forward_mode:
        with pytest.raises(RuntimeError, match=f"none of {rung} gives a right derivative"):
            root_of(module, inputs, rungs=(rung,))
        return
    root_of(*build("mlp"))  # torch imports parts of itself at the first derivative
    with unchanged(module, inputs):
        found = root_of(module, cut(inputs, 2, 2, 1), rungs=(rung,))
        check(found, oracles.root(module, inputs))
    assert found.rung == rung and f"R v by {rung}" in found.explain() and "in 3 batches" in found.explain()


@pytest.mark.parametrize("name", CASES)
def test_the_tape_serves_wherever_forward_mode_does(name: str, caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = build(name)
    with caplog.at_level(logging.INFO, logger="fipgeo"):
        found = root_of(module, inputs)
    assert found.rung == ("tape" if CASES[name].forward_mode else "double backward")
    assert f"R v by {found.rung}, R^T u by kept graphs" in caplog.text


@pytest.mark.parametrize("name", ["mlp", "convnet", "in_place", "encoder", "lstm", "weight_norm", "text"])
def test_batching_does_not_matter(name: str) -> None:
    module, inputs = build(name)
    whole = root_of(module, inputs)
    for sizes in ((1, 4), (2, 3), (1, 1, 1, 1, 1)):
        found = root_of(module, cut(inputs, *sizes))
        x = draw(2, whole.shape[1])
        assert oracles.relative(found(x), whole(x)) < 1e-12
        assert oracles.relative(found.normal(x), whole.normal(x)) < 1e-12


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", ["convnet", "in_place", "spectral_norm", "encoder"])
def test_later_changes_of_the_module_and_the_data_do_not_matter(name: str, rung: str) -> None:
    module, inputs = build(name)
    first = next(iter(dict(module.named_parameters())))
    expected = oracles.root(module, inputs, where=lambda n: n != first)
    found = root_of(module, inputs, lambda n, p: n != first, rungs=(rung,))
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers(), inputs]:
            tensor.mul_(-1.7 if tensor.is_floating_point() else 2)
    module.train()
    check(found, expected)


def test_gradient_steps_between_products() -> None:
    module, x = build("mlp")
    expected = oracles.root(module, x)
    found = root_of(module, x)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(3):
        optimiser.zero_grad()
        module(x).square().sum().backward()
        before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        assert oracles.relative(found.adjoint(torch.eye(15)), expected) < 1e-12
        assert all(
            torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True) if p.grad is not None
        )
        optimiser.step()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_products_in_any_mode(context: Any) -> None:
    module, x = build("in_place")
    expected = oracles.root(module, x)
    with context():
        found = root_of(module, x)
        with torch.autocast("cpu"):
            check(found, expected)
    assert not found(draw(expected.shape[1])).requires_grad


class Counted:
    """A loader that counts its passes."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def test_the_data_are_read_once() -> None:
    module, x = build("mlp")
    loader = Counted(cut(x, 2, 2, 1))
    function = function_of(module, loader)
    theta = function.map.point()
    survey = function.survey(theta)
    before = loader.passes
    found = LinearisedRoot(function, theta, survey)
    _ = found.normal(draw(9, 31)), found(draw(31)), found.adjoint(draw(9, 15))
    assert loader.passes == before + 1


class Item(nn.Module):
    """Branches on a number made from its input, as masks of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2 if x.abs().max().item() > 1 else x).tanh()


class Peeking(Item):
    """Branches on a number that depends on the weights; the branch belongs to the point, not to the direction."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.sin() if float(x.detach().sum()) > 0 else x.tanh()


@pytest.mark.parametrize("kind", [Item, Peeking])
def test_control_flow_in_python_is_taped(kind: type[Item]) -> None:
    module, x = kind(), draw(5, 3)
    found = root_of(module, x)
    assert found.rung == "tape"
    check(found, oracles.root(module, x))


class Twice(torch.autograd.Function):
    """A derivative without forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * gradient


class Squared(Item):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(self.layer(x))  # type: ignore[return-value]


def test_functions_without_forward_mode_go_back_twice() -> None:
    module, x = Squared(), draw(5, 3)
    found = root_of(module, x)
    assert found.rung == "double backward"
    check(found, oracles.root(module, x))


def test_a_tape_that_lies_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Tape):
        calls = 0

        def __call__(self, *inputs: Tensor, stacked: bool = False) -> Tensor:
            self.calls += 1
            return super().__call__(*inputs, stacked=stacked) * (1.0 if self.calls == 1 else 1.01)

    monkeypatch.setattr(linearised, "Tape", Wrong)
    module, x = build("mlp")
    with caplog.at_level(logging.INFO, logger="fipgeo"):
        found = root_of(module, x)
    assert found.rung == "double backward" and "tape disagrees with forward mode" in caplog.text
    check(found, oracles.root(module, x))


def test_a_tape_that_is_wrong_in_a_later_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Wrong(Tape):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

        def __call__(self, *inputs: Tensor, stacked: bool = False) -> Tensor:
            return super().__call__(*inputs, stacked=stacked) * (1.01 if self in made[1:] else 1.0)

    monkeypatch.setattr(linearised, "Tape", Wrong)
    module, x = build("mlp")
    found = root_of(module, cut(x, 2, 3))
    assert [part.rung for part in found.parts] == ["tape", "double backward"] and found.rung == "double backward"
    check(found, oracles.root(module, x))


def test_exceptions_leave_everything_as_it_was() -> None:
    module, x = build("training")
    function = function_of(module, x)
    theta = function.map.point()
    survey = function.survey(theta)
    with unchanged(module, x):
        with pytest.raises(ValueError, match="max_bytes: .* would be kept for 5 examples"):
            LinearisedRoot(function, theta, survey, max_bytes=10)
        with pytest.raises(ValueError, match=r"rungs: got \('linearize',\), expected some of 'tape'"):
            LinearisedRoot(function, theta, survey, rungs=("linearize",))
        found = LinearisedRoot(function, theta, survey)
        with pytest.raises((RuntimeError, ValueError)):
            found._apply(torch.zeros(2, 3))
        with pytest.raises((RuntimeError, ValueError)):
            found._adjoint(torch.zeros(2, 3))


def test_weights_that_outputs_do_not_depend_on() -> None:
    module, x = build("mlp")
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    check(root_of(module, x), oracles.root(module, x))
    alone = root_of(module, x, "unused")
    assert not alone(torch.ones(3)).any() and not alone.adjoint(torch.ones(2, 15)).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = build("mlp")
    module, inputs = module.to(dtype), inputs.to(dtype)
    expected = oracles.root(module, inputs)
    found = root_of(module, inputs)
    assert found.dtype == torch.float32 and found.rung == "tape"
    v = draw(3, 31).float()
    assert oracles.relative(found(v), v.double() @ expected.T) < tolerance
    assert oracles.relative(found.normal(v), v.double() @ expected.T @ expected) < 2 * tolerance


def test_embeddings_are_linearised_with_the_outputs() -> None:
    module, x = build("mlp")
    function = function_of(module, x, geometry=Categorical())
    theta = function.map.point()
    check(LinearisedRoot(function, theta, function.survey(theta)), oracles.root(module, x, Categorical().embed))


def test_memory_is_estimated() -> None:
    wide = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    plane = nn.Conv2d(3, 8, 3, padding=1)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    conv = nn.Sequential(plane, *block, *copy.deepcopy(block), nn.Flatten(), nn.Linear(8 * 8 * 8, 3))
    for module, inputs in ((wide, draw(200, 40)), (conv, draw(20, 3, 8, 8))):
        for batches in (inputs, list(inputs.split(8))):
            function = function_of(module, batches)
            theta = function.map.point()
            survey = function.survey(theta)
            estimate, found = kept_bytes(function, theta, survey), LinearisedRoot(function, theta, survey)
            assert found.rung == "tape" and 1 / 1.5 < estimate / found.num_bytes < 1.5
            LinearisedRoot(function, theta, survey, max_bytes=estimate)


def test_a_tape_replays_a_linear_map() -> None:
    weight, x = draw(4, 4), draw(4, seed=1)

    def linear(v: Tensor) -> Tensor:
        out = torch.zeros(4)
        out += v * x
        out[1:] += (weight @ v)[:3]
        return out + v.flip(0)

    tape = Tape(linear, [draw(4)])
    for seed in range(3):
        v = draw(4, seed=seed)
        kept = v.clone()
        assert oracles.relative(tape(v), linear(v)) < 1e-14 and torch.equal(v, kept)
    assert not Tape(lambda v: torch.zeros(3), [x])(x).any()
    with pytest.raises(NotTapedError, match="looks at a value"):
        Tape(lambda v: v * float(v.sum()), [x])


def test_equal_constants_are_held_once() -> None:
    a = draw(50)
    tape = Tape(lambda v: v * a + v.sin() * 0 + v * a.clone(), [draw(50)])
    assert len({t.data_ptr() for t in tape.constants()}) == 2
    tape.adopt([a])
    assert {t.data_ptr() for t in tape.constants()} == {a.data_ptr()}
    assert oracles.relative(tape(a), 2 * a * a) < 1e-14
