"""Paths towards robustness, and ensembles along a path: laws, and plain-torch oracles."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import Method, MetricField, PathEnsemble, PathResult, Robustness, StepControl, diversity, robustify, walk
from fipgeo.attacks import fgsm, pgd, withstands
from fipgeo.data import TensorBatches
from fipgeo.paths import NoCorrection

from ..hygiene import unchanged
from .toys import draw, labels, loaded, mlp, same_paths, stored

SEEDS = st.integers(0, 2**31)
CONTROL = StepControl(initial=1.0, smallest=1.0, largest=1.0, tolerance=1e6)


def seen(seed: int, count: int) -> Tensor:
    """Inputs whose last feature is always zero: the clean function leaves its weights free, an attack uses them."""
    x = draw(seed, count, 5)
    x[:, 4] = 0.0
    return x


def walked(model: nn.Module, **options: Any) -> PathResult:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 20, "refresh": 4, "lr": 0.5}
    return robustify(model, seen(1, 100), pgd(0.3, 3), **(settings | options))


@pytest.fixture(scope="module")
def path() -> PathResult:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = walked(mlp(0, hidden=16))
    torch.set_default_dtype(before)
    return found


def test_it_withstands_more_where_the_clean_function_leaves_room() -> None:
    model, x = mlp(0, hidden=16), seen(2, 300)
    with torch.no_grad():
        model[0].weight[:, 4] *= 5  # type: ignore[index]
        y = model(x).argmax(1)
    path = walked(model, damping=1e-2)
    end = loaded(model, path[-1].tensors)
    before, after = (withstands(net, x, y, pgd(0.3, 10)).double().mean() for net in (model, end))
    assert path.outcome == "reached" and path.objective_name == "adversarial loss" and not path.maximise
    assert float(after) > 1.2 * float(before) and path[-1].objective < path[0].objective
    plain = walked(model, damping=None)
    assert path[-1].drift < 0.5 * plain[-1].drift


def test_without_a_metric_a_step_is_plain_adversarial_training() -> None:
    """Against a loop in plain torch: attack, gradient at the attacked inputs, momentum, cosine."""
    model, x = mlp(4), draw(1, 40, 5)
    y = model(x).softmax(-1).detach()
    attack, lr = fgsm(0.2), 0.1
    objective = Robustness(
        TensorBatches((x, y), 10), cross_entropy, 1, lr, 0.5, refresh=4, num_batches=4, attack=attack
    )
    method = Method(control=CONTROL, corrector=NoCorrection(), damping=None)
    found = walk(MetricField(model, x), objective, method)
    other, velocity = loaded(model, model.state_dict()), None
    for index, (a, b) in enumerate(TensorBatches((x, y), 10).shuffled(1)):
        a = a.clone().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(other(a), b), a)
        a = a.detach() + 0.2 * slope.sign()
        loss = cross_entropy(other(a), b)
        grads = torch.autograd.grad(loss, list(other.parameters()))
        size = math.sqrt(sum(float(g.square().sum()) for g in grads))
        steps = [-g * min(1.0, 1.0 / size) for g in grads]
        velocity = steps if velocity is None else [0.5 * v + s for v, s in zip(velocity, steps, strict=True)]
        with torch.no_grad():
            for p, v in zip(other.parameters(), velocity, strict=True):
                p += lr * 0.5 * (1 + math.cos(math.pi * index / 4)) * v
    for name, p in other.named_parameters():
        assert torch.allclose(stored(found[-1])[name], p, atol=1e-10), name
    # each example costs three evaluations for the attack and three for the gradient, the control inputs one each
    controls = found[-1].cost - found[0].cost - 6 * 40
    assert 0 < controls < 10


def test_a_share_of_a_minibatch_is_attacked() -> None:
    """The value of the start is the mean loss of minibatches of which the first share is attacked."""
    model, x, y = mlp(4), draw(1, 40, 5), labels(0, 40)
    attack = fgsm(0.2)
    objective = Robustness(TensorBatches((x, y), 10), cross_entropy, num_batches=4, attack=attack, share=0.35)
    found = walk(MetricField(model, x), objective, Method(CONTROL, NoCorrection(), damping=None))
    losses = []
    for a, b in TensorBatches((x, y), 10).shuffled(1):
        shown = torch.cat([attack(model, a[:4], b[:4]), a[4:]])
        losses.append(float(cross_entropy(model(shown), b).detach()))
    assert found[0].objective == pytest.approx(sum(losses) / 4)
    with pytest.raises(ValueError, match="share: got 0"):
        Robustness(TensorBatches((x, y)), cross_entropy, attack=attack, share=0.0)


def test_labels_are_used_where_they_are_given() -> None:
    model, x = mlp(0), draw(1, 60, 5)
    options: dict[str, Any] = {"batch_size": 20, "refresh": 2, "held_out": draw(3, 20, 5), "share": 1.0}
    own = robustify(model, x, fgsm(0.2), **options)
    same = robustify(model, x, fgsm(0.2), targets=model(x).softmax(-1).detach(), **options)
    other = robustify(model, x, fgsm(0.2), targets=labels(0, 60), **options)
    same_paths(own, same)
    assert own[-1].objective != other[-1].objective


def test_a_path_resumes_bit_for_bit_and_the_model_stays() -> None:
    model = mlp(0, dropout=True).train()
    with unchanged(model):
        whole = walked(model)
        part = walked(model, max_steps=2)
    same_paths(walked(model, resume=part), whole)


def test_useless_arguments_are_named() -> None:
    model, x = mlp(0), draw(1, 60, 5)
    with pytest.raises(TypeError, match="inputs: got list"):
        robustify(model, [x], fgsm(0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attack: got None"):
        Robustness(TensorBatches((x, x)), cross_entropy)
    objective = Robustness(TensorBatches({"x": x}), cross_entropy, attack=fgsm(0.1))
    with pytest.raises(ValueError, match="a batch is a dict"):
        walk(MetricField(model, x), objective, Method(CONTROL, NoCorrection()))


@given(SEEDS)
def test_the_ensemble_is_the_mean_probability_of_its_points(path: PathResult, seed: int) -> None:
    model, x = mlp(0, hidden=16), draw(seed, 12, 5)
    picked = torch.randperm(len(path), generator=torch.Generator().manual_seed(seed))[:3].tolist()
    several = PathEnsemble(model, [path[i] for i in picked])
    nets = [loaded(model, path[i].tensors) for i in picked]
    each = torch.stack([net(x).softmax(1) for net in nets])
    assert several.steps == tuple(path[i].step for i in picked) and len(several) == 3
    assert torch.allclose(several(x).exp(), each.mean(0)) and torch.allclose(several.each(x).exp(), each)
    votes = several.votes(x)
    assert votes.sum(1).eq(3).all()
    assert all(
        int(votes[n, c]) == sum(int(net(x)[n].argmax() == c) for net in nets) for n in range(12) for c in range(3)
    )


def test_one_point_is_that_network_and_copies_change_nothing(path: PathResult) -> None:
    model, x = mlp(0, hidden=16), draw(5, 12, 5)
    one = PathEnsemble(model, [path[-1]])
    assert torch.allclose(one(x), loaded(model, path[-1].tensors)(x).log_softmax(1))
    twice = PathEnsemble(model, [path[-1], path[-1]])
    assert torch.allclose(twice(x), one(x)) and diversity(twice.each(x)).disagreement == 0


def test_what_did_not_move_is_held_once(path: PathResult) -> None:
    model = mlp(0, hidden=16)
    assert sum(b.numel() for b in PathEnsemble(model, [path[0]]).buffers()) == 0
    frozen = walked(mlp(0, hidden=16), params="0.*", epochs=1)
    several = PathEnsemble(model, [frozen[0], frozen[-1]])
    first = sum(p.numel() for p in model[0].parameters())  # type: ignore[index]
    assert sum(b.numel() for b in several.buffers()) == first


def test_members_lie_evenly_along_the_path(path: PathResult) -> None:
    model = mlp(0, hidden=16)
    assert PathEnsemble.along(path, model, 100).steps == tuple(range(len(path)))
    ends = PathEnsemble.along(path, model, 2).steps
    assert ends == (0, len(path) - 1)
    middle = PathEnsemble.along(path, model, 2, begin=0.5).steps[0]
    gaps = [abs(p.arc_length - path[-1].arc_length / 2) for p in path]
    assert gaps[middle] == min(gaps)
    thin = path.thinned([2, 3])
    assert PathEnsemble.along(thin, model, 5).steps == (2, 3)


@given(SEEDS, st.lists(st.floats(0, 2), min_size=1, max_size=3))
def test_members_lie_on_the_line_from_the_start_through_the_end(
    path: PathResult, seed: int, shares: list[float]
) -> None:
    model, x = mlp(0, hidden=16), draw(seed, 12, 5)
    several, (start, end) = PathEnsemble.towards(path, model, shares), (path[0].tensors, path[-1].tensors)
    assert start is not None and end is not None and len(several) == len(shares)
    nets = [loaded(model, {n: (1 - s) * start[n] + s * end[n] for n in end}) for s in shares]
    assert torch.allclose(several.each(x).exp(), torch.stack([net(x).softmax(1) for net in nets]), rtol=1e-9)
    ends = PathEnsemble.towards(path, model, [0.0, 1.0]).each(x)
    assert torch.allclose(ends, PathEnsemble(model, [path[0], path[-1]]).each(x), rtol=1e-9)


def test_the_ensemble_leaves_the_model_alone_and_can_be_attacked(path: PathResult) -> None:
    model, x, y = mlp(0, hidden=16).train(), draw(5, 30, 5), labels(0, 30)
    with unchanged(model, x):
        several = PathEnsemble.along(path, model, 3)
        several(x)
        found = fgsm(0.1)(several, x, y)
    at = x.clone().requires_grad_()
    nets = [loaded(model, path[i].tensors) for i in several.steps]
    mean = torch.stack([net(at).softmax(1) for net in nets]).mean(0)
    (slope,) = torch.autograd.grad(-mean[torch.arange(30), y].log().sum(), at)
    assert torch.allclose(found, x + 0.1 * slope.sign())
    assert all(not p.requires_grad for p in several.parameters())


def test_useless_ensembles_are_named(path: PathResult) -> None:
    model = mlp(0, hidden=16)
    with pytest.raises(ValueError, match="points: got none"):
        PathEnsemble(model, [])
    with pytest.raises(ValueError, match="point 1 was not stored"):
        PathEnsemble(model, [path.thinned([0])[1]])
    with pytest.raises(ValueError, match="no '0.weight' of the shape"):
        PathEnsemble(mlp(0, hidden=4), [path[1]])
    with pytest.raises(ValueError, match="along: got count=0"):
        PathEnsemble.along(path, model, 0)
    for shares in ([], [0.5, -0.1]):
        with pytest.raises(ValueError, match="none of them below 0"):
            PathEnsemble.towards(path, model, shares)
    with pytest.raises(ValueError, match="the start or the end was not stored"):
        PathEnsemble.towards(path.thinned([2, 3]), model)


@given(SEEDS, st.integers(2, 5))
def test_diversity_is_what_its_definition_says(seed: int, members: int) -> None:
    scores = (2 * draw(seed, members, 40, 3)).log_softmax(-1)
    y = labels(seed, 40)
    found = diversity(scores, y)
    wrong = (scores.argmax(-1) != y).double()
    for i in range(members):
        for j in range(members):
            one, two = scores[i], scores[j]
            assert float(found.disagreements[i, j]) == pytest.approx(
                float((one.argmax(1) != two.argmax(1)).double().mean())
            )
            kl = nn.functional.kl_div(two, one, log_target=True, reduction="batchmean")
            assert float(found.divergences[i, j]) == pytest.approx(float(kl), abs=1e-12)
    assert found.correlations is not None
    expected = torch.corrcoef(wrong)
    assert torch.allclose(found.correlations, expected, equal_nan=True)
    off = ~torch.eye(members, dtype=torch.bool)
    assert found.disagreement == pytest.approx(float(found.disagreements[off].mean()))
    turned = diversity(scores.flip(0), y)
    assert turned.divergence == pytest.approx(found.divergence) and turned.disagreement == pytest.approx(
        found.disagreement
    )


def test_a_certain_member_has_a_finite_distance_to_itself() -> None:
    certain = torch.tensor([[[0.0, -torch.inf]], [[0.0, -torch.inf]]])
    assert diversity(certain).divergence == 0.0 and math.isnan(diversity(certain).correlation)
    with pytest.raises(ValueError, match=r"log_probabilities: got shape \[2, 1, 2\] with y \[3\]"):
        diversity(certain, torch.zeros(3))
