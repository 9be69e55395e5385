"""Outputs to first order in the coefficients: f(c + d) = f + A d, example by example.

Axis letters: n examples, O outputs of an example, r coefficients, v vectors of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fipgeo.atlas.blocks import Block
from fipgeo.atlas.composition import Composition
from fipgeo.data import TensorBatches, as_batches
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.jacobian.factored.capture import Recorder, Site, Term
from fipgeo.jacobian.factored.plan import slow_index
from fipgeo.jacobian.rows import RowMaker, as_tree
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Euclidean
from fipgeo.tangent.push import Expansion
from fipgeo.trees import head, output_tensors, tensor_leaves

log = logging.getLogger(__name__)

TOGETHER = 16
"""Outputs whose derivatives are held at once."""
BYTES = 2**28
"""Memory for them, about."""
TRAILS = {"embedding": 0}
"""Last axes of an activation that belong to one position, where they are not as many as those of a site's output."""


class Expander:
    """Makes expansions of a composed network.

    The outputs are differentiated by what the layers put out, one backward pass for each output of an example, which
    needs no derivative by weights. Every vector then goes through the layers once, as in a forward pass, and is
    compared with those derivatives: A takes n forward-like products however many tensors there are. Tensors that no
    known function uses, and those that are divided into parts, go by the rows of the Jacobian instead, which are
    compared with the vectors and forgotten.

    Args:
        model: The composition; evaluated in eval mode.
        forward_fn: (network, batch) -> raw outputs.
        output_fn: Raw outputs -> the one tensor that the loss gets.

    Attributes:
        passes: What was spent, in examples: a forward pass, a backward pass by activations, one by weights, and a
            vector's way through the layers count a third each, so that one forward and full backward pass of an example
            is 1. What does not grow with the examples, such as composing weights, is not counted, nor are the inner
            products of layers' outputs.
    """

    def __init__(
        self, model: Composition, forward_fn: ForwardFn | None = None, output_fn: OutputFn | None = None
    ) -> None:
        self.model, self.passes = model, 0.0
        names = frozenset(model.names)
        self.map = OutputMap(model.module, lambda n, _: n in names, forward_fn=forward_fn, output_fn=output_fn)
        self._linear = Expansion(self.map)
        self._by_rows: set[str] | None = None  # known after the first batch
        self._copies: frozenset[int] = frozenset()
        self._majors: list[bool] = []  # of sites that go by layers: whether examples are the slow index there
        self._step = 0

    def outputs(self, c: Tensor, batch: Any) -> Tensor:
        """Outputs `[n, ..., C]` at coefficients c."""
        if self.model.linear:
            with torch.no_grad():
                found = _one(output_tensors(self._linear(self.model.displacements(c), batch)))
        else:
            with self.map.frozen():
                found = _one(self.map.call(self.model.weights(c), batch))
        self.passes += len(found) / 3
        return found

    def pull(self, weights: Mapping[str, Tensor], batch: Any, value: Callable[[Tensor], Tensor]) -> float:
        """A scalar function of the outputs at composed weights; its gradient is added to theirs, which are leaves."""
        with self.map.frozen(), torch.enable_grad():
            outputs = _one(self.map.call(weights, batch))
            found = value(outputs)
            found.backward()
        self.passes += len(outputs)
        return float(found.detach())

    def __call__(self, c: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs `[n, ..., C]` and their derivative `[n, O, r]` by the coefficients."""
        at = torch.zeros_like(c) if self.model.linear else c
        outputs, derivative = self.along(at, batch, None)
        if self.model.linear:
            outputs = outputs + (derivative @ c.flatten()).view_as(outputs).to(outputs.dtype)
        return outputs, derivative

    def along(self, c: Tensor, batch: Any, directions: Callable[[Tensor, Any], Tensor] | None) -> tuple[Tensor, Tensor]:
        """Outputs `[n, ..., C]` and the derivative `[n, m, r]` of their inner products with m directions.

        Args:
            c: Coefficients.
            batch: Inputs.
            directions: (outputs, batch) of a part of the batch -> `[m, n, ..., C]`; None for every single output. What
                m is counts in the passes, not C, unless a tensor goes by rows.
        """
        with self.map.frozen():
            weights = {name: t.detach() for name, t in self.model.weights(c).items()}
            if self._by_rows is None:
                self._look(weights, c, batch)
            pieces = [self._piece(weights, part, directions) for part in self._pieces(batch)]
        outputs, derivative = torch.cat([f for f, _ in pieces]), torch.cat([a for _, a in pieces])
        backward = derivative.shape[1] + (2 * outputs[0].numel() if self._by_rows else 0)
        self.passes += len(outputs) * (1 + backward + len(self.model.coefficients)) / 3
        return outputs, derivative

    def _pieces(self, batch: Any) -> Iterator[Any]:
        """A batch in parts whose derivatives fit."""
        try:
            tree = as_tree(batch)
            yield from TensorBatches(tree, self._step) if self._step else [batch]
        except (TypeError, ValueError):
            yield batch

    def _look(self, weights: dict[str, Tensor], c: Tensor, batch: Any) -> None:
        """Find out on a few examples which tensors go by the layers, and check that against plain autograd."""
        divided = {n for n, block in zip(self.model.names, self.model._blocks(), strict=True) if block.size[1] > 1}
        few, probes = head(batch, 3), list[Tensor]()
        n = len(tensor_leaves(few)[0])
        with torch.enable_grad(), Recorder({id(t): name for name, t in weights.items()}, n, probes) as seen:
            f = _one(self.map.call(weights, few))
        self._copies = seen.overwritten()
        size = sum(site.numel for site in seen.sites) // n * f.element_size() * min(TOGETHER, f[0].numel())
        self._step = max(1, BYTES // max(1, size))
        first, last = ([] if not probes else _pull(f, _of_example(f, place), probes) for place in (0, n - 1))
        majors = [slow_index(site, one, other, n) for site, one, other in zip(seen.sites, first, last, strict=True)]
        found, odd = {t.name for site in seen.sites for t in site.terms}, set()
        for site, major in zip(seen.sites, majors, strict=True):
            odd |= {t.name for t in site.terms if major is None or (t.kind == "conv" and site.shape[0] != n)}
        self._by_rows = divided | seen.outside | odd | (set(weights) - found)
        apart = [{t.name for t in site.terms} <= self._by_rows for site in seen.sites]
        self._majors = [bool(major) for major, rows in zip(majors, apart, strict=True) if not rows]
        try:
            gap = self._gap(weights, c, few)
        except RuntimeError as error:
            log.info("the derivative by layers fails: %s", error)
            gap = float("inf")
        if not gap < 1e-3:
            log.info("all tensors go by rows: the derivative by layers is off by %.1e", gap)
            self._by_rows, self._majors = set(weights), []

    def _gap(self, weights: dict[str, Tensor], c: Tensor, batch: Any) -> float:
        """How far u^T A is from autograd's, relative, for one u."""
        leaf = c.detach().clone().requires_grad_()
        with torch.enable_grad():
            f = _one(self.map.call(self.model.weights(leaf), batch))
        u = torch.linspace(-1.0, 1.3, f.numel(), dtype=f.dtype, device=f.device).cos()
        (expected,) = torch.autograd.grad(f, leaf, u.view_as(f))
        _, a = self._piece(weights, batch, None)
        return float((u.to(a) @ a.flatten(0, 1) - expected.flatten()).norm() / (expected.norm() + 1e-30))

    def _piece(
        self, weights: dict[str, Tensor], batch: Any, directions: Callable[[Tensor, Any], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs and derivative of a few examples."""
        assert self._by_rows is not None
        f, chosen, found = self._by_layers(weights, batch, directions)
        names = set(weights) if found is None else self._by_rows
        n, width, parts = len(f), f[0].numel(), found or {}
        if names:
            rows = self._rows(weights, batch, n, width, names)
            if chosen is not None:
                along = chosen.flatten(2).transpose(0, 1).to(self.model.coefficients.dtype)  # [n, m, O]
                rows = {name: torch.einsum("nmo,novk->nmvk", along, block) for name, block in rows.items()}
            parts |= rows
        width = width if chosen is None else len(chosen)
        blocks = zip(self.model.names, self.model._blocks(), strict=True)
        empty = {name: f.new_zeros(n, width, *b.size) for name, b in blocks if name not in parts}
        each = [(parts | empty)[name] for name in self.model.names]
        flat = torch.cat([torch.cat([each[i] for i in group], 3).flatten(2) for group in self.model._groups], 2)
        out = flat.new_zeros(n, width, self.model.coefficients.numel(), dtype=self.model.coefficients.dtype)
        return f, out.index_add_(2, self.model._index, flat.to(out.dtype))

    def _by_layers(
        self, weights: dict[str, Tensor], batch: Any, directions: Callable[[Tensor, Any], Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor] | None]:
        """Outputs, directions, and derivatives `[n, m, v, 1]` by the coefficients of blocks whose layers are known.

        None for the derivatives where the network takes another way with these examples than with those looked at.
        """
        assert self._by_rows is not None
        known = {id(t): name for name, t in weights.items() if name not in self._by_rows}
        blocks = dict(zip(self.model.names, self.model._blocks(), strict=True))
        probes: list[Tensor] = []
        n = len(tensor_leaves(batch)[0])
        with torch.enable_grad(), Recorder(known, n, probes, self._copies) as seen:
            f = _one(self.map.call(weights, batch))
        chosen = None if directions is None else directions(f.detach(), batch)
        width, parts = f[0].numel() if chosen is None else len(chosen), {}
        if len(seen.sites) != len(self._majors):
            return f.detach(), chosen, None
        if not probes:
            return f.detach(), chosen, {}
        for start in range(0, width, TOGETHER):
            places = range(start, min(start + TOGETHER, width))
            pulled = [_pull(f, _unit(f, i) if chosen is None else chosen[i], probes) for i in places]
            for number, (site, major) in enumerate(zip(seen.sites, self._majors, strict=True)):
                delta = torch.stack(
                    [_arranged(site, row[number], n, major) for row in pulled], 1
                )  # [n, m, ..., *trail]
                for term in site.terms:
                    x = None if term.source < 0 else seen.inputs[term.source].detach()
                    x = x if x is None else _arranged(site, x, n, major, TRAILS.get(term.kind))
                    out = parts.setdefault(term.name, f.new_zeros(n, width, *blocks[term.name].size))
                    with torch.no_grad():
                        out[:, places.start : places.stop, :, 0] += _met(site, term, x, delta, blocks[term.name])
        return f.detach(), chosen, parts

    def _rows(self, weights: dict[str, Tensor], batch: Any, n: int, width: int, names: set[str]) -> dict[str, Tensor]:
        """Derivatives `[n, O, v, K]` by the coefficients of some blocks, tensor by tensor."""
        function, out = EmbeddedOutputs(self.map, Euclidean(), as_batches([batch])), {}
        for name, block in zip(self.model.names, self.model._blocks(), strict=True):
            if name in names:
                rows = RowMaker(function, weights, [name]).blocks(batch, n, n * width)
                found = [block.project(r.reshape(-1, *block.shape).to(self.model.coefficients.dtype)) for r in rows]
                out[name] = torch.cat(found).unflatten(0, (n, width))
        return out


def _one(outputs: tuple[Tensor, ...]) -> Tensor:
    if len(outputs) != 1 or outputs[0].dim() < 2:
        shapes = ", ".join(str(list(f.shape)) for f in outputs)
        raise ValueError(
            f"model: returned tensors of shapes {shapes}, expected one [n, ..., C]; pick it with output_fn"
        )
    return outputs[0]


def _of_example(f: Tensor, place: int) -> Tensor:
    """A direction in which one example's outputs count."""
    u = torch.zeros_like(f)
    u[place] = torch.linspace(-1.0, 1.3, f[0].numel(), dtype=f.dtype, device=f.device).cos().view_as(f[0])
    return u


def _arranged(site: Site, t: Tensor, n: int, major: bool, trail: int | None = None) -> Tensor:
    """What belongs to a site, with the n examples on the first axis."""
    return t if major and len(t) == n else site.arranged(t, n, major=major, trail=trail)


def _unit(f: Tensor, place: int) -> Tensor:
    """The direction of one output of every example."""
    u = torch.zeros_like(f)
    u.view(len(f), -1)[:, place] = 1.0
    return u


def _pull(f: Tensor, u: Tensor, probes: list[Tensor]) -> list[Tensor]:
    """Derivatives of the outputs' inner product with a direction."""
    found = torch.autograd.grad(f, probes, u, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, probes, strict=True)]


def _met(site: Site, term: Term, x: Tensor | None, delta: Tensor, block: Block) -> Tensor:
    """Inner products `[n, O, v]` of the output derivatives with what each vector makes of a site's input.

    Args:
        site: Where the tensor is used.
        term: How.
        x: The input `[n, ...]`.
        delta: Derivatives of the outputs by the site's output, `[n, O, *out]`.
        block: The tensor's vectors.
    """
    n, outputs = delta.shape[:2]
    if term.kind in ("scale", "shift"):
        weighted = delta if x is None else delta * x.unsqueeze(1)
        weighted = weighted.reshape(n, outputs, -1, *site.trailing).sum(2)
        rows = weighted.sum_to_size(n, outputs, *term.aligned)
        return block.project(
            rows.reshape(n, outputs, *block.shape).to(torch.promote_types(rows.dtype, torch.float32))
        ).flatten(2)
    assert x is not None
    vectors = block.data[0].view(-1, *block.shape)
    moved = _moved(site, term, x, vectors if term.kind == "embedding" else vectors.to(x.dtype))
    return delta.reshape(n, outputs, -1) @ moved.reshape(n, len(vectors), -1).mT


def _moved(site: Site, term: Term, x: Tensor, vectors: Tensor) -> Tensor:
    """What each vector `[v, *shape]` makes of an input in the place of the weight, `[n, v, *out]`."""
    n, v = len(x), len(vectors)
    if term.kind == "linear":
        rows = vectors.mT if term.options.get("transposed") else vectors
        return F.linear(x, rows.flatten(0, 1)).reshape(n, -1, v, rows.shape[1]).transpose(1, 2)
    if term.kind == "embedding":
        return torch.stack([F.embedding(x, vector) for vector in vectors], 1)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    options = dict(term.options)
    if options["groups"] == 1:
        return conv(x, vectors.flatten(0, 1), **options).unflatten(1, (v, -1))
    return torch.stack([conv(x, vector, **options) for vector in vectors], 1)
