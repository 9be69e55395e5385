"""The boundary to modules: outputs as a function of weights, what is refused, and that nothing is left behind."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fipgeo import OutputMap
from fipgeo.model import OutputError, default_forward, unwrapped

from . import oracles
from .hygiene import unchanged
from .models import CASES, build


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_module_in_eval_mode(name: str) -> None:
    module, inputs = build(name)
    map_ = OutputMap(module)
    with unchanged(module, inputs):
        found = map_(map_.point(), inputs)
        checked = map_.check(inputs)
    with torch.no_grad():
        expected = oracles.embedded(module.eval(), inputs, lambda f: f)
    for outputs in (found, checked):
        assert oracles.relative(torch.cat([f.flatten(1) for f in outputs], 1), expected) < 1e-12


def test_outputs_at_another_point() -> None:
    (module, x), (other, _) = build("convnet", 0), build("convnet", 1)
    other.load_state_dict(dict(module.state_dict()) | {n: p.detach() for n, p in other.named_parameters()})
    map_ = OutputMap(module)
    assert torch.equal(map_(OutputMap(other).point(), x)[0], other.eval()(x))


def test_one_number_per_example_is_a_column() -> None:
    module = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    map_ = OutputMap(module)
    assert map_.check(torch.zeros(4, 3))[0].shape == (4, 1)


def test_forward_and_output_functions() -> None:
    module, x = build("mlp")
    map_ = OutputMap(module, forward_fn=lambda m, b: {"y": m(b["a"]["x"])}, output_fn=lambda raw: raw["y"][:, :2])
    assert torch.equal(map_.check({"a": {"x": x}})[0], module(x)[:, :2])


class Encoding(UserDict):
    """A mapping that is no dict, like the encodings of tokenizers."""


def test_default_forward() -> None:
    module, keywords = build("keywords")
    expected = module(**keywords)
    for batch in (keywords, (keywords, 3), [keywords, "label"], Encoding(keywords)):
        assert torch.equal(default_forward(module, batch), expected)
        assert torch.equal(OutputMap(module).check(batch)[0], expected)


def test_wrappers_are_looked_through() -> None:
    module, _ = build("mlp")
    compiled = nn.Module()  # as torch.compile wraps it; the real thing takes seconds to import
    compiled.add_module("_orig_mod", module)
    assert unwrapped(nn.DataParallel(compiled)) is OutputMap(compiled).module is module
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(NotImplementedError, match="model: FSDP modules are not supported; gather the full parameters"):
        OutputMap(sharded)


class Forward(nn.Module):
    """A linear layer followed by whatever a test wants to see refused."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.after = nn.Linear(3, 2), nn.BatchNorm1d(2), after
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]]))

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.layer(x))


def _train(module: nn.Module, f: Tensor) -> Tensor:
    module.train()
    return f


def _refuse() -> Tensor:
    raise AssertionError("three channels")


BAD: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "infinite": (
        lambda m, f: f + torch.tensor([[0.0], [1e999]]).expand(2, 2),
        r"outputs: 2 of 4 values are NaN or infinite \(first at example 1",
    ),
    "integer": (
        lambda m, f: f.argmax(-1),
        r"returned a Tensor with an entry of torch.int64 of shape \[2\]; .* output_fn",
    ),
    "scalar": (
        lambda m, f: f.sum(),
        r"returned a Tensor with an entry of torch.float64 of shape \[\]; .* examples first",
    ),
    "text": (lambda m, f: {"a": f, "b": "text"}, "returned a dict with an entry of str; expected float tensors"),
    "nested": (lambda m, f: (f, (f, f)), "returned a tuple with an entry of tuple; expected float tensors"),
    "none": (lambda m, f: None, "returned a NoneType with an entry of NoneType"),
    "nothing": (lambda m, f: (), r"outputs: the tensors have \[\] examples on their first axis"),
    "columns": (lambda m, f: f[:, :0], r"outputs: the model returned a tensor of shape \[2, 0\], which holds no value"),
    "lengths": (lambda m, f: (f, f[:1]), r"outputs: the tensors have \[2, 1\] examples on their first axis"),
    "random": (lambda m, f: f + torch.randn(2), "model: its forward is random: two evaluations .* differ by"),
    "dropout": (
        lambda m, f: F.dropout(f.repeat(1, 64), 0.5),  # wide enough that two masks never agree
        r"model: its forward is random.*functional dropout needs training=self.training",
    ),
    "train": (_train, "model: its forward switches 'Forward' to train mode; .* take that switch out"),
    "train below": (
        lambda m, f: m.get_submodule("norm").train()(f),
        "model: its forward switches 'norm' to train mode",
    ),
    "key": (
        lambda m, f: {}["logits"],
        r"model: the forward failed on the first batch \(torch.float64 of shape \[2, 3\].*'logits'",
    ),
    "assertion": (lambda m, f: _refuse(), "model: the forward failed on the first batch .*: three channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name: str) -> None:
    after, message = BAD[name]
    module, x = Forward(after), torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
    with unchanged(module, x), pytest.raises(ValueError, match=message):
        OutputMap(module).check(x)


def test_nan_outputs_name_the_example() -> None:
    module, x = build("mlp")
    x[3] = torch.nan
    with pytest.raises(
        OutputError, match=r"outputs: 3 of 15 values are NaN or infinite \(first at example 3 of the batch"
    ):
        OutputMap(module).check(x)


@pytest.mark.parametrize(
    ("dtype", "inputs", "message"),
    [
        (
            torch.float32,
            torch.zeros(2, 3, dtype=torch.float64),
            r"\(torch.float64 of shape \[2, 3\], weights torch.float32\); convert the inputs with .to\(torch.float32\)",
        ),
        (
            torch.float64,
            torch.zeros(2, 3, dtype=torch.long),
            r"integer inputs suit embeddings only, images need .to\(torch.float64\)",
        ),
        (torch.float32, torch.zeros(2, 4), r"the forward failed on the first batch \(torch.float32 of shape \[2, 4\]"),
        (torch.float64, "text", r"the forward failed on the first batch \(str\)"),
        (torch.float32, torch.zeros(0, 3), "inputs: the first batch holds 0 examples; expected at least one"),
        (
            torch.float64,
            torch.zeros(2, 3, device="meta"),
            r"inputs: the batch is on meta, the weights on cpu; move the data, or pass",
        ),
    ],
)
def test_bad_batches(dtype: torch.dtype, inputs: Any, message: str) -> None:
    module = nn.Linear(3, 2).to(dtype)
    with unchanged(module), pytest.raises(ValueError, match=message):
        OutputMap(module).check(inputs)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="model: got function, expected a torch.nn.Module"):
        OutputMap(lambda x: x)  # type: ignore[arg-type]
    for norm, name in (
        (nn.BatchNorm1d(2, track_running_stats=False), "BatchNorm1d"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), "1"),
    ):
        with pytest.raises(ValueError, match=f"model: {name} is a BatchNorm that keeps no running statistics"):
            OutputMap(norm)


def test_statistics_are_those_of_the_batches() -> None:
    module, x = build("training")
    map_ = OutputMap(module)
    with unchanged(module, x):
        found = map_.statistics(map_.point(), [x[:2], x[2:]])
    hidden = [module[0](part).detach() for part in (x[:2], x[2:])]  # type: ignore[index, operator]
    assert torch.allclose(found["1.running_mean"], (hidden[0].mean(0) + hidden[1].mean(0)) / 2)
    assert torch.allclose(found["1.running_var"], (hidden[0].var(0) + hidden[1].var(0)) / 2)


class Twice(nn.Module):
    """One normalisation used at two places, whose statistics are the average over both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.norm(x)))


def test_statistics_of_a_layer_that_is_called_twice() -> None:
    module, x = Twice(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    map_ = OutputMap(module)
    found = map_.statistics(map_.point(), [x])
    second = module.layer((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).detach()
    assert torch.allclose(found["norm.running_mean"], (x.mean(0) + second.mean(0)) / 2)


def test_other_statistics() -> None:
    module, x = build("training")
    map_ = OutputMap(module)
    theta, plain = map_.point(), map_.normalisation()
    assert list(plain) == ["1.running_mean", "1.running_var"]
    moved = map_.with_buffers({"1.running_mean": plain["1.running_mean"] + 1})
    with unchanged(module, x):
        found = moved(theta, x)[0]
    assert torch.equal(moved.normalisation()["1.running_mean"], plain["1.running_mean"] + 1)
    assert not torch.equal(found, map_(theta, x)[0])
    module[1].running_mean += 1  # type: ignore[index, operator]
    assert torch.equal(found, map_(theta, x)[0])


def test_the_callers_context_does_not_matter() -> None:
    module, x = build("encoder")
    map_ = OutputMap(module)
    theta = map_.point()
    expected = map_(theta, x)[0]
    contexts = [torch.enable_grad(), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")]
    for context in contexts:
        with context, unchanged(module, x):
            found = map_(theta, x)[0]
        assert torch.equal(found, expected) and not found.requires_grad and not found.is_inference()


def test_the_batch_is_not_written_to() -> None:
    module, x = build("in_place")
    for batch in (x, (x, 0), [x], {"x": x}):
        with unchanged(module, batch):
            OutputMap(module).check(batch)
