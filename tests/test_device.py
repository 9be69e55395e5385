"""Where the numbers are: on the parameters' device, and never fetched from it in a product."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fipgeo import Metric, Sketched, metric

from . import oracles

ENGINES = ("autodiff", "linearised", "factored", "materialised")
FETCHING = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def network(device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """Convolutions with batch normalisation, and twenty pictures, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
        )
        x = torch.randn(20, 2, 4, 4)
    return module.float().to(device), x.float().to(device)


def made(engine: str, device: str = "cpu", geometry: Any = "categorical") -> Metric:
    module, x = network(device)
    return metric(module, x, batch_size=8, engine=engine, geometry=geometry)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)


@contextmanager
def fetches() -> Iterator[list[str]]:
    """The names of calls that bring numbers of a tensor to Python, as they are made."""
    seen: list[str] = []
    originals = {name: getattr(Tensor, name) for name in FETCHING}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(Tensor, name, counting(name, original))
        yield seen
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def test_fetches_are_seen() -> None:
    with fetches() as seen:
        _ = float(torch.ones(())), torch.ones(1).item(), torch.ones(2).tolist(), bool(torch.ones(1) > 0)
    assert {"__float__", "item", "tolist", "__bool__"} <= set(seen)
    assert not hasattr(Tensor.item, "__closure__")


@pytest.mark.parametrize("engine", ENGINES)
def test_products_fetch_no_number(engine: str) -> None:
    g = made(engine)
    for count in (1, 16):  # the first stack finds out whether the model can be vectorised
        g.matvec(draw(count, g.dim))
    found = {}
    for products, count in [(1, 1), (10, 1), (1, 16), (2, 16)]:
        vectors = draw(count, g.dim)
        with fetches() as seen:
            for _ in range(products):
                g.matvec(vectors)
        found[products, count] = len(seen)
    assert set(found.values()) == {0}, found


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_and_pullbacks_fetch_no_number(engine: str) -> None:
    g = made(engine)
    v, y = draw(3, g.dim), draw(3, g.root.shape[0])
    _ = g.norm(v), g.root.adjoint(y)
    with fetches() as seen:
        for _ in range(5):
            _ = g.norm(v), g.root(v), g.root.adjoint(y), g.inner(v[0], v[1])
    assert not seen


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_fetches_a_few_numbers_a_step(engine: str) -> None:
    g = made(engine)
    with fetches() as seen:
        found = g.spectrum(10, method="lanczos")
    assert seen.count("cpu") <= 3 * found.num_products + 40  # most others read what is on the host by then
    assert len(seen) <= 16 * found.num_products + 60


@pytest.mark.parametrize("method", ["cg", "dual"])
def test_a_solve_fetches_as_often_for_many_right_hand_sides(method: str) -> None:
    g = made("factored")
    g.solve(draw(1, g.dim), 0.1, method=method)
    counts = []
    for count in (2, 32):
        with fetches() as seen:
            steps = g.solve(draw(count, g.dim), 0.1, method=method).num_iters
        counts.append((len(seen), steps))
    assert all(number <= 8 * steps + 60 for number, steps in counts), counts


def results(g: Metric, device: str) -> dict[str, Tensor]:
    """Numbers of every kind that a metric gives as tensors."""
    v = draw(3, g.dim, device=device)
    few = g.spectrum(4, method="lanczos")
    assert few.vectors is not None and few.residuals is not None
    return {
        "product": g.matvec(v),
        "norm": g.norm(v),
        "inner": g.inner(v[0], v[1]),
        "rows": g.root(v),
        "diagonal": g.diagonal(method="hutchinson").value,
        "values": few.values,
        "projector": few.vectors.T @ few.vectors,
        "whole": g.spectrum(8, method="dual").values,
        **{method: g.solve(v, 0.1, method=method).value for method in ("dual", "dense", "cg", "nystrom", "auto")},
        "paths": g.solve(v, [1.0, 0.1]).value,
        "block": g.restrict("4.*").matvec(torch.eye(325, device=device, dtype=torch.float32)),
    }


@needs_cuda
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_everything_stays_on_the_device_and_is_what_the_cpu_gives(engine: str) -> None:
    here, there = results(made(engine), "cpu"), results(made(engine, "cuda"), "cuda")
    for key, expected in here.items():
        assert there[key].device.type == "cuda", key
        if key != "diagonal" or engine in ("factored", "materialised"):  # else random vectors of another device
            assert oracles.relative(there[key].cpu(), expected) < 1e-4, key
    g, other = made(engine), made(engine, "cuda")
    assert other.root.device.type == other.dual_factor().eigenvalues.device.type == "cuda"
    assert g.log_det(0.1).value == pytest.approx(other.log_det(0.1).value, rel=1e-4)


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_on_the_cpu_move_to_the_parameters(engine: str) -> None:
    module, x = network("cuda")
    g = metric(module, x.cpu(), batch_size=8, engine=engine)
    expected = made(engine, geometry="logits")
    assert oracles.relative(g.matvec(draw(2, g.dim, device="cuda")).cpu(), expected.matvec(draw(2, g.dim))) < 1e-4


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_sketches_draw_the_same_on_every_device(engine: str) -> None:
    sketch = Sketched("categorical", num_samples=4)
    here, there = made(engine, geometry=sketch), made(engine, "cuda", geometry=sketch)
    v = draw(3, here.dim)
    assert oracles.relative(there.matvec(v.cuda()).cpu(), here.matvec(v)) < 1e-4


def traffic(call: Callable[[], Any]) -> tuple[int, int]:
    """Copies from the device to the host, and waits for the device, while something runs."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
    events = record.events() or []
    copies = sum("DtoH" in event.name for event in events)
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
    return copies, waits


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_products_wait_for_nothing_that_grows(engine: str) -> None:
    g = made(engine, "cuda")
    for count in (1, 16):
        g.matvec(draw(count, g.dim, device="cuda"))

    def products(count: int) -> Callable[[], Any]:
        v = draw(count, g.dim, device="cuda")
        return lambda: [g.matvec(v) for _ in range(20)]

    single, many = traffic(products(1)), traffic(products(16))
    assert many <= single and sum(single) <= 8, (single, many)


@needs_cuda
@pytest.mark.parametrize("engine", ENGINES)
def test_searches_wait_a_few_times_a_step(engine: str) -> None:
    g, steps = made(engine, "cuda"), []
    copies, waits = traffic(lambda: steps.append(g.spectrum(20, method="lanczos").num_products))
    assert copies <= 6 * steps[0] + 60 and waits <= 8 * steps[0] + 80, (copies, waits, steps)
