"""Output geometries: embeddings against finite differences and closed forms, distances at both ends of their range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fipgeo import Bernoulli, Categorical, Cosine, Euclidean, Gaussian, Geometry, Logits
from fipgeo.outputs import GEOMETRIES, as_geometry, between, changed_predictions, embed, squared_distance

from . import oracles

SEEDS = st.integers(0, 2**20)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_metric(geometry: Geometry, f: Tensor) -> Tensor:
    """The metric that a geometry puts on the outputs of one example, expected from textbooks."""
    c = len(f)
    if isinstance(geometry, Logits):
        return torch.eye(c) - torch.full((c, c), 1 / c)
    if isinstance(geometry, Gaussian):
        return torch.eye(c) / geometry.sigma**2
    if isinstance(geometry, Categorical):
        p = torch.softmax(f / geometry.temperature, 0)
        return (torch.diag(p) - torch.outer(p, p)) / geometry.temperature**2
    if isinstance(geometry, Bernoulli):
        p = torch.sigmoid(f)
        return torch.diag(p * (1 - p))
    if isinstance(geometry, Cosine):
        u = f / f.norm()
        return (torch.eye(c) - torch.outer(u, u)) / f.norm() ** 2
    return torch.eye(c)


KINDS = [Euclidean(), Logits(), Gaussian(0.3), Categorical(), Categorical(4.0), Bernoulli(), Cosine()]


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@given(seed=SEEDS)
def test_the_slope_of_the_embedding_is_a_root_of_the_output_metric(geometry: Geometry, seed: int) -> None:
    f = draw(seed, 4, scale=2.0)
    by_differences = oracles.slope(geometry.embed, f)
    exact = torch.autograd.functional.jacobian(geometry.embed, f)
    assert isinstance(exact, Tensor)
    expected = output_metric(geometry, f)
    assert oracles.relative(by_differences.T @ by_differences, expected) < 1e-6
    assert oracles.relative(exact.T @ exact, expected) < 1e-12


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@given(seed=SEEDS)
def test_distance_is_a_metric_and_exactly_zero_at_equal_outputs(geometry: Geometry, seed: int) -> None:
    a, b, c = draw(seed, 3, 5, 4, scale=3.0)
    assert bool((geometry.distance(a, a.clone()) == 0).all())
    assert torch.equal(geometry.distance(a, b), geometry.distance(b, a))
    assert bool((geometry.distance(a, b) <= geometry.distance(a, c) + geometry.distance(c, b) + 1e-12).all())


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@given(seed=SEEDS, t=st.floats(0, 1))
def test_a_geodesic_has_its_ends_a_constant_speed_and_is_the_same_backwards(
    geometry: Geometry, seed: int, t: float
) -> None:
    f, g = draw(seed, 3, 5, 4, scale=3.0), draw(seed + 1, 3, 5, 4, scale=3.0)
    z, w = geometry.embed(f), geometry.embed(g)
    found = between(geometry, (f,), (g,), t).reshape(z.shape)
    whole = geometry.distance(f, g)
    for end, share in ((z, t), (w, 1 - t)):
        assert torch.allclose(geometry.length((found - end).norm(dim=-1)), share * whole, atol=1e-7)
    assert torch.allclose(found, geometry.between(w, z, 1 - t), atol=1e-12)
    assert torch.allclose(geometry.between(z, w, 0.0), z) and torch.allclose(geometry.between(z, w, 1.0), w)
    assert torch.allclose(geometry.between(z, z, t), z)
    if isinstance(geometry, Categorical):  # the great circle of square roots, whose squares are probabilities
        p, q = (torch.softmax(x / geometry.temperature, -1) for x in (f, g))
        angle = torch.arccos((p * q).sqrt().sum(-1, keepdim=True))
        root = (((1 - t) * angle).sin() * p.sqrt() + (t * angle).sin() * q.sqrt()) / angle.sin()
        assert torch.allclose((found / 2).square(), root.square(), atol=1e-9)
        assert torch.allclose((found / 2).square().sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@given(seed=SEEDS)
def test_small_distances_are_lengths_in_the_metric(geometry: Geometry, seed: int) -> None:
    f, v = draw(seed, 2, 4)
    expected = float((v @ output_metric(geometry, f) @ v).sqrt())
    if expected < 1e-3:
        return
    for size in (1e-6, 1e-8):  # an arc by arccos has no digit left at 1e-8
        assert float(geometry.distance(f + size * v, f)) / size == pytest.approx(expected, rel=1e-5, abs=1e-7)


@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_categorical_distance_is_the_fisher_rao_arc(seed: int, scale: float) -> None:
    f, g = draw(seed, 2, 6, 5, scale=scale)
    p, q = torch.softmax(f, -1), torch.softmax(g, -1)
    arc = 2 * torch.arccos((p * q).sqrt().sum(-1).clamp(max=1))
    assert torch.allclose(Categorical().distance(f, g), arc, rtol=0, atol=1e-7)  # arccos itself loses half the digits
    assert torch.allclose(Categorical().distance(f, g)[arc > 0.1], arc[arc > 0.1], rtol=1e-10, atol=0)


def test_opposite_certainties_are_pi_apart() -> None:
    ends = {Categorical(): [[1e4, 0.0], [-1e4, 0.0]], Bernoulli(): [[1e4], [-1e4]], Cosine(): [[1.0, 0.0], [-2.0, 0.0]]}
    for geometry, (here, there) in ends.items():
        assert float(geometry.distance(torch.tensor(here), torch.tensor(there))) == pytest.approx(math.pi)


@given(seed=SEEDS)
def test_kl_is_half_the_squared_distance_to_second_order(seed: int) -> None:
    f, v = draw(seed, 2, 5)
    rests = []
    for size in (1e-2, 5e-3, 2.5e-3):
        log_p, log_q = torch.log_softmax(f, -1), torch.log_softmax(f + size * v, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        rests.append(float(kl - Categorical().distance(f + size * v, f).square() / 2))
    assert abs(rests[0]) <= 1e-2**3 * 2 * float(v.norm()) ** 3  # third order, so an eighth at half the step
    if abs(rests[1]) > 1e-10:
        assert rests[1] / rests[2] == pytest.approx(8, rel=0.5)


@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_softmax_geometries_do_not_feel_a_constant(seed: int, shift: float) -> None:
    f = draw(seed, 3, 4)
    for geometry in (Logits(), Categorical(), Categorical(2.0)):
        assert torch.allclose(geometry.embed(f + shift), geometry.embed(f), rtol=0, atol=1e-12 * (1 + abs(shift)))


def test_bernoulli_slope_everywhere() -> None:
    f = torch.tensor([-1e4, -800.0, -100.0, -30.0, -1.0, 0.0, 1e-8, 1.0, 30.0, 100.0, 800.0, 1e4], requires_grad=True)
    z = Bernoulli().embed(f)
    (slope,) = torch.autograd.grad(z.sum(), f)
    p = torch.sigmoid(f.detach().abs())
    expected = torch.exp(-f.detach().abs() / 2) * p  # sqrt(p (1 - p)) without cancellation
    assert bool(torch.isfinite(z).all()) and bool(torch.isfinite(slope).all())
    assert torch.allclose(slope, expected, rtol=1e-6, atol=1e-13)
    assert torch.allclose(z.detach(), 2 * torch.asin(torch.sigmoid(f.detach()).sqrt()), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_outputs_stay_finite(dtype: torch.dtype) -> None:
    f = torch.tensor([[1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    for geometry in (Categorical(), Bernoulli(), Logits()):
        (slope,) = torch.autograd.grad(geometry.embed(f).sum(), f)
        assert bool(torch.isfinite(geometry.embed(f)).all()) and bool(torch.isfinite(slope).all())


def test_openness_tells_saturation() -> None:
    even, sure = torch.zeros(4, 3), 50 * torch.eye(3)
    assert Categorical().openness(even) == pytest.approx(1) and Categorical().openness(sure) < 1e-12
    assert Categorical(100.0).openness(sure) > 0.9
    assert Bernoulli().openness(even) == 1 and Bernoulli().openness(sure - 25) < 1e-9
    assert Logits().openness(sure) == Euclidean().openness(sure) == 1


def test_several_tensors_and_positions() -> None:
    f, f0 = (draw(0, 2, 3, 4), draw(1, 2, 5)), (draw(2, 2, 3, 4), draw(3, 2, 5))
    for geometry in (Categorical(), Euclidean()):
        assert embed(geometry, f).shape == (2, 17)
        by_hand = [
            sum(float(geometry.distance(f[0][i, j], f0[0][i, j])) ** 2 for j in range(3))
            + float(geometry.distance(f[1][i], f0[1][i])) ** 2
            for i in range(2)
        ]
        assert torch.allclose(squared_distance(geometry, f, f0), torch.tensor(by_hand), rtol=1e-12)


def test_changed_predictions() -> None:
    f0 = (torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 1.0]], [[5.0, 1.0], [1.0, 2.0]]]),)
    f = (torch.tensor([[[3.0, 1.0], [0.0, 9.0]], [[3.0, 1.0], [2.0, 1.0]], [[0.0, 1.0], [2.0, 1.0]]]),)
    for geometry in (Logits(), Categorical()):
        assert changed_predictions(geometry, f, f0).tolist() == [False, True, True]  # type: ignore[union-attr]
    assert changed_predictions(Euclidean(), f, f0) is None
    signs = (torch.tensor([[1.0, -1.0], [1.0, 1.0]]),), (torch.tensor([[2.0, -3.0], [1.0, -1.0]]),)
    assert changed_predictions(Bernoulli(), *signs).tolist() == [False, True]  # type: ignore[union-attr]


def test_names() -> None:
    for name, geometry in GEOMETRIES.items():
        assert as_geometry(name) is geometry and as_geometry(geometry) is geometry
    with pytest.raises(ValueError, match="geometry: got 'softmax', expected one of 'logits', 'euclidean'"):
        as_geometry("softmax")
    with pytest.raises(TypeError, match=r"geometry: got <class .*Categorical'>, expected a name or a Geometry such as"):
        as_geometry(Categorical)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_are_positive(value: float) -> None:
    with pytest.raises(ValueError, match="sigma: got .*, expected a positive number"):
        Gaussian(value)
    with pytest.raises(ValueError, match="temperature: got .*, expected a positive number"):
        Categorical(value)


@pytest.mark.parametrize(
    ("geometry", "remedy"), [(Logits(), "'bernoulli'"), (Categorical(), "'bernoulli'"), (Cosine(), "'euclidean'")]
)
def test_one_logit_is_not_enough(geometry: Geometry, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"needs at least two .* on the last axis, got 1; use geometry={remedy}"):
        geometry.embed(torch.zeros(3, 1))


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_vocabularies_and_large_logits(geometry: Geometry, dtype: torch.dtype) -> None:
    f = draw(0, 2, 5000, scale=20.0).to(dtype)
    expected = geometry.embed(f.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert bool(((geometry.embed(f) - expected).abs() <= tolerance * (expected.abs() + expected.abs().max())).all())


@given(seed=SEEDS)
def test_the_categorical_root_is_the_sum_over_classes(seed: int) -> None:
    f = draw(seed, 6, scale=3.0)
    slope = torch.autograd.functional.jacobian(Categorical().embed, f)
    assert isinstance(slope, Tensor)
    scores = [torch.autograd.functional.jacobian(lambda g, y=y: torch.log_softmax(g, 0)[y], f) for y in range(6)]
    p = torch.softmax(f, 0)
    total = sum(float(p[y]) * torch.outer(u, u) for y, u in enumerate(scores) if isinstance(u, Tensor))
    assert isinstance(total, Tensor)
    assert oracles.relative(slope.T @ slope, total) < 1e-12


def test_masked_positions_are_zero_rows_without_slope() -> None:
    f = draw(0, 2, 3, 4)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    padded = torch.where(mask[..., None], f, torch.nan)
    for geometry in KINDS:
        z = embed(geometry, (padded,), [mask]).reshape(2, 3, 4)
        assert torch.equal(z[mask], geometry.embed(f[mask])) and bool((z[~mask] == 0).all())
        slope = torch.autograd.functional.jacobian(lambda g, a=geometry: embed(a, (g,), [mask]), padded)
        assert isinstance(slope, Tensor) and bool(torch.isfinite(slope).all())
        assert bool((slope.reshape(-1, 2, 3, 4)[:, ~mask] == 0).all())
