"""The tangent model against the dense Jacobian, and as a module among torch's own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hygiene import unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fipgeo import TangentModel
from fipgeo.trees import copied

KERNELS = {"encoder", "attention", "scaled_dot_product"}  # whose fused kernels round otherwise than plain ones
seeds = st.integers(0, 2**31)


def called(module: nn.Module, inputs: Any) -> Any:
    private = copied(inputs)
    return module(**private) if isinstance(private, dict) else module(private)


def flat(raw: Any) -> Tensor:
    return torch.cat([leaf.flatten(1) for leaf in oracles.leaves(raw)], 1).flatten()


def gradient(model: TangentModel) -> Tensor:
    found = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in model.tangents().items()}
    return model.space.ravel(found)


def drawn(model: TangentModel, seed: int) -> Tensor:
    """A random tau, written into the model."""
    tau = torch.randn(model.space.dim, generator=torch.Generator().manual_seed(seed))
    model.assign_(model.space.unravel(tau))
    return tau


def images(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """A convolutional network with BatchNorm statistics of its own, in train mode, and inputs."""
    generator = torch.Generator().manual_seed(seed)
    net, _ = build("convnet", seed)
    assert isinstance(net, nn.Sequential)
    return net.train(), torch.randn(6, 1, 4, 4, generator=generator)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4)
@given(seed=seeds)
def test_values_and_gradients_are_those_of_the_dense_jacobian(name: str, seed: int) -> None:
    module, inputs = build(name, seed % 1000)
    model = TangentModel(module)
    start = flat(called(model.base, inputs)).detach()
    jacobian = oracles.root(module, inputs)
    tau = drawn(model, seed)
    out = flat(called(model, inputs))
    assert torch.allclose(out.detach(), start + jacobian @ tau, rtol=1e-10, atol=1e-10)
    u = torch.randn(len(out), generator=torch.Generator().manual_seed(seed + 1))
    (out @ u).backward()
    assert torch.allclose(gradient(model), jacobian.T @ u, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_it_starts_as_the_module_in_eval_mode(name: str) -> None:
    module, inputs = build(name, 1)
    model = TangentModel(module)
    expected, found = called(copy.deepcopy(model.base), inputs), called(model, inputs)
    assert type(expected) is type(found)
    for a, b in zip(oracles.leaves(expected), oracles.leaves(found), strict=True):
        assert torch.equal(a, b) or (name in KERNELS and torch.allclose(a, b, rtol=1e-13, atol=1e-14))


def test_outputs_are_exact_where_gradients_are_off() -> None:
    for name in CASES:
        module, inputs = build(name, 2)
        model = TangentModel(module)
        drawn(model, 3)
        with torch.no_grad():
            quiet = flat(called(model, inputs))
        with torch.inference_mode():
            inference = flat(called(model, inputs))
        loud = flat(called(model, inputs))
        assert not quiet.requires_grad and loud.requires_grad
        assert torch.equal(quiet, loud) and torch.equal(inference, loud)


@given(seed=seeds)
def test_outputs_are_affine_in_tau(seed: int) -> None:
    net, x = images()
    model = TangentModel(net)
    start, a = model(x), drawn(model, seed)
    one, b = model(x), drawn(model, seed + 1)
    two = model(x)
    model.assign_(model.space.unravel(2 * a - 3 * b))
    assert torch.allclose(model(x) - start, 2 * (one - start) - 3 * (two - start), rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_some_weights_alone(seed: int) -> None:
    net, x = images()
    model = TangentModel(net, ["5.weight", "1.*"])
    assert model.names == ["1.weight", "1.bias", "5.weight"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"tau.{name}" for name in model.names]
    tau = drawn(model, seed)
    jacobian = oracles.root(net, x, where=lambda n: n in set(model.names))
    expected = flat(copy.deepcopy(net).eval()(x)) + jacobian @ tau
    assert torch.allclose(flat(model(x)), expected, rtol=1e-10, atol=1e-10)


def test_what_stands_before_the_trainable_part_has_no_graph() -> None:
    net, x = images()
    model = TangentModel(net, "5.*")
    nodes, stack = set(), [model(x).grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    names = {type(node).__name__ for node in nodes}
    assert not any("Convolution" in n or "BatchNorm" in n or "Pool" in n for n in names), names


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimiser_trains_it_and_nothing_else_moves(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    net, x = images()
    before = copy.deepcopy(net.state_dict())
    model = TangentModel(net).train()
    base = copy.deepcopy(model.base.state_dict())
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    steps = optimizer(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(steps, 5)
    losses = []
    for _ in range(10):
        steps.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        steps.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, base[n]) for n, t in model.base.state_dict().items())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in model.base.parameters())
    assert model.training and not any(part.training for part in model.base.modules())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_module_and_the_inputs_stay_as_they_were(name: str, share: bool) -> None:
    module, inputs = build(name, 4)
    with unchanged(module, inputs):
        model = TangentModel(module, copy=not share)
        flat(called(model, inputs)).sum().backward()


def test_shared_memory_and_own_memory() -> None:
    net, x = images()
    own, shared = TangentModel(net), TangentModel(net, copy=False)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(net.parameters(), shared.base.parameters(), strict=True))
    before = own(x)
    shared.double().float()
    assert next(net.parameters()).dtype == torch.float64
    with torch.no_grad():
        net[5].weight.mul_(2)  # type: ignore[operator]
    assert torch.equal(own(x), before)


def test_state_dicts_copies_and_pickles() -> None:
    net, x = images()
    model = TangentModel(net, "5.*")
    drawn(model, 1)
    out = model(x)
    state = model.state_dict()
    assert "tau.5.weight" in state and "base.0.weight" in state
    other = TangentModel(build("convnet", 7)[0], "5.*")
    other.load_state_dict(state)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (other, twin, again):
        assert torch.equal(one(x), out)
    drawn(twin, 2)
    assert torch.equal(model(x), out) and not torch.equal(twin(x), out)


def test_casts_reach_everything() -> None:
    net, x = images()
    model = TangentModel(net)
    drawn(model, 1)
    exact = model(x)
    narrow = copy.deepcopy(model).float()
    assert narrow(x.float()).dtype == torch.float32 and narrow.space.dtype == torch.float32
    assert torch.allclose(narrow(x.float()).double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(narrow.double()(x).float(), narrow(x).float())


def test_autocast_is_the_callers() -> None:
    net, x = images()
    model = TangentModel(net).float()
    drawn(model, 1)
    exact = model(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x.float())
        assert out.dtype == net.float().eval()(x.float()).dtype == torch.bfloat16
    assert torch.allclose(out.float(), exact, rtol=0.1, atol=0.2)
    out.float().sum().backward()
    assert torch.equal(model(x.float()), exact)  # a way that autocast asked for is not taken without it


def test_gradients_of_single_examples_and_of_inputs() -> None:
    net, x = images()
    model = TangentModel(net)
    drawn(model, 1)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(tau: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, tau, (x[None],)).square().sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.allclose(single[name].sum(0), p.grad, rtol=1e-9, atol=1e-9)
    for name in ("mlp", "weight_norm"):  # by forward mode, and by the transpose of reverse mode
        module, inputs = build(name, 1)
        model = TangentModel(module)
        drawn(model, 1)
        slope = oracles.slope(lambda v, m=model: m(v.unflatten(0, (5, 3))).sum(1).detach(), inputs.flatten())
        inputs.requires_grad_()
        model(inputs).sum().backward()
        assert inputs.grad is not None
        assert torch.allclose(inputs.grad.flatten(), slope.sum(0), rtol=1e-6, atol=1e-6)


def test_compiled_calls_give_the_same_numbers() -> None:
    net, x = images()
    model = TangentModel(net)
    drawn(model, 1)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), model(x)) and compiled(x).requires_grad


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.layer(checkpoint(torch.tanh, x, use_reentrant=False) if labels is None else x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def test_what_cannot_be_right_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="compute the loss from what it returns"):
        TangentModel(WithLoss())(x, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="checkpointed modules"):
        TangentModel(WithLoss())(x)
    with pytest.raises(ValueError, match="no running statistics|keeps no running"):
        TangentModel(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(TypeError, match="linear already"):
        TangentModel(TangentModel(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="got str"):
        TangentModel("net")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches none"):
        TangentModel(nn.Linear(3, 2), "head.*")
    model = TangentModel(nn.Linear(3, 2), "weight")
    with pytest.raises(ValueError, match="not among"):
        model.assign_({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        model.assign_({"weight": torch.ones(3, 2)})
    assert not model.tangents()["weight"].any()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size"):
        model(torch.ones(4, 5))
    assert torch.equal(model(x), model.base(x))
