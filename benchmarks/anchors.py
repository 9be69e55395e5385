"""Methods that hold weights, or directions of weights, in place of outputs: EWC, LwF, gradient projection, LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, unfold
from torch.nn.utils import parametrize

from benchmarks.learners import Distilled, Learner, Lesson, distilled, outputs
from benchmarks.streams import Task

FISHER_EXAMPLES = 1000
GPM_EXAMPLES = 200
GPM_COLUMNS = 4000


@dataclass(eq=False)
class EWC(Learner):
    """Elastic weight consolidation: (weight / 2) sum_k F_k (theta_k - theta*_k)^2 (Kirkpatrick et al., PNAS 2017).

    F is the diagonal of the Fisher information on 1,000 examples of a task, with labels drawn from the network; those
    of several tasks are added up and held at the weights after the last. No inputs are kept.
    """

    weight: float = 100.0

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Add the diagonal of a task."""
        found = fisher_diagonal(model, task.x, seed)
        old = self.at.get("fisher", {})
        self.at["fisher"] = {n: f + padded(old[n], f) if n in old else f for n, f in found.items()}
        self.at["centre"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def begin(self, student: nn.Module, lesson: Lesson) -> None:
        """Rows of new outputs are free."""
        del lesson
        for name, p in student.named_parameters():
            for key in ("fisher", "centre"):
                self.at[key][name] = padded(self.at[key][name], p)

    def penalty(self, student: nn.Module, x: Tensor, f: Tensor, lesson: Lesson) -> Tensor:
        """The quadratic form."""
        del x, f, lesson
        fisher, centre = self.at["fisher"], self.at["centre"]
        parts = [(fisher[n] * (p - centre[n]).square()).sum() for n, p in student.named_parameters()]
        return self.weight / 2 * torch.stack(parts).sum()


def padded(old: Tensor, new: Tensor) -> Tensor:
    """A tensor with zero rows for those that a grown one has more."""
    more = len(new) - len(old) if new.dim() else 0
    return torch.cat([old, old.new_zeros(more, *old.shape[1:])]) if more else old


def fisher_diagonal(model: nn.Module, x: Tensor, seed: int, chunk: int = 20) -> dict[str, Tensor]:
    """Means of squared gradients of the log-likelihood of labels that the network draws itself."""
    random = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=random)[:FISHER_EXAMPLES]]
    y = torch.multinomial(outputs(model, x).softmax(1), 1, generator=random)[:, 0]
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (one[None],)), label[None])

    found = {n: torch.zeros_like(p) for n, p in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the attention kernel that vmap has a rule for
        for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
            for name, g in vmap(grad(loss), (None, 0, 0))(weights, xs, ys).items():
                found[name] += g.square().sum(0) / len(x)
    return found


class LwF(Learner):
    """Learning without forgetting: on new inputs, the outputs of earlier classes stay (Li & Hoiem, ECCV 2016).

    Distillation at temperature 2 between the old classes' outputs; nothing of the old tasks is kept.
    """

    def penalty(self, student: nn.Module, x: Tensor, f: Tensor, lesson: Lesson) -> Tensor:
        """The mean over the minibatch of new inputs, among the outputs of earlier tasks."""
        del student
        known = int(max(task.y.max() for task in lesson.earlier)) + 1
        with torch.no_grad():
            taught = lesson.teacher(x)[:, :known]
        if bool((taught == taught[:, :1]).all()):
            raise ValueError("LwF: the old outputs of new inputs tell nothing (heads of their own); run other methods")
        return self.weight * distilled(f[:, :known], taught)


@dataclass(eq=False)
class GPM(Learner):
    """Gradient projection memory: steps orthogonal to the inputs that layers had (Saha, Garg & Roy, ICLR 2021).

    For every layer the leading left singular vectors of its inputs on 200 examples of a task, as many as hold the share
    `energy` of their squares; bases grow from task to task by what they miss. Gradients are projected on the
    complement on the side of the inputs. Parameters without a basis (biases, norms, projections inside attention that
    cannot be listened to) stay. No inputs are kept, bases are.

    Attributes:
        energy: Share of the squares to hold.
    """

    energy: float = 0.97

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Extend the bases by a task."""
        random = torch.Generator().manual_seed(seed)
        x = task.x[torch.randperm(len(task.x), generator=random)[:GPM_EXAMPLES]]
        bases = self.at.setdefault("bases", {})
        for name, seen in layer_inputs(model, x, random).items():
            bases[name] = extended(bases.get(name), seen, self.energy)

    def begin(self, student: nn.Module, lesson: Lesson) -> None:
        """Only weights with a basis move."""
        del lesson
        for name, p in student.named_parameters():
            p.requires_grad_(name in self.at["bases"])

    def project(self, student: nn.Module) -> None:
        """Take out of each gradient what the bases span."""
        for name, p in student.named_parameters():
            if p.grad is not None:
                m, g = self.at["bases"][name], p.grad.flatten(1)
                p.grad.copy_((g - g @ m @ m.T).view_as(p))

    def finish(self, student: nn.Module) -> nn.Module:
        """Everything may move again."""
        return student.requires_grad_(True)


def extended(basis: Tensor | None, seen: Tensor, energy: float) -> Tensor:
    """An orthonormal basis `[d, r]`, extended until it holds a share of the squares of `seen` `[d, n]`."""
    total = seen.square().sum()
    rest = seen if basis is None else seen - basis @ (basis.T @ seen)
    left, s, _ = torch.linalg.svd(rest, full_matrices=False)
    missing = energy * total - (total - rest.square().sum())
    count = int((s.square().cumsum(0) < missing).sum()) + 1 if missing > 0 else 0
    new = left[:, :count]
    return new if basis is None else torch.linalg.qr(torch.cat([basis, new], 1))[0]


def layer_inputs(model: nn.Module, x: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """What each weight is applied to, as columns `[d, n]`, n at most 4,000 drawn at random; by the weight's name."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].detach()
            if isinstance(module, nn.Conv2d):
                size, stride = module.kernel_size, module.stride
                columns = unfold(seen, size, padding=module.padding, stride=stride).transpose(1, 2)  # type: ignore
            else:
                columns = seen
            rows = columns.flatten(0, -2)
            found[name] = rows[torch.randperm(len(rows), generator=random)[:GPM_COLUMNS]].T

        return hook

    hooks = [module.register_forward_pre_hook(note(name, module)) for name, module in listened(model)]
    try:
        with torch.enable_grad():  # keeps torch's fused attention out, which calls no hooks
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def listened(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Weights whose inputs are those of their module, and the module."""
    for name, module in model.named_modules():
        inside = "NonDynamically" in type(module).__name__  # a projection that attention applies by itself
        if isinstance(module, nn.Linear | nn.Conv2d) and not inside:
            yield f"{name}.weight".lstrip("."), module
        elif isinstance(module, nn.MultiheadAttention):
            yield f"{name}.in_proj_weight".lstrip("."), module


class _Added(nn.Module):
    """W + B A, B A of low rank, on a weight `[O, ...]` as a matrix."""

    def __init__(self, weight: Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.a = nn.Parameter(torch.randn(rank, columns, generator=random).to(weight) * columns**-0.5)
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


@dataclass(eq=False)
class LoRA(Distilled):
    """Low-rank additions to every weight but the head's, which learns whole; merged after each task (Hu et al. 2022).

    With `replays`, distillation on the kept inputs as in `Distilled`.

    Attributes:
        rank: Of each addition.
    """

    rank: int = 8
    replays = False

    def begin(self, student: nn.Module, lesson: Lesson) -> None:
        """Freeze all but the head and the additions."""
        super().begin(student, lesson)
        random = torch.Generator().manual_seed(lesson.seed)
        self.at["trained"] = trained = {name for name, p in student.named_parameters() if p.requires_grad}
        student.requires_grad_(False)
        student.get_submodule(lesson.head).requires_grad_(True)
        for name, module in list(student.named_modules()):
            for key, weight in list(module.named_parameters(recurse=False)):
                if weight.dim() > 1 and f"{name}.{key}" in trained and key.endswith("weight") and name != lesson.head:
                    parametrize.register_parametrization(module, key, _Added(weight.detach(), self.rank, random))

    def finish(self, student: nn.Module) -> nn.Module:
        """Merge."""
        for module in list(student.modules()):
            if parametrize.is_parametrized(module):
                for key in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, key, leave_parametrized=True)
        for name, p in student.named_parameters():
            p.requires_grad_(name in self.at["trained"])
        return student


class LoRAReplay(LoRA):
    """The same with the kept inputs."""

    replays = True
