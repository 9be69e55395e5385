"""How far tangent models of real networks are from their dense linearisation.

The dense way is reverse mode on the plain network: one gradient for every output of every input is a row of J, and its
inner product with tau is what the tangent model computes forward. Everything is float64, all weights carry a tangent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fipgeo
from benchmarks.pretrained import _network
from benchmarks.texts import End, encoder, packed


class Recurrent(nn.Module):
    """A two-layer LSTM of width 64 on tokens, and a linear head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, 4]` of tokens `[n, T]`."""
        return self.head(self.lstm(self.tokens(x))[0][:, -1])


def images(name: str) -> tuple[nn.Module, Tensor]:
    """A pretrained network and two inputs of its shape."""
    return _network(name)[0], torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def texts() -> tuple[nn.Module, Tensor]:
    """All layers of the encoder with a head of two classes, and two sentences behind the embedding."""
    one = encoder()
    sentences = ["a network that keeps what it knows", "the other one forgets"]
    return End(one, len(one.model.encoder.layer), nn.Linear(one.model.config.hidden_size, 2)), packed(one, sentences, 0)


def tokens() -> tuple[nn.Module, Tensor]:
    """The LSTM, which is not trained, and two texts of 20 tokens."""
    return Recurrent(), torch.randint(1000, (2, 20), generator=torch.Generator().manual_seed(0))


LINEARISED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "akamaster_cifar10_resnet20": lambda: images("akamaster_cifar10_resnet20"),
    "smmk47_cifar10_vit": lambda: images("smmk47_cifar10_vit"),
    "minilm": texts,
    "lstm": tokens,
}


def difference(name: str) -> float:
    """Largest |tangent model - dense linearisation| over the largest |J tau|, for a random tau as long as 1 % of theta.

    Raises:
        Unavailable: The network is not there.
    """
    torch.manual_seed(0)
    net, x = LINEARISED[name]()
    net = net.double().eval()
    x = x.double() if x.is_floating_point() else x
    model, params = fipgeo.TangentModel(net), dict(net.named_parameters())
    generator, tau = torch.Generator().manual_seed(1), {}
    for key, t in model.tangents().items():
        drawn = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        tau[key] = 1e-2 * params[key].detach().norm() * drawn / drawn.norm()
    model.assign_(tau)
    with torch.no_grad():
        found = model(x)
    outputs = net(x)
    rows = [torch.autograd.grad(f, [params[key] for key in tau], retain_graph=True) for f in outputs.flatten()]
    products = [sum(float((g * t).sum()) for g, t in zip(row, tau.values(), strict=True)) for row in rows]
    moved = torch.tensor(products, dtype=torch.float64)
    wanted = outputs.detach() + moved.view_as(outputs)
    return float((found - wanted).abs().max() / moved.abs().max())
