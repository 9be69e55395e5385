"""What is seen of a forward pass: sites, parameters used beside them, and activations that are overwritten."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.jacobian.factored.capture import READERS, Recorder
from fipgeo.jacobian.factored.plan import Tracing, plan, slow_index, trace
from fipgeo.outputs import Euclidean

from .. import models
from .kinds import EXAMPLES, KINDS, Kind, Net, empty, prepared

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def traced(module: nn.Module, inputs: Any, examples: int = EXAMPLES) -> Tracing:
    """The sites of one batch at the module's weights."""
    map_ = OutputMap(module)
    function = EmbeddedOutputs(map_, Euclidean(), as_batches([inputs]))
    with map_.frozen():
        return trace(function, map_.named(map_.point()), inputs, examples)


def kinds_of(tracing: Tracing) -> list[tuple[str, str]]:
    """The terms in order."""
    return [(term.kind, term.name) for site in tracing.sites for term in site.terms]


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_has_a_rule_or_is_known_to_have_none(name: str) -> None:
    kind = KINDS[name]
    module, inputs = prepared(kind)
    shapes = OutputMap(module).space.shapes
    found = plan(traced(module, inputs), {n: torch.Size(s) for n, s in shapes.items()}, 2, 8, 1e9)
    plain = {n for n in shapes if "parametrizations" in n or n.endswith(("_orig", ".bias_k", ".bias_v"))}
    free = {"log", "spare.bias"} & set(shapes)  # empty, used beside sites only, not used
    assert set(found.uncovered) == set(kind.rows) | plain | free


def test_each_function_leaves_its_terms() -> None:
    module, inputs = prepared(KINDS["vision"])
    assert kinds_of(traced(module, inputs)) == [
        ("linear", "embed.weight"),
        ("shift", "embed.bias"),
        ("shift", "token"),
        ("shift", "place"),
        ("linear", "mix.weight"),
        ("shift", "mix.bias"),
        ("scale", "gamma"),
        ("scale", "norm.weight"),
        ("shift", "norm.bias"),
        ("linear", "head.weight"),
        ("shift", "head.bias"),
    ]
    module, inputs = prepared(KINDS["matrix products"])
    assert kinds_of(traced(module, inputs)) == [
        ("linear", "weight"),
        ("shift", "bias"),
        ("linear", "second"),
        ("shift", "shift"),
    ]
    module, inputs = prepared(KINDS["self-attention"])
    names = [name for _, name in kinds_of(traced(module, inputs))]
    assert names[:4] == [
        f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]


def _runs(module: Any, x: Tensor) -> Tensor:
    p, w = module.p, module.w
    out = [x + p, p + x, torch.add(x, p), x.add(p), x * p, p * x, torch.mul(x, p), x.mul(p)]
    out += [x @ w, torch.matmul(x, w), x.matmul(w), torch.mm(x, w), x.mm(w), F.linear(x, w), torch.addmm(p, x, w)]
    return torch.stack(out).sum(0)


def test_every_spelling_is_read() -> None:
    module, inputs = prepared(Kind(lambda: Net(_runs, p=empty(3), w=empty(3, 3)), (3,)))
    found = traced(module, inputs)
    assert [kind for kind, _ in kinds_of(found)] == ["shift"] * 4 + ["scale"] * 4 + ["linear"] * 7 + ["shift"]
    assert not found.outside
    assert all(not isinstance(reader, str) for reader in READERS.values())


def _beside(module: Any, x: Tensor) -> Tensor:
    x[:, 0] = module.c
    return torch.cat([F.linear(x, module.w), F.linear(x, module.w[:1])], 1) + torch.stack([module.a, module.b]).sum()


def test_parameters_that_other_functions_use_are_listed() -> None:
    module, inputs = prepared(
        Kind(lambda: Net(_beside, w=empty(2, 3), a=empty(), b=empty(), c=empty(), d=empty(2)), (3,))
    )
    assert traced(module, inputs).outside == {"w", "a", "b", "c"}


def _looks(module: Any, x: Tensor) -> Tensor:
    assert module.w.shape == (2, 3) and module.w.dtype == x.dtype and module.w.size(0) == 2 and module.w.dim() == 2
    assert module.w.device == x.device and module.w.is_floating_point() and bool((module.w == module.w).all())
    return F.linear(x, module.w)


def test_looking_at_a_parameter_is_no_use_of_it() -> None:
    module, inputs = prepared(Kind(lambda: Net(_looks, w=empty(2, 3)), (3,)))
    found = traced(module, inputs)
    assert not found.outside and kinds_of(found) == [("linear", "w")]


def _overwrites(module: Any, x: Tensor) -> Tensor:
    h = module.a(x)
    out = module.b(h)
    h.mul_(2)
    return out + module.c(h) + module.c(h)


def test_overwritten_activations_are_found_and_copied() -> None:
    module, inputs = prepared(
        Kind(lambda: Net(_overwrites, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 2)), (3,))
    )
    found = traced(module, inputs)
    sources = {term.name: term.source for site in found.sites for term in site.terms if term.kind == "linear"}
    assert sources == {"a.weight": 0, "b.weight": 1, "c.weight": 2}  # the third is kept once for both uses
    assert found.overwritten == {1}
    names = {id(p): name for name, p in module.named_parameters()}
    with torch.no_grad(), Recorder(names, EXAMPLES, copies=found.overwritten) as seen:
        module(inputs)
    h = module.get_submodule("a")(inputs)
    assert torch.equal(seen.inputs[1], h) and torch.equal(seen.inputs[2], 2 * h)


@pytest.mark.parametrize("name", ["in_place", "convnet", "encoder"])
def test_in_place_layers_after_a_site_overwrite_nothing_that_is_kept(name: str) -> None:
    module, inputs = models.build(name)
    assert not traced(module, inputs).overwritten


def test_probes_do_not_change_outputs_and_collect_derivatives() -> None:
    module, inputs = prepared(KINDS["vision"])
    names = {id(p): name for name, p in module.named_parameters()}
    sites = traced(module, inputs).sites
    probes = [torch.zeros(site.shape, requires_grad=True) for site in sites]
    with Recorder(names, EXAMPLES, probes) as seen:
        z = module(inputs)
    assert torch.equal(z, module(inputs)) and [s.shape for s in seen.sites] == [s.shape for s in sites]
    slopes = torch.autograd.grad(z.sum(), [*probes, module.get_parameter("head.bias")])
    assert torch.equal(slopes[-2].sum(0), slopes[-1])


def test_the_layout_is_read_off_derivatives() -> None:
    module, inputs = prepared(KINDS["time first"])
    site = traced(module, inputs).sites[0]
    assert site.shape == (4, 5, 4)
    first, last, none = torch.zeros(3, *site.shape)
    first[:, 0], last[:, -1] = 1.0, 1.0
    assert slow_index(site, first, last, EXAMPLES) is False
    t = torch.arange(80.0).view(4, 5, 4)
    assert torch.equal(site.arranged(t, EXAMPLES, major=False), t.transpose(0, 1))
    assert slow_index(site, torch.ones(4, 5, 4), none, EXAMPLES) is None
    assert slow_index(site, none, none, EXAMPLES) is False  # no derivative at all: by the shape
    assert slow_index(site, none, none, 4) is slow_index(site, none, none, 2) is True
    single = traced(module, inputs[:1], 1).sites[0]
    assert slow_index(single, torch.ones(single.shape), torch.ones(single.shape), 1) is False


def test_batches_of_other_sizes_trace_alike_and_other_lengths_do_not() -> None:
    module, inputs = prepared(KINDS["encoder, norm first"])
    whole = traced(module, inputs).signature
    assert whole == traced(module, inputs[:2], 2).signature == traced(module, inputs[:1], 1).signature
    assert whole != traced(module, inputs[:, :2]).signature


def test_a_parameter_is_held_as_rows_or_as_factors_but_never_both() -> None:
    module, inputs = prepared(KINDS["language model"])
    shapes = {name: p.shape for name, p in module.named_parameters()}
    for budget in (0, 1e9):
        chosen = plan(traced(module, inputs), shapes, 24, 8, budget).chosen
        assert len({form.factored for (_, name), form in chosen.items() if name == "token.weight"}) == 1
    module, inputs = prepared(KINDS["recurrent"])
    shapes = {name: p.shape for name, p in module.named_parameters()}
    found = plan(traced(module, inputs), shapes, 2, 8, 1e9)
    assert found.num_bytes <= 2 * 8 * sum(s.numel() for s in shapes.values())  # rows of three uses add up to one set
