"""Hidden features: what every map sees, by hand; masks, shared inputs, projections, and nothing of the user's moved."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fipgeo import MetricField
from fipgeo.jacobian.embedded import Mask
from fipgeo.memory import HiddenFeatures

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(
    net: nn.Module, x: Tensor, *, batch_size: int | None = None, mask: Mask = None, **options: int | None
) -> HiddenFeatures:
    return HiddenFeatures(MetricField(net, x, batch_size=batch_size, mask=mask), **options)


def convolutions(seed: int) -> nn.Sequential:
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 5)),
    ).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(draw(seed + k, *p.shape))
    return net


@settings(deadline=None, max_examples=6)
@given(SEEDS, st.integers(1, 4))
def test_features_are_the_inputs_of_the_maps_pooled_and_standardised(seed: int, cells: int) -> None:
    net, x = convolutions(seed), draw(seed + 50, 16, 2, 6, 6)
    features = hidden(net.train(), x, cells=cells, batch_size=5)
    net.eval()
    with torch.no_grad():
        middle = net[:4](x)
        seen = [adaptive_avg_pool2d(t, cells).flatten(1) for t in (x, middle)] + [net[4:7](middle)]
    raw = torch.cat(seen, 1)
    varied = raw.std(0, correction=0) > 1e-6 * (raw.mean(0).abs() + raw.std(0, correction=0).mean())
    wanted = ((raw - raw.mean(0)) / raw.std(0, correction=0))[:, varied]
    torch.testing.assert_close(features(x), wanted, rtol=1e-8, atol=1e-8)
    assert features.num_features == wanted.shape[1]
    torch.testing.assert_close(features(x[:3]), wanted[:3], rtol=1e-8, atol=1e-8)  # of an input, not of its batch


def test_the_grid_is_as_fine_as_the_width_allows() -> None:
    net, x = convolutions(0), draw(1, 8, 2, 6, 6)
    numbers = [2 * k * k + 4 * k * k + 12 for k in (1, 2, 3)]
    for width, cells in ((numbers[2], 3), (numbers[2] - 1, 2), (numbers[0], 1), (None, 3)):
        assert hidden(net, x, width=width).cells == cells
    narrow = hidden(net, x, width=7)
    assert narrow.cells == 1 and narrow.num_features == 7
    assert narrow(x).shape == (8, 7) and bool((narrow(x) >= 0).all())
    assert torch.equal(narrow(x), hidden(net, x, width=7)(x))
    assert not torch.equal(narrow(x), hidden(net, x, width=7, generator=1)(x))
    small = draw(2, 8, 2, 4, 4)  # the second convolution sees an image of four by four, of which no more can be had
    net = nn.Sequential(*list(net)[:5], nn.Flatten(), nn.Linear(3, 2).double())
    assert hidden(net, small, cells=9).num_features <= 2 * 16 + 4 * 16 + 3


def test_projections_are_rectified_and_of_unit_size() -> None:
    net, x = convolutions(0), draw(1, 8, 2, 6, 6)
    wide, narrow = hidden(net, x, cells=2, width=None), hidden(net, x, cells=2, width=20)
    matrix, shift = narrow.projection, narrow.shift
    assert matrix is not None and shift is not None and matrix.shape == (wide.num_features, 20)
    torch.testing.assert_close(narrow(x), (wide(x) @ matrix + shift).relu())
    assert float(matrix.square().sum(0).mean()) == pytest.approx(1, rel=0.2)
    assert float(shift.square().mean()) == pytest.approx(0.25, rel=0.6)


class Attention(nn.Module):
    """Tokens with padding: torch's own attention, then queries, keys and values of our own from one input."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.table, self.attention = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=not first)
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x, empty = self.table(ids), ids == 0
        x = x.transpose(0, 1) if self.first else x
        x = self.attention(x, x, x, key_padding_mask=empty, need_weights=False)[0]
        x = x.transpose(0, 1) if self.first else x
        scores = (self.q(x) @ self.k(x).mT).masked_fill(empty[:, None], -torch.inf)
        x = scores.softmax(-1) @ self.v(x)
        return self.head((x * ~empty[..., None]).sum(1) / (~empty).sum(1, keepdim=True))


@pytest.mark.parametrize("first", [False, True])
def test_padding_says_nothing_and_shared_inputs_count_once(first: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Attention(first).double()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 9, (6, 5), generator=random)
    ids[2, 3:], ids[4, 2:] = 0, 0
    features = hidden(net, ids, mask=lambda batch: batch != 0)
    assert features.num_features == 16  # attention's input, its output projection's, one for q, k and v, the head's
    assert torch.equal(features((ids, torch.zeros(6))), features(ids))  # labels beside the inputs are not looked at
    longer = torch.cat([ids, torch.zeros(6, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(features(longer), features(ids))
    with torch.no_grad():
        token = net.table(ids)
        mean = (token * (ids != 0)[..., None]).sum(1) / (ids != 0).sum(1, keepdim=True)
    torch.testing.assert_close(features(ids)[:, :4], (mean - mean.mean(0)) / mean.std(0, correction=0))


def test_nothing_of_the_users_is_changed() -> None:
    net, x = convolutions(3).train(), draw(4, 8, 2, 6, 6)
    before, given = copy.deepcopy(net.state_dict()), x.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    features = hidden(net, x)
    h = features(x)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, given) and net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and not h.requires_grad
    with torch.no_grad():
        next(net.parameters()).zero_()  # the features are of the network as it was
    assert torch.equal(features(x), h)


class Forking(nn.Module):
    """Another way for a batch with a negative mean."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.mean() > 0 else self.two(self.one(x))


def test_bad_arguments_are_named() -> None:
    net, x = nn.Linear(3, 2), torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    for cells, width in ((0, 5), (5, 0), (-1, None)):
        with pytest.raises(ValueError, match="cells, width: got"):
            hidden(net, x, cells=cells, width=width)
    with pytest.raises(ValueError, match="nothing that the network computes differs"):
        hidden(net, torch.ones(6, 3))
    with pytest.raises(ValueError, match="no linear map sees the inputs"):
        hidden(nn.LayerNorm(3), x)
    features = hidden(Forking(), x)
    with pytest.raises(ValueError, match="went through 2 linear maps, those that features were made of through 1"):
        features(-x)


def test_a_field_says_how_the_model_is_called_and_in_which_dtype() -> None:
    net, x = convolutions(0), draw(1, 8, 2, 6, 6)
    batches = [{"images": part} for part in x.split(4)]
    features = HiddenFeatures(MetricField(net, batches, forward_fn=lambda model, batch: model(2 * batch["images"])))
    torch.testing.assert_close(features({"images": x}), hidden(net, 2 * x)(2 * x))
    wide = HiddenFeatures(MetricField(copy.deepcopy(net).float(), x.float(), dtype=torch.float64))
    assert wide(x.float()).dtype == torch.float64
    moved = hidden(net, x).float()
    torch.testing.assert_close(moved(x.float()), hidden(net, x)(x).float(), rtol=1e-3, atol=1e-3)
