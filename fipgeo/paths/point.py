"""One point of a path: what was measured there, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor, nn

from fipgeo.model import unwrapped
from fipgeo.paths.certificate import Certificate


@dataclass(frozen=True)
class PathPoint:
    """One point of a path: what was measured there, and (if it was stored) its weights.

    Attributes:
        step: Number of accepted steps before it; 0 is the start.
        arc_length: Length of the path so far, the sum of |theta_{i+1} - theta_i| in weights.
        step_norm: |theta_i - theta_{i-1}|.
        distance: Root mean square over held-out inputs of the geometry's finite distance to the start's outputs.
        drift: The same in units of the outputs' own spread, their root mean square distance from their mean over the
            inputs: 0 the same function, 1 as far off as a constant function would be.
        changed: Share of held-out inputs whose prediction differs from the start's; NaN where outputs predict nothing.
        changed_upper: Exact (Clopper-Pearson) upper 95 % confidence bound on that share.
        objective: What the objective measures (sparsity, loss on new data).
        sparsity: Exact zeros among the coordinates the objective counts, as a share.
        cost: Evaluations of the model on one input so far, a backward pass counted as two.
        seconds: Wall time so far.
        num_held_out: Inputs behind `changed`.
        control_drift: Drift on the control inputs, by which steps are accepted and a budget is kept; for being
            chosen by it (and at the end perhaps protected, see `Method`), lower than `drift`, whose inputs decide
            nothing.
        certificate: What the held-out inputs say about others like them.
        layers: Zeros and weights of every tensor that the objective counts, by name.
        tensors: The point's weights, and the buffers that the path moved, by name; None if not stored.
    """

    step: int
    arc_length: float
    step_norm: float
    distance: float
    drift: float
    changed: float
    changed_upper: float
    objective: float
    sparsity: float
    cost: float
    seconds: float
    num_held_out: int
    control_drift: float = float("nan")
    certificate: Certificate | None = None
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Write this point's weights (and normalisation statistics) into a model of the same shape, in place.

        Returns:
            The model.

        Raises:
            ValueError: The point's tensors were not stored, or the model lacks some of them or has other shapes; all
                mismatches are listed and nothing is written.
        """
        if self.tensors is None:
            raise ValueError(f"apply_: point {self.step} was not stored; walk with store='all' to keep every point")
        own = unwrapped(model)
        targets = dict(own.named_parameters()) | dict(own.named_buffers())
        problems = [
            f"{name} {list(t.shape)}" + ("" if name in targets else " is missing from the model")
            for name, t in self.tensors.items()
            if name not in targets or targets[name].shape != t.shape
        ]
        if problems:
            raise ValueError(f"apply_: the model does not fit the path's tensors: {'; '.join(problems)}")
        with torch.no_grad():
            for name, value in self.tensors.items():
                targets[name].copy_(value)
        return model

    def layer_sparsity(self) -> dict[str, tuple[int, int]]:
        """Zeros and weights of every tensor that counts, for `fipgeo.plotting.plot_layer_sparsity`.

        They are there whether or not the point's weights were stored.
        """
        return dict(self.layers)

    def to_dict(self) -> dict[str, float]:
        """The measured numbers by name, those of the certificate among them, ready for a logger."""
        left_out = ("certificate", "layers", "tensors")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return numbers | ({} if self.certificate is None else asdict(self.certificate))
