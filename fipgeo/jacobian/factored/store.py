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

    def __init__(
        self,
        space: WeightSpace,
        dtype: torch.dtype,
        chosen: Plan,
        sites: Sequence[Site],
        examples: int,
        height: int,
    ) -> None:
        self.plan, self.height, self.examples = chosen, height, examples
        self.shapes = {name: torch.Size(shape) for name, shape in space.shapes.items()}
        self.dtype, self.device, self.slices = dtype, space.device, space.slices()
        self.majors: list[bool | None] = []
        plain = {name for (_, name), form in chosen.chosen.items() if not form.factored} | set(chosen.uncovered)
        uses = Counter(name for (_, name), form in chosen.chosen.items() if not form.factored)
        self.shared = {name for name, count in uses.items() if count > 1}
        weights = {(i, t.name) for i, site in enumerate(sites) for t in site.terms if t.kind in ("linear", "conv")}
        alone = {name for _, name in weights & chosen.chosen.keys()} & (plain - self.shared)
        self.rows = {
            name: torch.empty(examples, height, *shape, dtype=dtype, device=space.device)
            for name, shape in self.shapes.items()
            if name in alone
        }
        self.columns: dict[str, slice] = {}
        width = 0
        for name, shape in self.shapes.items():
            if name in plain - alone:
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
        for name in self.rows.keys() & missing:
            self.rows[name].zero_()

    def put(
        self, place: int, site: Site, gradients: Sequence[Tensor], inputs: list[Tensor], n: int, start: int, first: int
    ) -> None:
        """Take derivatives by one site's output of n examples, for outputs from `first` on.

        Args:
            place: The site's number.
            site: The site.
            gradients: Stacks `[c, *shape of the site's output]`, for the embedded outputs in order.
            inputs: The activations.
            n: Examples.
            start: The first of them.
            first: The first embedded output.
        """
        major = bool(self.majors[place])
        parts = [site.arranged(g, n, 1, major=major).to(self.dtype) for g in gradients]  # [c, n, q, *trail]
        stacked: Tensor | None = None
        for term in site.terms:
            form = self.plan.chosen.get((place, term.name))
            if form is None:
                continue
            if form.factored and term.kind == "shift":  # what is kept for the weight
                self.used[place, term.name] = site, term
                continue
            if term.kind in ("scale", "shift"):
                x = None
                if term.kind == "scale":
                    x = site.arranged(inputs[term.source], n, major=major).to(self.dtype)
                at = first
                for part in parts:
                    rows = _reduced(part if x is None else part * x, term.aligned)
                    self.put_rows(term.name, rows.transpose(0, 1), start, at)
                    at += len(part)
                continue
            x = self._activation(site, term, inputs[term.source], n, major)
            if stacked is None:
                stacked = parts[0].transpose(0, 1) if len(parts) == 1 else torch.stack([p[0] for p in parts], 1)
            b = stacked  # [n, c, q, *trail]
            if term.kind == "embedding" and term.options["padding_idx"] is not None:
                b = b * (x != term.options["padding_idx"])[:, None, :, None]
            if form.factored:
                self._put_factors(place, site, term, x, b, start, first, n)
            else:
                self._put_block(term.name, self._block(term, x, b), n, b.shape[1], start, first)

    def _put_block(self, name: str, block: Block, n: int, count: int, start: int, first: int) -> None:
        """Rows of a weight, written where they are to stay if they are for all embedded outputs."""
        if name not in self.rows:
            self.put_rows(name, block.rows().view(n, count, -1), start, first)
        elif count == self.height:
            block.rows(out=self.rows[name][start : start + n].flatten(0, 1).flatten(1))
        else:
            target = self.rows[name][start : start + n, first : first + count]
            target.copy_(block.rows().view(target.shape))

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
        blocks: list[tuple[slice, torch.Size, Block]] = [
            (self.slices[name], self.shapes[name], RowsBlock(rows[part].flatten(0, 1), n))
            for name, rows in self.rows.items()
        ]
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
    """Sum `[c, n, q, *trail]` over positions and over axes along which the parameter is repeated: `[c, n, columns]`."""
    trail = part.dim() - 3
    sizes = (1,) * (trail - len(aligned)) + aligned
    repeated = [axis for axis, size in enumerate((1, *sizes), 2) if size == 1 and part.shape[axis] != 1]
    return (part.sum(repeated) if repeated else part).reshape(*part.shape[:2], -1)
