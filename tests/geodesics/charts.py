"""Modules whose output maps are charts of known surfaces: the weights are coordinates, inputs do not matter."""

import torch
from torch import Tensor, nn

from fipgeo import MetricField

ONE = torch.zeros(1, 1, dtype=torch.float64)


class Surface(nn.Module):
    """Two weights as coordinates of a surface."""

    def __init__(self, *coordinates: float) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.tensor(coordinates))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.q).expand(len(x), -1)

    def embed(self, q: Tensor) -> Tensor:
        raise NotImplementedError


class Polar(Surface):
    """The plane in polar coordinates: its geodesics are straight lines."""

    def embed(self, q: Tensor) -> Tensor:
        return q[0] * torch.stack([q[1].cos(), q[1].sin()])


class Sphere(Surface):
    """The unit sphere by colatitude and longitude: its geodesics are great circles."""

    def embed(self, q: Tensor) -> Tensor:
        return torch.stack([q[0].sin() * q[1].cos(), q[0].sin() * q[1].sin(), q[0].cos()])


class Product(Surface):
    """One output, the product of two weights: fewer outputs than weights."""

    def embed(self, q: Tensor) -> Tensor:
        return q.prod()[None]


def field_of(module: nn.Module, inputs: Tensor = ONE, geometry: str = "euclidean") -> MetricField:
    return MetricField(module, inputs, geometry)


def image(module: Surface, points: Tensor) -> Tensor:
    return torch.stack([module.embed(q) for q in points])


def pushed(module: Surface, q: Tensor, v: Tensor) -> Tensor:
    """The image of a tangent, by reverse mode."""
    jacobian: Tensor = torch.autograd.functional.jacobian(module.embed, q)  # type: ignore[assignment]
    return jacobian @ v


def mlp(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net, torch.randn(5, 3, generator=generator)
