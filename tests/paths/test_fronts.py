"""The one-call fronts: what they choose by themselves, and what reaches the walk."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import Categorical, FirstOrder, GaussNewton, SaturationWarning, adapt, sparsify
from fipgeo.paths.objectives.patterns import Rows as EveryRow
from fipgeo.paths.objectives.patterns import Unstructured

from .toys import (
    draw,
    inputs,
    labels,
    mlp,
    weight_names,
    zeros,
)


@pytest.mark.parametrize("corrector", ["gauss-newton", "first-order"])
def test_sparsify_in_one_call(corrector: str) -> None:
    model = mlp(0)
    path = sparsify(model, inputs(3, 40), 0.1, corrector=corrector)
    assert path.outcome == "reached" and zeros(path[-1].tensors, weight_names(model)) == round(0.1 * 48)
    kinds = {"gauss-newton": GaussNewton, "first-order": FirstOrder}
    assert kinds[corrector].__name__ in path.settings["method"] and "join_control=True" in path.settings["method"]


@pytest.mark.parametrize(
    ("norm", "count", "sparsity", "kind"),
    [
        (False, 40, 0.0, "GaussNewton"),  # 57 weights, 48 of which may be zero, and 3 outputs an input
        (False, 18, 0.0, "FirstOrder"),
        (False, 18, (0.1, 0.7), "GaussNewton"),
        (False, 18, (0.1, 0.2), "FirstOrder"),
        (True, 40, 0.5, "FirstOrder"),
    ],
)
def test_auto_picks_a_corrector_by_what_is_left_and_normalisation(
    monkeypatch: pytest.MonkeyPatch, norm: bool, count: int, sparsity: float | tuple[float, ...], kind: str
) -> None:
    def chosen() -> str:
        path = sparsify(mlp(0, norm=norm), inputs(3, count), sparsity, callback=lambda _: True)
        return path.settings["method"]

    assert f"corrector={'FirstOrder' if norm else 'GaussNewton'}(" in chosen()  # so few outputs are seen all at once
    monkeypatch.setattr("fipgeo.paths.fronts.FEW_ROWS", 50)
    assert f"corrector={kind}(" in chosen()


@pytest.mark.parametrize(
    ("norm", "corrector", "pattern", "score"),
    [
        (False, "gauss-newton", Unstructured(), "metric"),
        (False, "first-order", Unstructured(), "lamp"),
        (True, "first-order", Unstructured(), "magnitude"),
        (True, "first-order", EveryRow(), "lamp"),
        (True, "layer-local", Unstructured(), "lamp"),
    ],
)
def test_auto_picks_a_score(norm: bool, corrector: str, pattern: Any, score: str) -> None:
    options: Any = {"corrector": corrector, "pattern": pattern, "callback": lambda _: True}
    path = sparsify(mlp(0, norm=norm), inputs(3, 40), 0.1, **options)
    assert f"score='{score}'" in path.settings["objective"]


def test_model_and_output_functions_reach_the_whole_walk() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0)

        def forward(self, x: Tensor, flag: bool) -> list[Any]:
            assert flag
            return ["text", self.inner(x)]

    options: dict[str, Any] = {"forward_fn": lambda m, b: m(b, True), "output_fn": lambda out: out[1]}
    path = sparsify(Odd(), inputs(3, 40), 0.1, corrector="gauss-newton", **options)
    assert path.outcome == "reached"
    new = (draw(5, 20, 5), labels(5, 20))
    options["forward_fn"] = lambda m, b: m(b[0] if isinstance(b, tuple) else b, True)
    assert adapt(Odd(), new, cross_entropy, keep=inputs(3, 40), **options).outcome == "reached"


def test_a_geometry_that_protects_nothing_is_said() -> None:
    model = mlp(0)
    with torch.no_grad():
        model[2].weight *= 200.0  # type: ignore[index]
    with pytest.warns(SaturationWarning, match=r"geometry=.logits."):
        sparsify(model, inputs(3, 40), 0.0, geometry="categorical")
    sparsify(model, inputs(3, 40), 0.0, geometry=Categorical(temperature=400.0))
    sparsify(model, inputs(3, 40), 0.0)


@pytest.mark.parametrize("pattern", ["0.*", ["0.weight"]])
def test_excluding_reaches_the_front(pattern: str | list[str]) -> None:
    path = sparsify(mlp(0), inputs(3, 40), 0.1, exclude=pattern, corrector="gauss-newton")
    assert zeros(path[-1].tensors, ["0.weight"]) == 0 and zeros(path[-1].tensors, ["2.weight"]) == 2
