"""The block diagonal of the metric against the dense metric of networks where both are the same up to a scale."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fipgeo.paths import Compensation, Position
from fipgeo.paths.precondition import LayerPreconditioner

from .toys import draw, filled, inputs, jacobian_by_backward, kept_of, mlp

SEEDS = st.integers(0, 10**6)


@given(SEEDS)
@settings(max_examples=4)
def test_of_a_linear_layer_it_is_the_metric_row_by_row(seed: int) -> None:
    model, x = filled(nn.Linear(5, 3, bias=False), seed), inputs(seed + 1, 20)
    kept = kept_of(model, x, "euclidean")
    free = draw(seed + 2, 15) > -0.3
    source = torch.Generator().manual_seed(seed)
    inverse = LayerPreconditioner(kept, Position(kept.start), free, source, damping=1e-12)
    gram = x.T @ x / 20
    for row in range(3):
        own = torch.zeros(15, dtype=torch.bool)
        own[5 * row : 5 * row + 5] = True
        own &= free
        if not bool(own.any()):
            continue
        found = inverse(torch.eye(15))[own][:, own]
        product = found @ torch.kron(torch.eye(3), gram)[own][:, own]
        scale = float(product[0, 0])
        torch.testing.assert_close(product, scale * torch.eye(len(product)), rtol=0, atol=1e-6 * scale)
        assert 0.1 < scale < 10


@given(SEEDS, st.booleans())
@settings(max_examples=4)
def test_it_is_symmetric_positive_definite_on_the_free_weights_and_zero_elsewhere(seed: int, norm: bool) -> None:
    kept = kept_of(mlp(seed, norm=norm), inputs(seed + 1, 20))
    free = draw(seed + 2, len(kept.start)) > 0
    free[0] = True
    source = torch.Generator().manual_seed(seed)
    position = Position(kept.start, kept.function.map.normalisation())
    dense = LayerPreconditioner(kept, position, free, source)(torch.eye(len(free)))
    torch.testing.assert_close(dense, dense.T)
    assert not dense[~free].any()
    assert float(torch.linalg.eigvalsh(dense[free][:, free])[0]) > 0


@given(SEEDS)
@settings(max_examples=4)
def test_conjugate_gradients_find_the_same_move_with_it(seed: int) -> None:
    model, x = mlp(seed), inputs(seed + 1, 12)
    kept = kept_of(model, x)
    position, root = Position(kept.start), jacobian_by_backward(model, x)
    free, r = draw(seed + 2, root.shape[1]) > 0, root @ draw(seed + 3, root.shape[1])
    inverse = LayerPreconditioner(kept, position, free, torch.Generator().manual_seed(seed))
    moves = Compensation(kept, position, free, damping=0.1, max_bytes=0, max_iters=200, preconditioner=inverse)
    w = moves(r)
    gradient = (root.T @ (r + root @ w) / 12 + moves.mu * w)[free]
    assert float(gradient.norm()) < 2e-3 * float((root.T @ r / 12)[free].norm())
    assert not w[~free].any()
