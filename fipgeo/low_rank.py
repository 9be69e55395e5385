"""A network whose weights move in few directions: theta_0 and a product of two narrow matrices on each.

Axis letters: r the rank; a weight `[m, ...]` counts as a matrix `[m, p]`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from fipgeo.data import Generator
from fipgeo.jacobian.factored.capture import COMPOSITE, opened
from fipgeo.lazy import Factors, gathered
from fipgeo.linalg import as_generator
from fipgeo.model import unwrapped
from fipgeo.space import WeightSpace, Where
from fipgeo.task_vectors import TaskVector

MAPS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
GETTERS: Any = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad)
FACTS = {getter.__get__ for getter in GETTERS} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
}
"""What a weight can be asked that does not depend on its values."""


class LowRank(nn.Module):
    """A network at W_0 + scale B A, with B `[m, r]` and A `[r, p]` as its coordinates on every chosen weight W.

    A module like any other: `metric`, `adapt` and, over the parameters that require a gradient, `fipgeo.optim.FIP` and
    torch's optimisers see r (m + p) numbers in place of m p, and `merge()` gives a network of the plain kind, its moves
    rounded to its dtype. B starts at zero, so that outputs are
    those of the network, and A at N(0, 1 / p). The network is copied; weights that are tied stay tied.

    `F.linear` and convolutions without groups are computed as W_0 x + scale B (A x), so that no gradient has the size
    of W. Where a weight is used in another way (transposed or grouped convolutions, products written by hand,
    look-ups), the sum is formed. Code in which torch turns gradients off and takes them by itself (checkpoints, an
    `autograd.Function`) is refused when it meets such a weight, and so are parts that are compiled or scripted. The
    metric on the factors is that of the weights pulled back by the Jacobian of the product, which is not constant: it
    is zero along A at the start.

    Args:
        module: The network at theta_0; it stays as it is.
        rank: r, at most; a weight has min(m, p) at most.
        where: Which weights get factors (see `WeightSpace.of`): they need two axes or more. None for those of all
            torch's linear maps, convolutions and attention; other layers' need to be named.
        whole: Which parameters are trained as they are beside them, such as "head.*" (a head that is to grow needs it);
            None for none.
        scale: Of the products; not part of the state dict.
        generator: Source of A; None for a fixed seed.

    Attributes:
        module: The copy, whose weights are theta_0.
        names: Weights with factors.

    Raises:
        ValueError: Nothing is chosen, a chosen weight is a vector, one is both in factors and whole, the rank is below
            1, the scale is zero or not finite, or a part of the module is compiled or scripted.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(4, 8)
        >>> slim = LowRank(net, 1, "0.weight", whole="2.*")
        >>> {name: list(p.shape) for name, p in slim.named_parameters() if p.requires_grad}
        {'module.2.weight': [2, 8], 'module.2.bias': [2], 'left.0': [8, 1], 'right.0': [1, 8]}
        >>> bool((slim(x) == net(x)).all()), type(slim.merge()).__name__
        (True, 'Sequential')
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int = 8,
        where: Where = None,
        *,
        whole: Where = None,
        scale: float = 1.0,
        generator: Generator = None,
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1 or not math.isfinite(scale) or not scale:
            raise ValueError(f"rank, scale: got {rank} and {scale}, expected an integer from 1 up and no zero or NaN")
        self.module, self.scale = copy.deepcopy(unwrapped(module)), scale
        for name, part in self.module.named_modules():
            if isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_orig_mod"):
                raise ValueError(
                    f"module: {name!r} is compiled or scripted, so that its weights cannot be followed; pass the plain"
                    " network, and compile the result: torch.compile(LowRank(network))"
                )
        self.training = self.module.training
        self._trainable = {n for n, p in self.module.named_parameters() if p.requires_grad}
        named, kept = dict(self.module.named_parameters()), set[str]()
        self.names = WeightSpace.of(self.module, _maps(self.module) if where is None else where).names
        if whole is not None:
            kept = set(WeightSpace.of(self.module, whole).names)
            if where is None:
                self.names = [name for name in self.names if name not in kept]
        if not self.names:
            raise ValueError("where: all weights of linear maps are trained whole; choose fewer by whole=")
        for name in self.names:
            if named[name].dim() < 2 or name in kept:
                why = "is both in factors and whole" if name in kept else f"has shape {list(named[name].shape)}"
                raise ValueError(
                    f"where: {name!r} {why}, expected weights of two axes or more that are not trained whole; give"
                    " others to whole="
                )
        for name, p in named.items():
            p.requires_grad_(name in kept)
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        random = as_generator(generator)
        for weight in (named[name] for name in self.names):
            m, p = weight.flatten(1).shape
            drawn = (
                torch.randn(min(rank, m, p), p, generator=random, device=random.device, dtype=torch.float64) * p**-0.5
            )
            self.left.append(nn.Parameter(weight.new_zeros(m, len(drawn), *[1] * (weight.dim() - 2))))
            self.right.append(nn.Parameter(drawn.to(weight).view(-1, *weight.shape[1:])))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output at the weights with their factors."""
        named = dict(self.module.named_parameters())
        parts = list(zip(self.names, self.left, self.right, strict=True))
        for name, b, _ in parts:
            if len(b) != len(named[name]):
                raise ValueError(
                    f"module: {name!r} has {len(named[name])} rows and its factors {len(b)}; a head that is to grow is"
                    " trained whole: LowRank(..., whole=...)"
                )
        with _Along({id(named[name]): (b, a) for name, b, a in parts}, self.scale):
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A network of the plain kind with the products added; its parameters require gradients as they once did."""
        merged, moves = copy.deepcopy(self.module), self._products()
        for name, p in merged.named_parameters():
            p.requires_grad_(name in self._trainable)
            if name in moves:
                p += moves[name].dense()
        return merged

    def vector(self) -> TaskVector:
        """The products as a task vector of factors; what was trained whole is not in it."""
        return TaskVector(gathered(self._products()))

    def _products(self) -> dict[str, Factors]:
        """Scale B A by name, detached."""
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        parts = zip(self.names, self.left, self.right, strict=True)
        found = {n: (self.scale * b.detach().flatten(1), a.detach().flatten(1).clone()) for n, b, a in parts}
        return {name: Factors(*pair, shapes[name]) for name, pair in found.items()}


class _Along(TorchFunctionMode):
    """While it is entered, some weights count as themselves and a product.

    Args:
        pairs: Left `[m, r, 1, ...]` and right `[r, ...]` by the `id` of a weight `[m, ...]`.
        scale: Of the products.
    """

    def __init__(self, pairs: Mapping[int, tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.pairs, self.scale, self.graded = pairs, scale, torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One function, with the products added to what it makes of the weights, or to the weights."""
        del types
        kwargs = kwargs or {}
        if func in FACTS or not any(id(a) in self.pairs for a in tree_flatten((args, kwargs))[0]):
            return func(*args, **kwargs)
        if self.graded and not torch.is_grad_enabled():
            raise NotImplementedError(
                "a weight with factors is used where gradients are off inside the network (a checkpoint, an"
                " autograd.Function, no_grad), so that its factors would get none; leave it out by where=, or"
                " checkpoint the whole network"
            )
        if func in COMPOSITE:
            with self:
                return opened(func)(*args, **kwargs)
        if func is F.linear or func in CONVOLUTIONS:
            out = self._apart(func, **(dict(zip(ORDER, args, strict=False)) | kwargs))
            if out is not None:
                return out
        args, kwargs = tree_map(self._whole, (args, kwargs))
        return func(*args, **kwargs)

    def _apart(self, func: Any, input: Any, weight: Any, bias: Any = None, groups: int = 1, **where: Any) -> Any:
        """W_0 x + scale B (A x); None where the weight is no factor of the map, or groups have maps of their own."""
        if groups != 1 or id(weight) not in self.pairs or any(id(other) in self.pairs for other in (input, bias)):
            return None
        left, right = self.pairs[id(weight)]
        return func(input, weight, bias, **where) + func(self.scale * func(input, right, **where), left)

    def _whole(self, value: Any) -> Any:
        """A weight with its product."""
        if id(value) not in self.pairs:
            return value
        left, right = self.pairs[id(value)]
        return value + self.scale * (left.flatten(1) @ right.flatten(1)).view_as(value)


def _maps(module: nn.Module) -> list[str]:
    """Weights of linear maps that require a gradient, under the names that they have first."""
    layers = (m.named_parameters(recurse=False) for m in module.modules() if isinstance(m, MAPS))
    held = {id(p) for layer in layers for key, p in layer if key.endswith("weight")}
    found = [name for name, p in module.named_parameters() if id(p) in held and p.requires_grad]
    if not found:
        raise ValueError("where: no linear map, convolution or attention has a weight that requires a gradient")
    return found
