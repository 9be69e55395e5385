"""Memory for the factors of a run of batches, filled piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fipgeo.jacobian.factored.capture import Site, Term
from fipgeo.jacobian.factored.factors import Block, ConvBlock, EmbeddingBlock, LinearBlock, RowsBlock
from fipgeo.jacobian.factored.plan import Plan
from fipgeo.jacobian.factored.segment import Segment
from fipgeo.space import WeightSpace


class Store:
    """Memory for one segment, filled piece by piece."""

    def __init__(self, space: WeightSpace, dtype: torch.dtype, chosen: Plan, examples: int, height: int) -> None:
        self.plan, self.height, self.examples = chosen, height, examples
        self.shapes = {name: torch.Size(shape) for name, shape in space.shapes.items()}
        self.dtype, self.device, self.slices = dtype, space.device, space.slices()
        self.majors: list[bool | None] = []
        plain = {name for (_, name), form in chosen.chosen.items() if not form.factored} | set(chosen.uncovered)
        uses = Counter(name for (_, name), form in chosen.chosen.items() if not form.factored)
        self.shared = {name for name, count in uses.items() if count > 1}
        self.columns: dict[str, slice] = {}
        width = 0
        for name, shape in self.shapes.items():
            if name in plain:
                self.columns[name] = slice(width, width + shape.numel())
                width += shape.numel()
        self.matrix = torch.empty(examples, height, width, dtype=self.dtype, device=self.device)
        self.second: dict[tuple[int, str], Tensor] = {}
        self.first: dict[tuple[int, bool], Tensor] = {}
        self.used: dict[tuple[int, str], tuple[Site, Term]] = {}

    def decide(self, majors: list[bool | None]) -> None:
        """Take note of how the examples lie at every site; rows that are sums, or never come, start at zero."""
        self.majors = majors
        missing = {name for place, name in self.plan.chosen if majors[place] is None}
        for name in self.columns.keys() & (self.shared | missing):
            self.matrix[..., self.columns[name]] = 0.0

    def put(
        self, place: int, site: Site, gradients: Sequence[Tensor], inputs: list[Tensor], n: int, start: int, first: int
    ) -> None:
        """Take the derivatives by one site's output, c of its shape, of n examples, for outputs from `first` on."""
        major = bool(self.majors[place])
        b = torch.stack([site.arranged(g, n, major=major) for g in gradients], 1).to(self.dtype)  # [n, c, q, *trail]
        for term in site.terms:
            form = self.plan.chosen.get((place, term.name))
            if form is None:
                continue
            if form.factored and term.kind == "shift":  # what is kept for the weight
                self.used[place, term.name] = site, term
                continue
            if term.kind in ("scale", "shift"):
                part = b
                if term.kind == "scale":
                    part = b * site.arranged(inputs[term.source], n, major=major).to(self.dtype)[:, None]
                self.put_rows(term.name, _reduced(part, term.aligned), start, first)
                continue
            x = self._activation(site, term, inputs[term.source], n, major)
            c = b
            if term.kind == "embedding" and term.options["padding_idx"] is not None:
                c = b * (x != term.options["padding_idx"])[:, None, :, None]
            if form.factored:
                self._put_factors(place, site, term, x, c, start, first, n)
            else:
                block = self._block(term, x, c)
                rows = block.rows(block.entries()).view(n, c.shape[1], -1)
                self.put_rows(term.name, rows, start, first)

    def put_rows(self, name: str, rows: Tensor, start: int, first: int) -> None:
        """Add rows `[n, c, columns]` of a parameter."""
        where = self.matrix[start : start + len(rows), first : first + rows.shape[1], self.columns[name]]
        where.add_(rows) if name in self.shared else where.copy_(rows)

    def _activation(self, site: Site, term: Term, x: Tensor, n: int, major: bool) -> Tensor:
        trail = {"linear": 1, "embedding": 0}.get(term.kind, site.trail)
        x = site.arranged(x, n, major=major, trail=trail)
        if term.kind == "conv":
            x = x.flatten(0, 1)
        return x if term.kind == "embedding" else x.to(self.dtype)

    def _put_factors(
        self, place: int, site: Site, term: Term, x: Tensor, b: Tensor, start: int, first: int, n: int
    ) -> None:
        key = place, term.name
        if key not in self.second:
            self.used[key] = site, term
            self.second[key] = b.new_zeros(self.examples, self.height, *b.shape[2:])
        source = term.source, bool(self.majors[place])
        share = len(x) // n
        if source not in self.first:
            self.first[source] = x.new_zeros(self.examples * share, *x.shape[1:])
        if first == 0:
            self.first[source][start * share : start * share + len(x)] = x
        self.second[key][start : start + n, first : first + b.shape[1]] = b

    def _block(self, term: Term, x: Tensor, b: Tensor) -> Block:
        shape = self.shapes[term.name]
        if term.kind == "conv":
            return ConvBlock(x, b, tuple(shape[2:]), term.options)
        if term.kind == "embedding":
            return EmbeddingBlock(x, b, shape[0])
        return LinearBlock(x, b, bool(term.options.get("transposed")))

    def segment(self, examples: int | None = None, start: int = 0) -> Segment:
        """What was filled in, or some of its examples."""
        n = self.examples if examples is None else examples
        part = slice(start, start + n)
        held = tuple((self.slices[name], self.shapes[name]) for name in self.columns)
        blocks = []
        for key, (site, term) in self.used.items():
            if term.kind == "shift":
                weight = next(other.name for other in site.terms if other.kind == "linear")
                rows = self.second[key[0], weight][part].flatten(0, 2)
                blocks.append((self.slices[term.name], self.shapes[term.name], RowsBlock(rows, n)))
                continue
            x = self.first[term.source, bool(self.majors[key[0]])]
            share = len(x) // self.examples
            block = self._block(term, x[start * share : (start + n) * share], self.second[key][part])
            blocks.append((self.slices[term.name], self.shapes[term.name], block))
        return Segment(self.matrix[part].flatten(0, 1), held, tuple(blocks), n, self.height)


def _reduced(part: Tensor, aligned: tuple[int, ...]) -> Tensor:
    """Sum `[n, c, q, *trail]` over positions and over axes along which the parameter is repeated: `[n, c, columns]`."""
    trail = part.dim() - 3
    sizes = (1,) * (trail - len(aligned)) + aligned
    repeated = [axis for axis, size in enumerate((1, *sizes), 2) if size == 1 and part.shape[axis] != 1]
    return (part.sum(repeated) if repeated else part).reshape(*part.shape[:2], -1)
