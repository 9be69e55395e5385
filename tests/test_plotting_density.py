"""The density plot: what the artists hold, what is left untouched, and what bad input is told."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fipgeo.linalg import Density, Diagonal, Outcome, lanczos, lanczos_density
from fipgeo.plotting import DensityRecord, plot_density
from fipgeo.plotting._common import PALETTE

VALUES = torch.cat([torch.tensor([90.0, 50.0]), torch.logspace(0, -2, 148, dtype=torch.float64), torch.zeros(50)])


def density(deflated: int = 0) -> Density:
    a = Diagonal(VALUES.double())
    return lanczos_density(a, num_probes=6, num_steps=40, deflate=lanczos(a, deflated) if deflated else None)


def blank() -> Axes:
    return Figure(figsize=(5, 3.5), layout="constrained").subplots()


def curve(ax: Axes, gid: str = "fipgeo-density-curve", place: int = 0) -> Line2D:
    return [line for line in ax.lines if line.get_gid() == gid][place]


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    named = [text.get_text() for text in legend.get_texts()] if legend else []
    return named + [text.get_text() for text in ax.texts]


def test_the_curve_counts_eigenvalues_per_decade() -> None:
    found = density()
    assert isinstance(found, DensityRecord)
    ax = plot_density(found, ax=blank(), width=0.1)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == (r"eigenvalue $\lambda$", "eigenvalues per decade")
    x, y = (np.asarray(part, dtype=float) for part in curve(ax).get_data())
    assert np.trapezoid(np.nan_to_num(y), np.log10(x)) == pytest.approx(150, rel=0.1)
    expected = found.on(torch.from_numpy(x), 0.1, log=True)
    assert np.allclose(y, expected.value)
    assert 55 < y[np.abs(x - 0.1).argmin()] < 95  # 148 in two decades


def test_the_band_is_as_high_as_the_errors_say() -> None:
    found = density()
    for num_errors in (1.0, 2.0):
        ax = plot_density(found, ax=blank(), width=0.1, num_errors=num_errors)
        (band,) = [part for part in ax.collections if isinstance(part, PolyCollection)]
        x = np.asarray(curve(ax).get_xdata(), dtype=float)
        expected = found.on(torch.from_numpy(x), 0.1, log=True)
        upper = (expected.value + num_errors * expected.std_error).max()
        assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(float(upper))  # pyright: ignore
    single = lanczos_density(Diagonal(VALUES.double()), num_probes=1)
    assert not plot_density(single, ax=blank()).collections


def test_known_eigenvalues_are_dots_and_leave_the_curve() -> None:
    ax = plot_density(density(2), ax=blank(), width=0.1)
    x, y = (np.asarray(part, dtype=float) for part in curve(ax, "fipgeo-density-exact").get_data())
    assert np.allclose(x, [90, 50], rtol=1e-4) and np.allclose(y, 1 / (0.1 * (2 * np.pi) ** 0.5))
    assert max(np.asarray(curve(ax).get_xdata(), dtype=float)) < 10
    assert "2 found one by one" in texts(ax)


def test_what_the_axis_cannot_hold_is_written() -> None:
    (text,) = texts(plot_density(density(), ax=blank()))
    assert text.split()[0].isdigit() and 40 <= int(text.split()[0]) <= 60 and "values ≤" in text
    (text,) = texts(plot_density(density(), ax=blank(), floor=1.0))
    assert text.endswith("values ≤ 1") and 190 <= int(text.split()[0]) <= 200
    values = torch.cat([torch.logspace(0, -2, 20, dtype=torch.float64), torch.zeros(6), -torch.ones(4)])
    negative = lanczos_density(Diagonal(values.double()), num_probes=30, num_steps=30)
    (text,) = texts(plot_density(negative, ax=blank(), floor=1e-3))
    assert text == "10 values ≤ 0.001, 4 negative"


def test_densities_overlay_in_the_next_colour() -> None:
    ax = plot_density(density(), ax=blank(), label="plain")
    low = ax.get_ylim()[0]
    plot_density(density(2), ax=ax, label="deflated")
    assert [to_hex(curve(ax, place=i).get_color()) for i in (0, 1)] == [color.lower() for color in PALETTE[:2]]
    names = texts(ax)
    assert names[0].startswith("plain (") and names[1].startswith("deflated (")
    assert names[2] == "deflated: 2 found one by one" and ax.get_ylim()[0] == low
    assert to_hex(curve(ax, "fipgeo-density-exact").get_color()) == PALETTE[1].lower()
    styled = plot_density(density(), ax=blank(), color="red", lw=3)
    assert curve(styled).get_linewidth() == 3 and to_hex(curve(styled).get_color()) == "#ff0000"


def test_only_known_eigenvalues_can_be_drawn() -> None:
    a = Diagonal(torch.tensor([4.0, 1.0], dtype=torch.float64))
    ax = plot_density(lanczos_density(a, deflate=lanczos(a, 2)), ax=blank())
    assert len(np.asarray(curve(ax, "fipgeo-density-exact").get_xdata())) == 2 and not texts(ax)[1:]
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()


def test_nothing_but_the_axes_is_touched() -> None:
    before, others = dict(matplotlib.rcParams), Figure().subplots(1, 2)
    others[1].set_xlabel("mine")
    plot_density(density(), ax=others[0])
    assert dict(matplotlib.rcParams) == before and others[1].get_xscale() == "linear" and not others[1].lines
    named = blank()
    named.set_xlabel("mine")
    assert plot_density(density(), ax=named).get_xlabel() == "mine"


def test_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match="density must be a record such as lanczos_density returns"):
        plot_density(torch.ones(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes"):
        plot_density(density(), ax="here")  # pyright: ignore[reportArgumentType]
    for name in ("width", "floor", "num_errors"):
        with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
            plot_density(density(), ax=blank(), **{name: -1.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no eigenvalue lies above the floor"):
        plot_density(density(), ax=blank(), floor=1e3)
    with pytest.raises(ValueError, match="no eigenvalue lies above the floor"):
        plot_density(lanczos_density(Diagonal(torch.zeros(5))), ax=blank())
    broken = replace(density(), nodes=torch.full((1, 2), torch.nan), weights=torch.ones(1, 2))
    with pytest.raises(ValueError, match="not finite; look at density.outcome.message"):
        plot_density(replace(broken, outcome=Outcome.NOT_FINITE), ax=blank())
