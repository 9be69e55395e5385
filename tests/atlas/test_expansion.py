"""Expansions of networks whose layers do not have the examples on their first axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from fipgeo import Composition, TaskVector
from fipgeo.atlas.expansion import Expander

from ..test_task_vectors import shaken
from .test_composition import draw

seeds = st.integers(0, 2**20)


class Attentive(nn.Module):
    """Torch's own attention, which has the tokens before the examples inside, for inputs `[n, tokens, 6]`."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first = batch_first
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x) if self.first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(found.mean(1))


class Flattened(nn.Module):
    """Layers that get all tokens in one row, those of an example beside one another (major) or not."""

    def __init__(self, major: bool) -> None:
        super().__init__()
        self.major = major
        self.inner, self.norm, self.head = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens = x.shape[:2]
        rows = self.norm(self.inner((x if self.major else x.transpose(0, 1)).reshape(-1, 6)).tanh())
        found = rows.view(n, tokens, 5).mean(1) if self.major else rows.view(tokens, n, 5).mean(0)
        return self.head(found)


class Framed(nn.Module):
    """A convolution over each token, all tokens in the place of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.reshape(-1, 1, 6)).tanh().reshape(len(x), -1, 8).mean(1))


class Leaving(nn.Module):
    """Uses one layer more where there are more than three examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.mean(1)).tanh()
        return self.head(self.second(h).tanh() if len(x) > 3 else h)


NETS = {
    "examples first": lambda: Attentive(True),
    "tokens first": lambda: Attentive(False),
    "flat, examples slow": lambda: Flattened(True),
    "flat, examples fast": lambda: Flattened(False),
}


def derivative(model: Composition, c: Tensor, x: Tensor) -> Tensor:
    """`[n, O, r]`, by one backward pass for each output."""
    leaf = c.clone().requires_grad_()
    f = functional_call(model.module, model.weights(leaf), (x,))
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0].flatten() for one in f.flatten()]
    return torch.stack(rows).view(*f.shape, -1)


@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("name", NETS)
@given(seed=seeds, n=st.integers(1, 5))
@settings(max_examples=3, deadline=None)
def test_layers_carry_the_expansion_wherever_the_examples_are(name: str, tokens: int, seed: int, n: int) -> None:
    base = shaken(NETS[name](), seed).eval()
    model = Composition(base, [TaskVector.between(base, shaken(base, seed + i)) for i in (1, 2)])
    x, c = draw(seed, n, tokens, 6), 0.3 * draw(seed, *model.coefficients.shape)
    expander = Expander(model)
    _, a = expander(c, (x,))
    torch.testing.assert_close(a, derivative(model, c, x), rtol=1e-8, atol=1e-9)
    u = draw(seed + 1, 2, n, 3)
    _, along = expander.along(c, (x,), lambda _, __: u)
    torch.testing.assert_close(along, torch.einsum("mno,nor->nmr", u, a), rtol=1e-8, atol=1e-9)
    assert expander._by_rows == set()


def test_a_network_that_takes_another_way_with_more_examples_goes_by_rows_there() -> None:
    base = shaken(Leaving(), 0).eval()
    model = Composition(base, [TaskVector.between(base, shaken(base, 1))])
    expander = Expander(model)
    for n in (3, 6):
        x, c = draw(n, n, 2, 6), 0.3 * draw(n, *model.coefficients.shape)
        torch.testing.assert_close(expander(c, (x,))[1], derivative(model, c, x), rtol=1e-8, atol=1e-9)


def test_a_convolution_over_tokens_goes_by_rows_and_its_bias_by_the_layer() -> None:
    base = shaken(Framed(), 0).eval()
    model = Composition(base, [TaskVector.between(base, shaken(base, 1))])
    expander, x, c = Expander(model), draw(2, 5, 3, 6), 0.3 * draw(3, 1, 4)
    torch.testing.assert_close(expander(c, (x,))[1], derivative(model, c, x), rtol=1e-8, atol=1e-9)
    assert expander._by_rows == {"conv.weight"}


class Read(nn.Module):
    """A look-up with the tokens first, and a weight that no known function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Parameter(torch.eye(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.tanh(self.mix) @ self.table(x.T).mean(0).T).T)


def test_look_ups_have_their_examples_first_too_beside_what_goes_by_rows() -> None:
    base = shaken(Read(), 0).eval()
    model = Composition(base, [TaskVector.between(base, shaken(base, 1))])
    expander, c = Expander(model), 0.3 * draw(3, 1, 4)
    x = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(expander(c, (x,))[1], derivative(model, c, x), rtol=1e-8, atol=1e-9)
    assert expander._by_rows == {"mix"}
