"""Weights that their owner keeps on manifolds stay there along paths, and what cannot keep them there says so."""

from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fipgeo
from fipgeo import Chart, FirstOrder, LayerLocal, MetricField
from fipgeo.constraints import Constraints
from fipgeo.optim import FIP

from .toys import FEATURES, FIRST_ORDER, GAUSS_NEWTON, draw, inputs, jacobian_by_backward, kept_of, labels, stored

GEOOPT: Any = geoopt  # its annotations do not know of its own arguments
ORTHOGONAL, UNIT, MATRIX = "0.weight", "2.weight", "4.weight"


def on_manifolds(seed: int, canonical: bool = True) -> Any:
    """Orthogonal columns, then rows of length one, then a Euclidean matrix with nothing to hold."""
    net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    first, second = torch.linalg.qr(draw(seed, 6, FEATURES))[0], draw(seed + 1, 6, 6)
    net[0].weight = GEOOPT.ManifoldParameter(first, manifold=GEOOPT.Stiefel(canonical=canonical))
    net[2].weight = GEOOPT.ManifoldParameter(second / second.norm(dim=1, keepdim=True), manifold=GEOOPT.Sphere())
    net[4].weight = GEOOPT.ManifoldParameter(draw(seed + 2, 3, 6), manifold=GEOOPT.Euclidean())
    return net.eval()


def gap(tensors: Any) -> float:
    """How far the tensors are from their manifolds, by hand."""
    a, b = tensors[ORTHOGONAL], tensors[UNIT]
    return max(float((a.T @ a - torch.eye(FEATURES)).abs().max()), float((b.norm(dim=1) - 1).abs().max()))


@settings(max_examples=3)
@given(seed=st.integers(0, 10**6), canonical=st.booleans(), corrector=st.sampled_from([0, 1, 2]))
def test_every_point_of_a_path_is_on_the_manifolds(seed: int, canonical: bool, corrector: int) -> None:
    net, x = on_manifolds(seed, canonical), inputs(seed)
    options: dict[str, Any] = {"exclude": ["0.*", "2.*"], "generator": seed}
    options |= {"corrector": [GAUSS_NEWTON, FIRST_ORDER, LayerLocal()][corrector], "score": "magnitude"}
    sparse = fipgeo.sparsify(net, x, 0.5, **options)
    assert sparse.outcome == "reached" and int((stored(sparse[-1])[MATRIX] == 0).sum()) == 9
    new = (draw(seed + 5, 40, FEATURES), labels(seed, 40))
    options = {"keep": x, "after": sparse, "hold_zeros": True, "store": "all", "batch_size": 20, "refresh": 1}
    path = fipgeo.adapt(net, new, nn.functional.cross_entropy, geometry="logits", **options)
    assert len(path) > len(sparse) and max(gap(stored(point)) for point in path) < 1e-12
    assert int((stored(path[-1])[MATRIX] == 0).sum()) == 9
    for name in (ORTHOGONAL, UNIT):
        assert float((stored(path[-1])[name] - stored(path[0])[name]).norm()) > 1e-4  # they do move
    path[-1].apply_(net)
    assert isinstance(net[0].weight, GEOOPT.ManifoldParameter)


@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), canonical=st.booleans())
def test_moves_are_those_of_a_jacobian_along_the_manifolds(seed: int, canonical: bool) -> None:
    net, x = on_manifolds(seed, canonical), inputs(seed, 8)
    kept = kept_of(net, x)
    theta, rows = kept.start, jacobian_by_backward(net, x)
    named = kept.space.unravel(rows)
    a, b = (p.detach().as_subclass(Tensor) for p in (net[0].weight, net[2].weight))
    inner = a.T @ named[ORTHOGONAL]
    along = named[ORTHOGONAL] - a @ (inner + inner.mT) / 2
    level = named[UNIT] - (named[UNIT] * b).sum(-1, keepdim=True) * b
    wanted = kept.space.ravel({**named, ORTHOGONAL: along, UNIT: level})
    tangent = kept.tangent(fipgeo.paths.Position(theta))
    free = torch.rand(len(theta), generator=torch.Generator().manual_seed(seed)) < 0.7
    free |= Constraints.of(net, kept.space).mask
    assert torch.allclose(tangent.root.to_dense(), wanted, atol=1e-10)
    assert torch.allclose(tangent.columns(free), wanted[:, free], atol=1e-10)
    # bringing back is a step along the manifold to first order, so that the function changes as its rows say
    v = draw(seed + 3, len(theta))
    ends = [kept.residual(kept.moved(fipgeo.paths.Position(theta), theta + h * v)) / h for h in (1e-5, -1e-5)]
    assert torch.allclose((ends[0] + ends[1]) / 2, wanted @ v, atol=1e-6)


def test_a_euclidean_manifold_is_no_constraint() -> None:
    net = on_manifolds(0)
    assert list(Constraints.of(net, MetricField(net, inputs()).space).manifolds) == [ORTHOGONAL, UNIT]
    assert not Constraints.of(net, MetricField(net, inputs(), params="4.*").space)


def test_what_cannot_keep_them_there_says_so() -> None:
    net, x = on_manifolds(3), inputs()
    with pytest.raises(NotImplementedError, match=r"'0.weight' on Stiefel.*zeros.*exclude=\['0.weight', '2.weight'\]"):
        fipgeo.sparsify(net, x, 0.5)
    with pytest.raises(NotImplementedError, match=r"'2.weight'.*along a geodesic.*params="):
        Chart(MetricField(net, x, params="2.*"))
    with pytest.raises(NotImplementedError, match="between the networks"):
        fipgeo.connect(net, net, x)
    with pytest.raises(NotImplementedError, match=r"optimiser; fipgeo\.adapt"):
        FIP(net.parameters(), MetricField(net, x))
    with torch.no_grad():
        net.get_parameter(UNIT).mul_(2)
    with pytest.raises(ValueError, match=r"'2.weight' is off its manifold.*proj_"):
        fipgeo.sparsify(net, x, 0.5, exclude=["0.*", "2.*"], corrector=FirstOrder(steps=1))
    net[2].weight = GEOOPT.ManifoldParameter(GEOOPT.Lorentz().projx(draw(0, 6, 6)), manifold=GEOOPT.Lorentz())
    with pytest.raises(NotImplementedError, match=r"'2.weight' lies on Lorentz.*params="):
        fipgeo.sparsify(net, x, 0.5, exclude=["0.*", "2.*"], corrector=FirstOrder(steps=1))
