"""The sequence of texts: a head for each task, padding that does not count, and readouts of one network for all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import learn, streams, texts
from benchmarks.learners import outputs
from benchmarks.streams import Stream, Task


class Toy(nn.Module):
    """What a pretrained encoder takes and gives, with one layer that mixes tokens."""

    config = SimpleNamespace(hidden_size=6)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        h = self.embed(input_ids)
        mean = (h * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return SimpleNamespace(last_hidden_state=(self.mix(h) + mean).tanh())


def task(number: int, count: int, seed: int) -> Task:
    """Texts of which one word tells the class, in places and lengths at random."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(8, 20, (count, 6), generator=random)
    x[torch.arange(count) % 3 == 0, 5:] = 0
    y = torch.arange(count) % 2
    x[torch.arange(count), torch.randint(5, (count,), generator=random)] = 1 + 2 * number + y
    x = nn.functional.pad(x, (1, 0), value=number)
    return Task(f"task {number}", x, 2 * number + y, x, 2 * number + y, texts.living)


def answers(outputs: int = 2) -> texts.Answers:
    return texts.Answers(texts.Encoder(Toy(), None), [0, 0, 1, 1, 2, 2], outputs).eval()


def stream() -> Stream:
    tasks = [task(number, 60, number) for number in range(3)]
    model = answers()
    descent = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        descent.zero_grad()
        cross_entropy(model(tasks[0].x), tasks[0].y).backward()
        descent.step()
    return Stream(model, tasks, head="head", passes=20, batch=20, kept=20, per_class=False)


def test_a_row_has_the_head_of_its_task_and_padding_does_not_count() -> None:
    model = answers(6)
    x = torch.cat([task(number, 5, 7).x for number in range(3)])
    f = model(x).detach()
    own = torch.arange(6) // 2 == x[:, :1]
    assert bool((f[~own] == texts.ELSEWHERE).all()) and bool((f[own].abs() < 100).all())
    assert float(cross_entropy(f, 2 * x[:, 0])) == pytest.approx(float(cross_entropy(f[own].view(-1, 2), 0 * x[:, 0])))
    longer = nn.functional.pad(x, (0, 3))
    torch.testing.assert_close(model(longer), f)


def test_tokens_come_after_the_number_of_their_task() -> None:
    def tokenizer(given: list[str], **options: Any) -> dict[str, Tensor]:
        assert options == {"padding": "max_length", "truncation": True, "max_length": 3, "return_tensors": "pt"}
        return {"input_ids": torch.tensor([[len(text), 4, 0] for text in given])}

    one = texts.Encoder(Toy(), tokenizer)
    assert texts.rows(one, ["ab", "c"], 2, 3).tolist() == [[2, 2, 4, 0], [2, 1, 4, 0]]


def test_readouts_with_heads_forget_nothing_and_leave_the_first_task_to_the_network() -> None:
    whole, learner = stream(), learn.Ours(readout=True, heads=True, ridge=1.0)
    found, _ = learn.run(whole, learner, 0)
    assert found.average_forgetting() == 0 and found.average_accuracy() > 0.9
    heads = texts.Headed(learner.at["features"], learner.at["heads"])
    x, y = whole.tasks[2].x, whole.tasks[2].y
    alone = fipgeo.memory.ReadoutSketch.of(learner.at["features"], (x, y - 4)).readout(learner.at["features"], 1.0)
    with torch.no_grad():
        torch.testing.assert_close(heads(x)[:, 4:], alone(x))
        assert bool((heads(x)[:, :4] == texts.ELSEWHERE).all())
        assert torch.equal(heads(whole.tasks[0].x)[:, :2], outputs(whole.start, whole.tasks[0].x))
    assert streams.grown(heads, "head", 6) is heads
    longer = nn.functional.pad(x, (0, 4))
    torch.testing.assert_close(heads(longer), heads(x))


@pytest.mark.parametrize("options", [{"low_rank": 2, "lr": 0.5}, {"lr": 0.2}])
def test_paths_learn_a_head_after_the_other_and_keep_what_was(options: dict[str, Any]) -> None:
    whole = stream()
    found, notes = learn.run(whole, learn.Ours(**options), 0)
    assert found.average_accuracy() > 0.85 and found.average_forgetting() < 0.12 and notes["outcome"] == "reached"
    start = whole.start.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in stream().start.state_dict().items())


def test_methods_that_ask_old_heads_about_new_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="LwF: the old outputs of new inputs tell nothing"):
        learn.run(stream(), learn.METHODS["LwF"](), 0)
