"""What is refused, and that the message names the argument and the cure."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fipgeo import Sparsity, adapt, sparsify

from .toys import draw, filled, inputs, labels, method, mlp, sparse_path


def both(model: nn.Module, x: Any, **options: Any) -> list[Callable[[], Any]]:
    """The two fronts on the same model and inputs."""
    new = (draw(8, 30, 5), labels(8, 30))
    return [
        lambda: sparsify(model, x, 0.2, corrector="gauss-newton", **options),
        lambda: adapt(model, new, cross_entropy, keep=x, **options),
    ]


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, 90, math.nan, math.inf])
def test_sparsity_is_a_share_below_one(target: float) -> None:
    for call in (lambda: sparsify(mlp(0), inputs(), target), lambda: Sparsity(target)):
        with pytest.raises(ValueError, match=rf"sparsity: got {target}, expected a share of zeros in \[0, 1\)"):
            call()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite(bad: float) -> None:
    model, x = mlp(0), inputs()
    with torch.no_grad():
        model[2].bias[1] = bad  # type: ignore[index]
    for call in both(model, x):
        with pytest.raises(ValueError, match=r"outputs: .* NaN or infinite"):
            call()


def test_inputs_that_are_not_finite_wherever_they_are() -> None:
    x = inputs(1, 40)
    x[33, 2] = torch.nan
    for call in both(mlp(0), x):
        with pytest.raises(ValueError, match=r"outputs: .*NaN or infinite"):
            call()
    for call in both(mlp(0), inputs(1, 40), held_out=x):
        with pytest.raises(ValueError, match=r"outputs: .*NaN or infinite"):
            call()


EMPTY: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor": (lambda: torch.zeros(0, 5), "0 examples"),
    "list": (lambda: [], "empty list"),
    "loader": (lambda: DataLoader(TensorDataset(torch.zeros(0, 5)), batch_size=4), "no batch|0 examples"),
    "batch": (lambda: [torch.zeros(0, 5), torch.zeros(0, 5)], "0 examples"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_no_data(kind: str) -> None:
    make, message = EMPTY[kind]
    for call in both(mlp(0), make()):
        with pytest.raises(ValueError, match=rf"(inputs|keep): .*({message})"):
            call()


@pytest.mark.parametrize("kind", EMPTY)
def test_no_held_out_data(kind: str) -> None:
    make, message = EMPTY[kind]
    for call in both(mlp(0), inputs(), held_out=make()):
        with pytest.raises(ValueError, match=rf"(held_out|inputs): .*({message})"):
            call()


@pytest.mark.parametrize("argument", ["inputs", "held_out"])
def test_a_generator_can_be_passed_over_only_once(argument: str) -> None:
    for index in range(2):
        once = (x for x in inputs().split(8))
        call = both(mlp(0), once)[index] if argument == "inputs" else both(mlp(0), inputs(), held_out=once)[index]
        with pytest.raises(TypeError, match=r"only once.*list\(.*DataLoader"):
            call()


def test_new_data_that_can_be_passed_over_only_once() -> None:
    with pytest.raises(TypeError, match=r"new_batches: .*only once"):
        adapt(mlp(0), ((x, x) for x in inputs().split(8)), cross_entropy, keep=inputs())


def test_a_budget_below_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"budget: 1e-12 is below the first step.* drifts by .*raise the budget"):
        sparse_path(mlp(0), inputs(), 0.9, options={"budget": 1e-12})
    new = (draw(8, 30, 5), labels(8, 30))
    with pytest.raises(ValueError, match=r"budget: 1e-14 is below the first step"):
        adapt(mlp(0), new, cross_entropy, keep=inputs(), budget=1e-14)


@pytest.mark.parametrize("budget", [-0.1, 0.0, math.nan])
def test_a_budget_is_positive(budget: float) -> None:
    for call in both(mlp(0), inputs(), budget=budget):
        with pytest.raises(ValueError, match="budget: got .*, expected a positive drift, or None"):
            call()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2, 1.5, 20, math.nan])
def test_a_held_out_share_is_between_zero_and_one(share: float) -> None:
    for call in both(mlp(0), inputs(), held_out=share):
        with pytest.raises(ValueError, match=rf"held_out: got {share}, expected inputs, or a share"):
            call()


def test_one_example_cannot_be_split() -> None:
    for call in both(mlp(0), inputs(1, 1)):
        with pytest.raises(ValueError, match="at least two are needed.*held_out"):
            call()


@pytest.mark.parametrize("pattern", ["conv.*", ["0.weight", "nothing"]])
def test_an_exclusion_that_matches_nothing(pattern: Any) -> None:
    with pytest.raises(ValueError, match="exclude: .*matches none of"):
        sparsify(mlp(0), inputs(), 0.5, exclude=pattern)


@pytest.mark.parametrize("pattern", ["*", "*.weight", ["0.*", "2.*"]])
def test_an_exclusion_that_leaves_nothing(pattern: Any) -> None:
    with pytest.raises(ValueError, match="exclude: .*leaves no tensor"):
        sparsify(mlp(0), inputs(), 0.5, exclude=pattern)


def test_a_model_without_matrices() -> None:
    with pytest.raises(ValueError, match="nothing can become sparse"):
        sparsify(filled(nn.BatchNorm1d(5), 0).eval(), inputs(), 0.5)


def test_a_choice_of_parameters_that_matches_nothing() -> None:
    for call in both(mlp(0), inputs(), params="conv.*"):
        with pytest.raises(ValueError, match="params: the pattern 'conv.*' matches none"):
            call()


def test_an_unknown_corrector() -> None:
    with pytest.raises(
        ValueError,
        match="corrector: got 'newton', expected one of 'auto', 'gauss-newton', 'first-order', 'layer-local'",
    ):
        sparsify(mlp(0), inputs(), 0.5, corrector="newton")


def test_an_unknown_way_of_storing() -> None:
    for call in both(mlp(0), inputs(), store="some"):
        with pytest.raises(ValueError, match="store: got 'some', expected 'all' or 'last'"):
            call()


@pytest.mark.parametrize("option", [{"max_steps": -1}, {"damping": -0.1}, {"damping": math.nan}])
def test_numbers_out_of_range_in_a_method(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got"):
        method(**option)


def test_batchnorm_without_statistics() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    for call in both(filled(model, 0), inputs()):
        with pytest.raises(ValueError, match="model: 1 is a BatchNorm that keeps no running statistics"):
            call()


def test_normalisation_cannot_be_re_estimated_from_single_examples() -> None:
    try:
        path = sparse_path(mlp(0, norm=True), [inputs(1, 40)[i : i + 1] for i in range(40)], 0.2)
    except ValueError as error:
        assert "batch" in str(error) and "inputs" in str(error)
    else:
        assert path.outcome == "reached"


def test_a_model_whose_forward_is_random() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.inner(x), 0.5)

    for call in both(Noisy(), inputs()):
        with pytest.raises(ValueError, match="model: its forward is random"):
            call()


def test_a_model_that_switches_itself_to_train_mode() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0, norm=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.train()(x)

    for call in both(Stubborn(), inputs()):
        with pytest.raises(ValueError, match="train mode"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_inputs_of_another_dtype(dtype: torch.dtype) -> None:
    for call in both(mlp(0), inputs().to(dtype)):
        with pytest.raises(ValueError, match=r"model: the forward failed .*\.to\(torch\.float64\)"):
            call()


def test_a_model_that_is_no_module() -> None:
    for call in both(lambda x: x, inputs()):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model: "):
            call()


def test_one_logit_needs_another_geometry() -> None:
    model = filled(nn.Linear(5, 1), 0)
    with pytest.raises(ValueError, match="geometry: 'logits' needs at least two classes"):
        sparsify(model, inputs(), 0.5)
    with pytest.raises(ValueError, match="geometry: got 'euklid', expected one of"):
        sparsify(model, inputs(), 0.5, geometry="euklid")
