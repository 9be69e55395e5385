"""The root as factors: a table of layer kinds, held as rows and as factors, against plain reverse mode."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, FactoredRoot
from fipgeo.jacobian.factored.plan import plan, trace
from fipgeo.linalg import adjoint_gap
from fipgeo.outputs import Euclidean

from .. import models, oracles
from ..hygiene import unchanged
from .kinds import EXAMPLES, KINDS, Net, prepared

GENEROUS = 2.0**40

importlib.import_module("sympy")  # torch does so when it first vectorises, and that adds a warning filter
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def parts_of(module: nn.Module, inputs: Any, **kwargs: Any) -> tuple[EmbeddedOutputs, Tensor, Any]:
    """z, the point, and what a pass over the data counts."""
    map_ = OutputMap(module, **kwargs)
    function = EmbeddedOutputs(map_, Euclidean(), as_batches(inputs))
    theta = map_.point()
    return function, theta, function.survey(theta)


def least_bytes(function: EmbeddedOutputs, theta: Tensor, survey: Any) -> float:
    """Memory for all that can be held as factors, by the plans for whole batches and for single examples."""
    weights = function.map.named(theta)
    shapes = {name: t.shape for name, t in weights.items()}
    each = []
    with function.map.frozen():
        for batch, n, rows in zip(function.batches, survey.examples, survey.rows, strict=True):
            tracings = [trace(function, weights, batch, n)]
            if isinstance(batch, Tensor):
                tracings.append(trace(function, weights, batch[:1], 1))
            each += [plan(t, shapes, rows // n, theta.dtype.itemsize, 0).num_bytes for t in tracings]
    return max(each) * survey.num_examples


def factored(module: nn.Module, inputs: Any, max_bytes: float | None = None, **kwargs: Any) -> FactoredRoot:
    """The factored root of the plain outputs; in the least memory when none is given."""
    function, theta, survey = parts_of(module, inputs, **kwargs)
    max_bytes = least_bytes(function, theta, survey) if max_bytes is None else max_bytes
    return FactoredRoot(function, theta, survey, max_bytes=max_bytes)


def names_in_factors(root: FactoredRoot, module: nn.Module) -> set[str]:
    """Parameters of which some part is held as factors."""
    slices = OutputMap(module).space.slices()
    starts = {where.start for segment in root.segments for where, _, _ in segment.blocks}
    return {name for name, where in slices.items() if where.start in starts}


def check(root: FactoredRoot, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Every product twice over, in singles and stacks, and the Gram matrix, against dense rows."""
    m, n = expected.shape
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(3, n, generator=generator), torch.randn(2, m, generator=generator)
    assert tuple(root.shape) == (m, n)
    for _ in range(2):
        assert oracles.relative(root(x), x @ expected.T) < tolerance
        assert oracles.relative(root.adjoint(y), y @ expected) < tolerance
        assert oracles.relative(root.normal(x), x @ expected.T @ expected) < tolerance
    assert oracles.relative(torch.stack([root(v) for v in x]), root(x)) < 1e-12
    assert oracles.relative(torch.stack([root.adjoint(v) for v in y]), root.adjoint(y)) < 1e-12
    assert oracles.relative(root.to_dense(), expected) < tolerance
    assert oracles.relative(root.gram(), expected @ expected.T) < tolerance
    assert oracles.relative(root.column_squares(), expected.square().sum(0)) < tolerance
    assert adjoint_gap(root) < 1e-12


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tight", [False, True], ids=["generous", "tight"])
def test_layers_agree_with_the_oracle(name: str, tight: bool) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    function, theta, survey = parts_of(module, models.cut(inputs, 2, 3))
    max_bytes = least_bytes(function, theta, survey) if tight else GENEROUS
    with unchanged(module, inputs):
        root = FactoredRoot(function, theta, survey, max_bytes=max_bytes)
        check(root, expected)
    assert root.num_bytes <= max_bytes


@pytest.mark.parametrize("name", models.CASES)
def test_networks_agree_with_the_oracle_in_little_memory(name: str) -> None:
    module, inputs = models.build(name)
    expected = oracles.root(module, inputs)
    function, theta, survey = parts_of(module, models.cut(inputs, 3, 2))
    max_bytes = least_bytes(function, theta, survey)
    with unchanged(module, inputs):
        root = FactoredRoot(function, theta, survey, max_bytes=max_bytes)
        check(root, expected)
    assert root.num_bytes <= max_bytes


LAYOUTS = (
    "time first",
    "attention, time first",
    "encoder, time first",
    "tokens flattened",
    "conv two images",
    "vision",
)


@given(
    seed=st.integers(0, 2**20),
    name=st.sampled_from([*LAYOUTS, "position embedding", "language model", "recurrent"]),
    sizes=st.sampled_from([(5,), (4, 1), (2, 3), (1, 1, 1, 1, 1), (2, 1, 2)]),
    tight=st.booleans(),
)
@settings(max_examples=6)
def test_batches_do_not_matter(seed: int, name: str, sizes: tuple[int, ...], tight: bool) -> None:
    module, inputs = prepared(KINDS[name], seed)
    expected = oracles.root(module, inputs)
    found = factored(module, models.cut(inputs, *sizes), None if tight else GENEROUS)
    assert oracles.relative(found.to_dense(), expected) < 1e-12
    assert oracles.relative(found.gram(), expected @ expected.T) < 1e-12


@pytest.mark.parametrize("sizes", [(1, 4), (1, 2, 2)])
@pytest.mark.parametrize("name", ["time first", "encoder, time first", "encoder, norm first", "vision"])
def test_a_first_batch_of_one_shows_nothing_about_layouts(name: str, sizes: tuple[int, ...]) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    for max_bytes in (GENEROUS, None):
        check(factored(module, models.cut(inputs, *sizes), max_bytes), expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("quiet", [0, None], ids=["first", "both"])
def test_an_example_without_derivative_shows_nothing_about_layouts(name: str, quiet: int | None) -> None:
    """Its outputs are constant, so which part of an activation belongs to it cannot be seen."""
    module, inputs = prepared(KINDS[name])
    which = [0, -1] if quiet is None else [quiet]
    gate = torch.ones(EXAMPLES).index_fill(0, torch.tensor([i % EXAMPLES for i in which]), 0.0)
    batch = {"x": inputs, "gate": gate}
    wrapped = Gated(module)
    expected = oracles.root(wrapped, batch)
    for sizes in ((5,), (2, 3)):
        check(factored(wrapped, models.cut(batch, *sizes), GENEROUS), expected)


def test_a_batch_without_derivative_shows_nothing_about_layouts() -> None:
    module, inputs = prepared(KINDS["time first"])
    batch = {"x": inputs, "gate": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])}
    wrapped = Gated(module)
    check(factored(wrapped, models.cut(batch, 3, 2), GENEROUS), oracles.root(wrapped, batch))


class Gated(nn.Module):
    """A network some of whose outputs are switched off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        out = self.inner(x)
        return out * gate.view(-1, *[1] * (out.dim() - 1))


TEXTS = ("embedding", "embedding padded", "language model", "tokens", "self-attention", "encoder, norm first")


@pytest.mark.parametrize("tight", [False, True], ids=["generous", "tight"])
@pytest.mark.parametrize("name", TEXTS)
def test_lengths_that_differ_from_batch_to_batch(name: str, tight: bool) -> None:
    module, inputs = prepared(KINDS[name])
    if name in ("embedding", "embedding padded", "language model", "tokens"):
        module = Net(lambda self, x: self.inner(x).sin().sum(1), inner=module)
    batches = [inputs[:2, :3], inputs[2:3, :2], inputs[3:, :3], inputs[:1, 1:3]]
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    function, theta, survey = parts_of(module, batches)
    root = FactoredRoot(function, theta, survey, max_bytes=least_bytes(function, theta, survey) if tight else GENEROUS)
    assert len(root.segments) > 2
    check(root, expected)


def test_lengths_that_differ_with_one_output_for_each_position() -> None:
    module, inputs = prepared(KINDS["language model"])
    batches = [inputs[:2], inputs[2:, :3], inputs[:1]]
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    for max_bytes in (GENEROUS, None):
        check(factored(module, batches, max_bytes), expected)


class Interacting(nn.Module):
    """Examples that know the mean of their batch."""

    def __init__(self, amount: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.amount = nn.Linear(3, 4), nn.Linear(4, 2), amount

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h - self.amount * h.mean(0))


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 7)])
def test_examples_that_interact_are_never_cut_apart(sizes: tuple[int, ...]) -> None:
    module = Interacting()
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    batches = models.cut(inputs, *sizes)
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    check(factored(module, batches, GENEROUS), expected)
    function, theta, survey = parts_of(module, batches)
    for max_bytes in range(400, 8000, 400):
        with unchanged(module, inputs):
            try:
                root = FactoredRoot(function, theta, survey, max_bytes=max_bytes)
            except ValueError as error:
                assert "other examples" in str(error) or "max_bytes" in str(error)
            else:
                assert oracles.relative(root.to_dense(), expected) < 1e-10


class Paired(nn.Module):
    """Neighbours in a batch interact, the first and the last example do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(torch.cat([h[:1], h[1:-1] + h[1:-1].flip(0), h[-1:]]))


class Sized(nn.Module):
    """Takes another branch for small batches."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.a, self.b, self.least = nn.Linear(3, 4), nn.Linear(4, 2), least

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h) if len(x) < self.least else torch.sin(h))


@pytest.mark.parametrize("least", [0, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(26,), (2, 24), (24, 2)])
def test_a_forward_that_depends_on_the_batch_is_never_wrong(least: int, sizes: tuple[int, ...]) -> None:
    module = Sized(least) if least else Paired()
    inputs = torch.randn(26, 3, generator=torch.Generator().manual_seed(0))
    batches = models.cut(inputs, *sizes)
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    function, theta, survey = parts_of(module, batches)
    built = 0
    for max_bytes in (2000, 3000, 4000, 5000, 6000, 7000, 9000, 12000, GENEROUS):
        try:
            root = FactoredRoot(function, theta, survey, max_bytes=max_bytes)
        except ValueError:
            continue
        assert oracles.relative(root.to_dense(), expected) < 1e-10
        built += 1
    assert built


class Wandering(nn.Module):
    """Uses a weight beside its layer for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(torch.tanh(self.a(x)))
        return out + self.a.weight.sum() if bool(x[0, 0] > 0) else out


def test_a_weight_that_later_batches_use_elsewhere() -> None:
    module, inputs = Wandering(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    batches = models.cut(inputs, 2, 2, 2)
    check(factored(module, batches, GENEROUS), torch.cat([oracles.root(module, batch) for batch in batches]))


class Fussy(nn.Module):
    """Refuses small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 5:
            raise RuntimeError("a batch of at least 5, please")
        return torch.tanh(self.a(x))


def test_a_model_that_refuses_small_batches() -> None:
    module, inputs = Fussy(), torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    check(factored(module, models.cut(inputs, 5, 5), GENEROUS), oracles.root(module, inputs))


def test_nothing_is_left_behind_by_a_failure() -> None:
    module, inputs = prepared(KINDS["vision"])
    function, theta, survey = parts_of(module, inputs)
    with unchanged(module, inputs), pytest.raises(ValueError, match="max_bytes: the factors of this root take"):
        FactoredRoot(function, theta, survey, max_bytes=100)


@pytest.mark.parametrize("name", ["vision", "conv2d strided", "language model", "encoder, norm first", "scalars"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_low_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = prepared(KINDS[name])
    module = module.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    expected = oracles.root(module, inputs)
    for max_bytes in (GENEROUS, None):
        found = factored(module, models.cut(inputs, 2, 3), max_bytes)
        assert found.dtype == torch.float32
        assert oracles.relative(found.to_dense(), expected) < tolerance
        assert adjoint_gap(found) < 1e-5


@pytest.mark.parametrize("name", ["vision", "conv2d grouped", "language model", "encoder, norm first"])
def test_products_in_float64_over_float32_factors(name: str) -> None:
    module, inputs = prepared(KINDS[name])
    found = factored(module.float(), models.cut(inputs.float() if inputs.is_floating_point() else inputs, 2, 3))
    double = found.double()
    rows = torch.cat([double.adjoint(e[None]) for e in torch.eye(found.shape[0])])
    x = torch.randn(2, found.shape[1], generator=torch.Generator().manual_seed(0))
    assert double.dtype == double(x).dtype == double.normal(x).dtype == torch.float64
    assert found.dtype == torch.float32
    assert oracles.relative(double(x), x @ rows.T) < 1e-13
    assert oracles.relative(double.normal(x), x @ rows.T @ rows) < 1e-13
    assert oracles.relative(found.gram(), rows @ rows.T) < 1e-6  # rows that pass through float32
    assert oracles.relative(rows, oracles.root(module, inputs)) < 1e-5


class Mixed(nn.Module):
    """A trunk in bfloat16 with a normalisation and a head in float32, as large models have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4).bfloat16(), nn.LayerNorm(4).float(), nn.Linear(4, 4).bfloat16()
        self.head = nn.Linear(4, 2).float()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x.to(self.a.weight.dtype)).to(self.norm.weight.dtype))
        return self.head(torch.tanh(self.b(h.to(self.b.weight.dtype))).to(self.head.weight.dtype))


def test_layers_of_different_precision() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = Mixed(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = oracles.root(module, inputs)
    for max_bytes in (GENEROUS, None):
        found = factored(module, models.cut(inputs, 2, 3), max_bytes)
        assert oracles.relative(found.to_dense(), expected) < 3e-2


@pytest.mark.parametrize("sizes", [(6,), (2, 4)])
def test_a_bias_takes_no_memory_beside_the_factors_of_its_weight(sizes: tuple[int, ...]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    function, theta, survey = parts_of(module, models.cut(inputs, *sizes))
    root = FactoredRoot(function, theta, survey, max_bytes=GENEROUS)
    assert names_in_factors(root, module) == set(dict(module.named_parameters()))
    assert root.num_bytes == 6 * theta.itemsize * (12 + 8 + 8 + 2 * (8 + 8 + 2)) == least_bytes(function, theta, survey)
    check(root, oracles.root(module, inputs))
    places = OutputMap(module).space.slices()
    for names in (["0.bias"], ["2.weight"], ["2.weight", "2.bias"]):
        part = root.restricted([places[name] for name in names])
        rows = part.to_dense()
        assert oracles.relative(part.gram(), rows @ rows.T) < 1e-10
