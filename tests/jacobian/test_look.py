"""One look at a model: how often it is evaluated, and what is found out by how little."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fipgeo import Metric, metric
from fipgeo.model import NotFiniteError


class Counted(nn.Module):
    """A layer with something after it that counts its evaluations."""

    def __init__(self, after: Any = torch.tanh) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(3, 2).double(), after
        self.counts: list[int] = []  # survives, as the list itself is not replaced

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append(len(x))
        return self.after(self.layer(x))

    def taken(self) -> list[int]:
        found = list(self.counts)
        self.counts.clear()
        return found


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of(module: nn.Module, count: int) -> Metric:
    return metric(module, draw(count, 3), geometry="euclidean")


@pytest.mark.parametrize(("examples", "looked"), [(5, [2, 5]), (2, [2, 2]), (1, [1, 1])])
def test_a_model_is_evaluated_twice_before_the_first_product_and_once_by_it(examples: int, looked: list[int]) -> None:
    module = Counted()
    g = of(module, examples)
    assert module.taken() == looked
    g.matvec(draw(8))
    assert module.taken() == [examples]
    expected = torch.func.jacrev(lambda w: torch.func.functional_call(module, w, draw(examples, 3)).flatten())(
        dict(module.named_parameters())
    )
    rows = torch.cat([expected[name].flatten(1) for name, _ in module.named_parameters()], 1)
    for _ in range(2):
        assert torch.allclose(g.matvec(draw(8)), rows.T @ (rows @ draw(8)) / examples, rtol=1e-10)


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_noise_is_found_though_every_evaluation_starts_from_the_same_stream(examples: int) -> None:
    for after in (lambda f: F.dropout(f.repeat(1, 64), 0.5), lambda f: f + torch.rand(())):
        with pytest.raises(ValueError, match="model: its forward is random"):
            of(Counted(after), examples)


def test_outputs_that_depend_on_their_batch_are_not_called_random() -> None:
    module = Counted(lambda f: f - f.mean(0))
    g = of(module, 5)
    assert module.taken() == [2, 5, 2, 2]
    assert float(g.norm(torch.ones(8, dtype=torch.float64))) > 0


def test_a_derivative_that_is_not_finite_is_named_by_the_first_product_of_tiny_data() -> None:
    module = Counted(lambda f: (f - f.detach()).abs().sqrt())
    with pytest.raises(NotFiniteError, match=r"their derivative is not \(first in layer.weight\)"):
        of(module, 5)
    g = of(module, 2)
    with pytest.raises(NotFiniteError, match=r"their derivative is not \(first in layer.weight\)"):
        g.matvec(draw(8))


def test_a_vector_that_is_not_finite_is_not_the_models_fault() -> None:
    g = of(Counted(), 2)
    assert not bool(torch.isfinite(g.matvec(torch.full((8,), torch.inf, dtype=torch.float64))).all())
    assert bool(torch.isfinite(g.matvec(draw(8))).all())
