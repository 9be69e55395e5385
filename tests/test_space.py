"""Weight space: the order of coordinates, choosing tensors, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import WeightSpace
from fipgeo.space import Where, select

from .models import CASES, build


@pytest.mark.parametrize("name", CASES)
def test_the_order_is_that_of_the_parameters(name: str) -> None:
    module, _ = build(name)
    space = WeightSpace.of(module)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    assert space.names == [n for n, _ in trained]
    assert space.dim == sum(p.numel() for _, p in trained) == space.point(module).numel()
    assert torch.equal(space.point(module), nn.utils.parameters_to_vector([p for _, p in trained]).detach())


@given(seed=st.integers(0, 2**20), lead=st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_ravel_and_unravel_are_inverse(seed: int, lead: tuple[int, ...]) -> None:
    space = WeightSpace.of(build("convnet")[0])
    v = torch.randn(*lead, space.dim, generator=torch.Generator().manual_seed(seed))
    tensors = space.unravel(v)
    assert all(tensors[name].shape == lead + shape for name, shape in space.shapes.items())
    assert torch.equal(space.ravel(tensors), v)
    for name, where in space.slices().items():
        assert torch.equal(tensors[name].flatten(len(lead)), v[..., where])


def test_assign_writes_the_point_and_nothing_else() -> None:
    module, _ = build("frozen_part")
    frozen = module[0].weight.clone()  # type: ignore[index, union-attr]
    space = WeightSpace.of(module)
    v = torch.arange(float(space.dim))
    space.assign_(module, v)
    assert torch.equal(space.point(module), v) and torch.equal(module[0].weight, frozen)  # type: ignore[index, union-attr]
    assert module[2].weight.requires_grad and module[2].weight.is_leaf  # type: ignore[index, union-attr]
    before = space.point(module)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))):
        with pytest.raises(ValueError, match=r"assign_: the module has no parameters 2.weight, 2.bias of the shapes"):
            space.assign_(other, v)
    assert torch.equal(space.point(module), before)


def test_displacement_of_state_dicts() -> None:
    (a, _), (b, _) = build("convnet", 1), build("convnet", 2)
    space = WeightSpace.of(a)
    assert torch.equal(space.displacement(a.state_dict(), b.state_dict()), space.point(b) - space.point(a))
    broken = a.state_dict()
    del broken["0.weight"]
    broken["5.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"ravel: 0.weight is missing; 5.bias has shape \[7\], expected \[..., 3\]"):
        space.displacement(broken, b.state_dict())


def test_shapes_that_do_not_fit_are_listed() -> None:
    space = WeightSpace.of(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"unravel: got shape \[7\], expected the last axis to be D = 8"):
        space.unravel(torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias has leading axes \[4\], the others \[5\]"):
        space.ravel({"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(4, 2)})


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, NAMES),
        ("*", NAMES),
        ("*.weight", NAMES[::2]),
        (["2.*", "0.bias"], NAMES[1:]),  # in the order of the space, not of the patterns
        ({"2.bias"}, NAMES[3:]),
        ("?.bias", NAMES[1::2]),
        (lambda name, tensor: tensor.dim() > 1 and name != "0.weight", ["2.weight"]),
    ],
)
def test_subsets(where: Where, expected: list[str]) -> None:
    module, _ = build("mlp")
    space = WeightSpace.of(module, where)
    whole = WeightSpace.of(module)
    assert space.names == expected == whole.subset(where).names
    mask = whole.mask(where)
    assert torch.equal(whole.point(module)[mask], space.point(module))


def test_frozen_parameters_are_coordinates_if_they_are_named() -> None:
    module, _ = build("frozen_part")
    assert WeightSpace.of(module, "0.*").names == NAMES[:2]
    assert WeightSpace.of(module).names == NAMES[2:]


def test_patterns_that_choose_nothing_name_the_nearest() -> None:
    module, _ = build("mlp")
    with pytest.raises(
        ValueError, match=r"params: the pattern '2.wieght' matches none of 4 .*nearest: 2.weight, 0.weight"
    ):
        WeightSpace.of(module, ["0.*", "2.wieght"])
    with pytest.raises(ValueError, match="params: the predicate chose none of 4 tensors: 0.weight, 0.bias"):
        WeightSpace.of(module, lambda name, tensor: False)
    with pytest.raises(ValueError, match="params: an empty list of patterns chooses nothing"):
        WeightSpace.of(module, [])
    with pytest.raises(TypeError, match="params: got a Parameter among the patterns; expected globs"):
        WeightSpace.of(module, module.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude: the pattern 'x' matches none of 7 tensors.* and 1 more"):
        select({str(i): torch.zeros(1) for i in range(7)}, "x", argument="exclude")


def test_tied_tensors_count_once_under_any_of_their_names() -> None:
    module, _ = build("tied")
    space = WeightSpace.of(module)
    assert space.names == ["inner.weight", "inner.bias", "outer.bias"] and space.dim == 24
    assert space.aliases == {"outer.weight": "inner.weight"}
    assert WeightSpace.of(module, "outer.weight").names == ["inner.weight"]
    assert WeightSpace.of(module, "*.weight").names == ["inner.weight"]
    assert space.subset("*.bias").aliases == {}
    space.assign_(module, torch.ones(24))
    assert module.outer.weight is module.inner.weight and float(module.outer.weight.detach().sum()) == 16  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16,), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_the_algebra_is_at_least_float32(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    module = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in dtypes])
    space = WeightSpace.of(module)
    assert space.dtype == space.point(module).dtype == expected


def test_what_cannot_be_a_coordinate() -> None:
    with pytest.raises(ValueError, match="model: ReLU has no parameters"):
        WeightSpace.of(nn.ReLU())
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"params: no parameter of the model requires a gradient; .* params='\*'"):
        WeightSpace.of(module)
    assert WeightSpace.of(module, "*").dim == 6
    odd = nn.ParameterDict({"c": nn.Parameter(torch.ones(2, dtype=torch.complex64)), "w": nn.Parameter(torch.ones(2))})
    with pytest.raises(ValueError, match=r"params: c \(torch.complex64\) cannot be a coordinate: expected float32"):
        WeightSpace.of(odd)
    assert WeightSpace.of(odd, "w").dim == 2
    with pytest.raises(ValueError, match="params: weight, bias have no shape yet; call the model on one batch first"):
        WeightSpace.of(nn.LazyLinear(3))
    split = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"params: the chosen tensors live on several devices \['cpu', 'meta'\]"):
        WeightSpace.of(split)


class DTensor(Tensor):
    """Stands in for a sharded tensor: it is known by its name."""


def test_sharded_tensors_are_refused() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(2, 2).as_subclass(DTensor))
    with pytest.raises(NotImplementedError, match=r"params: weight are DTensors .* gather the full parameters first"):
        WeightSpace.of(module)


def test_repr() -> None:
    assert repr(WeightSpace.of(nn.Linear(30, 40))) == "WeightSpace(D=1,240 in 2 tensors, torch.float64, cpu)"
