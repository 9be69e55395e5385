"""Compositions against weights that are put together by hand, with gradients by plain autograd."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from fipgeo import Composition, TaskVector, WeightSpace, metric
from fipgeo.atlas import Isotropic, Kind, Partitions, PerBlock, PerChannel, PerLayer
from fipgeo.atlas.blocks import Block
from fipgeo.checkpointing import CheckpointError
from fipgeo.linalg import adjoint_gap, dense_gap

from ..models import Tied
from ..test_task_vectors import shaken

KINDS: dict[str, Kind] = {
    "isotropic": Isotropic(),
    "per layer": PerLayer(),
    "two groups": PerLayer(lambda name: "bias" if name.endswith("bias") else "rest"),
    "per block": PerBlock(),
    "per channel": PerChannel({"conv.weight": 2, "mix": 2, "head.weight": 2, "first.weight": 4}),
    "partitions": Partitions(3, seed=5),
    "one part": Partitions(1),
    "every weight": Partitions(1000),
}


class Mixed(nn.Module):
    """Parameters of one to five axes, and none; one that no output depends on; a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.volume = nn.Conv3d(1, 1, (1, 2, 1))
        self.norm = nn.BatchNorm2d(2)
        self.mix = nn.Parameter(torch.ones(2, 2, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))  # [N, 2, 3, 3]
        x = self.volume(x.unsqueeze(1)).squeeze(1)  # [N, 2, 2, 3]
        return self.head((x * self.mix).sum((1, 2))) * self.scale


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (5, 1, 4, 4)),
    "tied": (Tied, (5, 4)),
}

seeds = st.integers(0, 2**20)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank(name: str, seed: int, count: int = 3) -> tuple[nn.Module, list[TaskVector], Tensor]:
    make, shape = MODELS[name]
    base = shaken(make(), seed).eval()
    return base, [TaskVector.between(base, shaken(base, seed + i + 1)) for i in range(count)], draw(seed, *shape)


def columns(model: Composition, vectors: list[TaskVector], space: WeightSpace) -> Tensor:
    """B `[D, n S]` written down column by column, from the labels and the parts' places."""
    sizes = dict(zip(space.names, space.sizes, strict=True))
    out = torch.zeros(space.dim, len(vectors), len(model.labels))
    used = model.kind.columns(sizes)
    for i, vector in enumerate(vectors):
        flat = vector.ravel(space)
        for name, where in space.slices().items():
            order, width = model.kind.order(name, sizes[name]), -(-sizes[name] // len(used[name]))
            part = torch.zeros(sizes[name], dtype=torch.long) if order is None else order.long() // width
            out[torch.arange(where.start, where.stop), i, used[name][part]] = flat[where]
    return out.flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@given(seed=seeds)
@settings(max_examples=4)
def test_operators_are_their_columns(name: str, kind: str, seed: int) -> None:
    base, vectors, _ = bank(name, seed, 2)
    model, space = Composition(base, vectors, KINDS[kind]), WeightSpace.of(base)
    found = model.operator()
    assert dense_gap(found, columns(model, vectors, space)) < 1e-12 and adjoint_gap(found) < 1e-12
    c = draw(seed, *model.coefficients.shape)
    with torch.no_grad():
        model.coefficients.copy_(c)
    expected = space.point(base) + found(c.flatten())
    torch.testing.assert_close(space.point(model.merge()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@given(seed=seeds)
@settings(max_examples=4)
def test_outputs_and_gradients_are_those_of_plain_autograd(name: str, kind: str, seed: int) -> None:
    base, vectors, x = bank(name, seed)
    model, space = Composition(base, vectors, KINDS[kind]), WeightSpace.of(base)
    matrix, start = columns(model, vectors, space), space.point(base)
    c = (0.3 * draw(seed, model.coefficients.numel())).requires_grad_()
    with torch.no_grad():
        model.coefficients.copy_(c.view_as(model.coefficients))
    expected = functional_call(base, space.unravel(start + matrix @ c), (x,))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(expected.square().sum(), c)
    found.square().sum().backward()
    assert model.coefficients.grad is not None
    torch.testing.assert_close(model.coefficients.grad.flatten(), gradient, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.merge()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["per block", "partitions"])
@pytest.mark.parametrize("seed", [1, 2])
def test_derivatives_of_every_mode_and_order(kind: str, seed: int) -> None:
    base, vectors, x = bank("tied", seed, 2)
    model = Composition(base, vectors, KINDS[kind])
    space = WeightSpace.of(base)
    matrix, start = columns(model, vectors, space), space.point(base)

    def plain(c: Tensor) -> Tensor:
        return functional_call(base, space.unravel(start + matrix @ c), (x,))

    def composed(c: Tensor) -> Tensor:
        return functional_call(model.module, model.weights(c), (x,))

    c = 0.3 * draw(seed, model.coefficients.numel())
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(composed)(c), transform(plain)(c), rtol=1e-9, atol=1e-10)
    stack = torch.stack([c, -c])
    torch.testing.assert_close(vmap(composed)(stack), vmap(plain)(stack), rtol=1e-10, atol=1e-10)
    second = hessian(lambda z: composed(z).square().sum())(c)
    torch.testing.assert_close(second, hessian(lambda z: plain(z).square().sum())(c), rtol=1e-8, atol=1e-9)
    assert torch.autograd.gradcheck(composed, (c.clone().requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda z: composed(z).sum(), (c.clone().requires_grad_(),))


@given(seed=seeds)
def test_once_is_the_sum_of_separate_passes(seed: int) -> None:
    base, vectors, x = bank("mixed", seed)
    one, two = Composition(base, vectors, start=0.1), Composition(base, vectors, start=0.1)
    for part in x.split(2):
        one(part).square().sum().backward()
    with two.once():
        for part in x.split(2):
            two(part).square().sum().backward()
        with pytest.raises(RuntimeError, match="once: the composition is in such a block already"), two.once():
            pass
    assert one.coefficients.grad is not None and two.coefficients.grad is not None
    torch.testing.assert_close(two.coefficients.grad, one.coefficients.grad, rtol=1e-9, atol=1e-11)
    with pytest.raises(KeyError), two.once():
        raise KeyError
    with torch.no_grad(), two.once():
        torch.testing.assert_close(two(x), one(x))
    torch.testing.assert_close(two(x), one(x))


@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]), kind=st.sampled_from(sorted(KINDS)))
def test_half_storage_is_summed_wide(seed: int, dtype: torch.dtype, kind: str) -> None:
    """Stored in half precision is the same as rounding the vectors first, to the precision of the sums."""
    base, vectors, x = bank("mixed", seed)
    rounded = [vector.to(dtype).to(torch.float64) for vector in vectors]
    half = Composition(base, vectors, KINDS[kind], dtype=dtype, start=0.2)
    wide = Composition(base, rounded, KINDS[kind], start=0.2)
    assert {block.data.dtype for block in half._blocks()} == {dtype}
    for model in (half, wide):
        model(x).square().sum().backward()
    assert half.coefficients.grad is not None and wide.coefficients.grad is not None
    torch.testing.assert_close(half(x), wide(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(half.coefficients.grad, wide.coefficients.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("parts", [1, 7])
def test_half_storage_in_many_pieces(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fipgeo.atlas.blocks._PIECE", 20)
    base = nn.Linear(9, 11)
    vectors = [TaskVector.between(base, shaken(base, i), dtype=torch.bfloat16) for i in range(3)]
    half = Composition(base, vectors, Partitions(parts), start=0.3)
    wide = Composition(base, [vector.to(torch.float64) for vector in vectors], Partitions(parts), start=0.3)
    assert dense_gap(half.operator(), wide.operator().to_dense()) < 1e-14 and adjoint_gap(half.operator()) < 1e-14


def test_half_networks_have_float32_coefficients() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    vectors = [TaskVector.between(base, shaken(base, i)) for i in range(2)]
    model = Composition(base, vectors, start=0.5)
    assert model.coefficients.dtype == torch.float32
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    total = vectors[0].tensors["0.weight"] + vectors[1].tensors["0.weight"]
    expected = base.get_parameter("0.weight").float() + 0.5 * total
    torch.testing.assert_close(model.weights()["0.weight"], expected.to(torch.bfloat16))
    assert model.merge()[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]


@pytest.mark.parametrize("train", [False, True])
def test_batch_normalisation_behaves_as_in_the_merged_network(train: bool) -> None:
    base, vectors, x = bank("mixed", 4)
    model = Composition(base, vectors, start=0.2)
    merged = model.merge()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    for net in (model, merged):
        net.train(train)
    for _ in range(2):
        torch.testing.assert_close(model(x), merged(x))
    for name, buffer in model.module.named_buffers():
        torch.testing.assert_close(buffer, merged.get_buffer(name))
    assert int(model.module.get_buffer("norm.num_batches_tracked")) == 2 * train
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items()) and not base.training


def test_merging_gives_a_plain_module_and_unloading_the_first() -> None:
    base, vectors, x = bank("tied", 2)
    base.get_parameter("outer.bias").requires_grad_(False)
    model = Composition(base, vectors, start=0.2)
    merged, plain = model.merge(), model.unload()
    assert type(merged) is Tied and merged.outer.weight is merged.inner.weight
    assert {n for n, p in merged.named_parameters() if p.requires_grad} == {"inner.weight", "inner.bias"}
    torch.testing.assert_close(plain(x), base(x))
    assert all(p.requires_grad is not (n == "outer.bias") for n, p in base.named_parameters())
    total = TaskVector.between(base, merged)
    assert (total - 0.2 * sum(vectors)).norm() < 1e-12  # type: ignore[operator]


@pytest.mark.parametrize(("optimiser", "rate"), [(torch.optim.SGD, 0.05), (torch.optim.AdamW, 0.05)])
def test_training_moves_the_coefficients_alone(optimiser: type[torch.optim.Optimizer], rate: float) -> None:
    """A target that lies in the span of the vectors is found."""
    base, vectors, x = bank("tied", 7)
    model = Composition(base, vectors, Isotropic())
    target = (0.5 * vectors[0] - 0.25 * vectors[1]).apply_to(base)(x).detach()
    trained = optimiser([model.coefficients], lr=rate)  # type: ignore[call-arg]
    losses = []
    for _ in range(60):
        trained.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        trained.step()
    assert losses[-1] < 0.05 * losses[0]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["coefficients"]
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.module.parameters(), strict=True))


def test_a_head_can_be_trained_beside_the_coefficients() -> None:
    base, vectors, x = bank("mixed", 3)
    model = Composition(base, [vector.select("[!h]*") for vector in vectors])
    head = model.module.head
    assert isinstance(head, nn.Linear)
    head.requires_grad_(True)
    model(x).sum().backward()
    assert head.weight.grad is not None and model.coefficients.grad is not None
    with torch.no_grad():
        head.weight.add_(1.0)
    torch.testing.assert_close(model.merge()(x), model(x))
    assert "head.weight" not in model.labels


def test_vectors_over_different_tensors_and_tensors_that_no_vector_moves() -> None:
    base, vectors, x = bank("mixed", 5)
    parts = [vectors[0].select("conv.*"), vectors[1].select(["head.*", "scale"]), vectors[2] * 0.0]
    model = Composition(base, parts, start=0.7)
    assert model.names == ["scale", "conv.weight", "conv.bias", "head.weight", "head.bias"]
    assert all(block.data.shape[1] == 1 for block in model._blocks())
    model(x).sum().backward()
    assert model.coefficients.grad is not None and not model.coefficients.grad[2].any()
    moved = parts[1].apply_to(parts[0].apply_to(base, 0.7), 0.7)
    torch.testing.assert_close(model(x), moved(x))
    still = Composition(base, [vectors[0] * 0.0])
    torch.testing.assert_close(still(x), base(x))
    assert not still.operator().to_dense().any()


def test_coefficients_come_back_from_a_file(tmp_path: Path) -> None:
    base, vectors, x = bank("mixed", 6)
    model = Composition(base, vectors, Partitions(4, seed=9), dtype=torch.bfloat16)
    with torch.no_grad():
        model.coefficients.copy_(draw(1, *model.coefficients.shape) / 5)
    model.save(tmp_path / "c.safetensors")
    again = Composition(base, vectors, Partitions(4, seed=9), dtype=torch.bfloat16).load_(tmp_path / "c.safetensors")
    assert torch.equal(again(x), model(x))
    for kind, what in ((Partitions(4, seed=8), "kind"), (PerBlock(), "kind"), (Partitions(5, seed=9), "kind")):
        with pytest.raises(ValueError, match=f"has the {what}"):
            Composition(base, vectors, kind).load_(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="has the shape"):
        Composition(base, vectors[:2], Partitions(4, seed=9)).load_(tmp_path / "c.safetensors")
    vectors[0].save(tmp_path / "tau.safetensors")
    with pytest.raises(ValueError, match="holds a 'task vector', expected coefficients of a composition"):
        model.load_(tmp_path / "tau.safetensors")
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def test_the_metric_pulls_back_to_the_coefficients() -> None:
    base, vectors, x = bank("tied", 8)
    model = Composition(base, vectors)
    g, space = metric(base, [x]), WeightSpace.of(base)
    pulled = g.pullback(model.operator(space)).operator.to_dense()
    matrix = columns(model, vectors, space)
    torch.testing.assert_close(pulled, matrix.T @ g.operator.to_dense() @ matrix, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="space: it lacks inner.weight, outer.bias, which the vectors move"):
        model.operator(WeightSpace.of(base, "inner.bias"))


def test_vectors_that_do_not_fit_are_refused() -> None:
    base, vectors, _ = bank("mixed", 1)
    with pytest.raises(ValueError, match="vectors: got none"):
        Composition(base, [])
    wrong = TaskVector({"head.bias": torch.zeros(3), "none": torch.zeros(1), "norm.running_var": torch.zeros(2)})
    with pytest.raises(ValueError) as caught:
        Composition(base, [vectors[0], wrong])
    for part in ("vector 1: head.bias is [3], the network's is [2]", "no parameter none", "no parameter norm.running"):
        assert part in str(caught.value)


@given(seed=seeds, looked=st.integers(0, 40))
@settings(max_examples=10)
def test_rows_without_a_gradient_are_left_out_of_products(seed: int, looked: int) -> None:
    block = Block(draw(seed, 3, 30, 4))
    gradient = torch.zeros(30, 4, dtype=torch.float64)
    places = torch.randint(0, 30, (looked,), generator=torch.Generator().manual_seed(seed))
    gradient[places] = draw(seed + 1, looked, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fipgeo.atlas.blocks.TALL", 30)
        found = block.project_one(gradient)
    torch.testing.assert_close(found, block.project(gradient).flatten(), rtol=1e-12, atol=1e-12)


def test_what_small_sums_look_at_follows_casts() -> None:
    net = nn.Linear(3, 2).float()
    model = Composition(net, [TaskVector({n: torch.ones_like(p) for n, p in net.named_parameters()})]).double()
    for block in model._blocks():
        assert block.rows is not None and block.rows.data_ptr() == block.data.data_ptr()
    copied = copy.deepcopy(model)
    assert all(b.rows is not None and b.rows.data_ptr() == b.data.data_ptr() for b in copied._blocks())


def test_reentrant_checkpoints_are_refused_where_gradients_are_wanted() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=True))  # type: ignore[no-any-return]

    net = Checkpointed()
    model = Composition(net, [TaskVector({n: torch.ones_like(p) for n, p in net.named_parameters()})])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="its forward uses reentrant checkpoints"):
            model(torch.ones(4, 3))
        with torch.no_grad():
            assert model(torch.ones(4, 3)).shape == (4, 2)
