"""Cases off the beaten track: odd shapes, broken derivatives, mixed-up resumes, loaders, tied names."""

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from fipgeo import MetricField, NewTask, OutputMap, PathPoint, Sparsity, adapt, as_batches, grow_head, metric, sparsify
from fipgeo.memory import LayerSketch
from fipgeo.paths import Verdict
from fipgeo.paths.objectives import weight_mask

from .toys import FIRST_ORDER, draw, filled, inputs, kept_of, labels, mlp, sparse_path, stored


class Tagger(nn.Module):
    """Class scores for every position of a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.read(tokens)))


def tokens(seed: int, length: int) -> Tensor:
    return torch.randint(11, (8, length), generator=torch.Generator().manual_seed(seed))


def test_drift_has_one_unit_whatever_the_lengths() -> None:
    model = Tagger()
    spread = {}
    for name, lengths in (("padded to 5 and 7", (5, 7)), ("all 6", (6, 6))):
        kept = kept_of(model, [tokens(i, n) for i, n in enumerate(lengths)])
        spread[name] = Verdict(kept.function, kept.start).spread
    assert spread["padded to 5 and 7"] == pytest.approx(spread["all 6"], rel=0.3)
    x = torch.cat([tokens(0, 6), tokens(1, 6)])
    z = model(x).detach()
    z = z - z.mean(-1, keepdim=True)
    centred = z - z.mean((0, 1))
    assert spread["all 6"] == pytest.approx(math.sqrt(float(centred.square().sum()) / len(x)), rel=1e-12)


class Root(nn.Module):
    """Finite everywhere, without a finite slope where the hidden unit is off."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return torch.sqrt(h * (h > 0))


def test_a_derivative_that_is_not_finite_is_said() -> None:
    with pytest.raises(ValueError, match="its outputs are finite, their derivative is not"):
        metric(Root(), inputs(0, 20))


@pytest.mark.parametrize("what", ["inputs", "geometry"])
def test_resume_refuses_what_would_make_another_path(what: str) -> None:
    model = mlp(0)
    part = sparse_path(model, inputs(1, 40), 0.6, options={"max_steps": 2})
    with pytest.raises(ValueError, match="resume: the path's last point measured"):
        sparse_path(
            model,
            inputs(9 if what == "inputs" else 1, 40),
            0.6,
            geometry="euclidean" if what == "geometry" else "logits",
            resume=part,
        )


def test_a_batch_of_three_is_not_guessed_at() -> None:
    batches = [(inputs(0, 4), inputs(1, 4), labels(0, 4))]
    with pytest.raises(ValueError, match=r"inputs: a batch has 3 entries, expected x or \(x, y\)"):
        metric(mlp(0), batches)


def test_zero_biases_still_learn_when_zeros_are_held() -> None:
    model = mlp(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.dim() == 1 else p * (p > 0))
    new = (inputs(2, 40), labels(3, 40))
    path = adapt(model, new, cross_entropy, keep=inputs(4, 30), epochs=2, batch_size=10, hold_zeros=True)
    tensors = path[-1].tensors
    assert tensors is not None
    assert all(bool(tensors[n].any()) for n in ("0.bias", "2.bias"))
    assert all(bool((tensors[n][model.get_parameter(n) == 0] == 0).all()) for n in ("0.weight", "2.weight"))


def test_rows_of_a_grown_head_learn_when_zeros_are_held() -> None:
    model = grow_head(mlp(0), 5, name="2")
    with torch.no_grad():
        model[0].weight[1] = model[2].weight[0, :3] = 0.0  # type: ignore[index]
    new = (inputs(2, 40), torch.full((40,), 4))
    path = adapt(model, new, cross_entropy, keep=inputs(4, 30), epochs=2, batch_size=10, hold_zeros=True)
    tensors = stored(path[-1])
    assert bool(tensors["2.weight"][4].any()) and not tensors["2.weight"][0, :3].any()
    assert not tensors["0.weight"][1].any()


class Counted(Dataset):
    """Counts how often an example is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return draw(index, 5), index % 3


def test_a_loader_of_new_data_is_read_once_an_epoch() -> None:
    data = Counted()
    path = adapt(mlp(0), DataLoader(data, batch_size=2, shuffle=True), cross_entropy, keep=inputs(0, 20), lr=1e-3)
    assert path.outcome == "reached" and len(path) == 4
    assert data.reads <= 60 + 20 + 2 + 20  # the epoch, the loss at the start, a look at the first batch, what to hold


def test_new_data_as_a_mapping_is_cut_up() -> None:
    seen = []

    def loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(out))
        return cross_entropy(out, batch["y"])

    new = {"x": inputs(0, 40), "y": labels(1, 40)}
    keep = {"x": inputs(2, 20), "y": labels(3, 20)}
    adapt(mlp(0), new, loss, keep=keep, batch_size=10, forward_fn=lambda model, batch: model(batch["x"]))
    assert set(seen) == {10}


def test_messages_about_old_inputs_name_keep() -> None:
    with pytest.raises(TypeError, match="keep: got generator"):
        adapt(mlp(0), (inputs(0, 8), labels(0, 8)), cross_entropy, keep=(b for b in [inputs(0, 4)]))
    sketch = LayerSketch.of(MetricField(net := mlp(0), inputs(0, 8)))
    with pytest.raises(TypeError, match=r"keep: got LayerSketch, which has no inputs .* fipgeo\.optim\.FIP"):
        adapt(net, (inputs(0, 8), labels(0, 8)), cross_entropy, keep=sketch)


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.mix, self.head = nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 11, bias=False)
        self.head.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.read(x).mean(1))))


@pytest.mark.parametrize("name", ["head.weight", "read.*", lambda name, tensor: name == "head.weight"])
def test_a_tied_tensor_is_excluded_by_any_of_its_names(name: Any) -> None:
    model = OutputMap(Tied())
    assert int(weight_mask(model, name).sum()) == 25
    assert int(Sparsity(0.5, exclude=name).counted(model).sum()) == 25


def test_best_says_when_there_are_no_predictions() -> None:
    path = sparsify(mlp(0), inputs(0, 30), 0.3, geometry="euclidean", corrector=FIRST_ORDER)
    with pytest.raises(ValueError, match="max_changed: outputs of this geometry predict no class; use max_drift"):
        path.best(max_changed=0.1)
    assert path.best(max_drift=10.0).sparsity == path[-1].sparsity


def test_last_keeps_the_two_ends() -> None:
    most = []

    def count(numbers: Any) -> None:
        most.append(sum(type(o) is PathPoint and o.tensors is not None for o in gc.get_objects()))

    gc.collect()
    path = sparse_path(mlp(0), inputs(0, 40), 0.6, options={"store": "last"}, callback=count)
    assert len(path) > 3 and most[-1] <= most[0]
    assert [p.tensors is not None for p in path] == [True] + [False] * (len(path) - 2) + [True]


def test_lists_are_joined_for_minibatches() -> None:
    kept = kept_of(mlp(0), list(inputs(0, 12).split(1)))
    batch, reference, _ = kept.draw(5, torch.Generator().manual_seed(0))
    assert len(batch) == len(reference) == 5


def test_new_task_prints_its_numbers_only() -> None:
    objective = NewTask(as_batches([(inputs(0, 4), labels(0, 4))]), cross_entropy)
    assert "batches" not in repr(objective).replace("num_batches", "") and "lr=0.05" in repr(objective)


def test_recurrent_networks_are_corrected_first_order() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    net, x = filled(Tagger(), 0), draw(1, 24, 3, 5)
    path = sparsify(net, x, 0.3)
    assert path.outcome == "reached" and "FirstOrder" in path.settings["method"]
