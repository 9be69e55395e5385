"""The commands that draw saved records; that which merges is in test_merging.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import fipgeo
from fipgeo.__main__ import draw_paths, draw_spectra, main
from fipgeo.io import save_record

from .plots import legend, lines, texts, y_of


@pytest.fixture
def spectra(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "one" / "first.safetensors", tmp_path / "two" / "second.safetensors"]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        found = fipgeo.metric(torch.nn.Linear(4, 3), torch.randn(5 + seed, 4)).spectrum(6, held_out=torch.eye(4))
        found.save(file)
        back = fipgeo.Spectrum.load(file).to_dict()
        for name, value in found.to_dict().items():
            assert torch.equal(value, back[name]) if isinstance(value, torch.Tensor) else value == back[name], name
    return files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    (tmp_path / "runs").mkdir()
    file = tmp_path / "runs" / "a.safetensors"
    fipgeo.sparsify(net, x, 0.5, corrector="layer-local").save(file)
    return file


def test_spectra_are_drawn_over_each_other(spectra: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["spectrum", *map(str, spectra), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and not plt.get_fignums()
    figure = draw_spectra(spectra)
    assert any(text.startswith("first") for text in legend(figure.axes[0]))
    assert any(text.startswith("second") for text in legend(figure.axes[0]))
    alone = draw_spectra(spectra[:1]).axes[0]
    assert any("rank bound" in text for text in texts(alone)) and not any("first" in text for text in legend(alone))
    spectra[1] = spectra[1].rename(spectra[1].with_name("first.safetensors"))
    assert any("two" in text for text in legend(draw_spectra(spectra).axes[0]))


def test_a_path_is_drawn_from_its_file_or_its_folder(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert main(["path", str(path.parent), "-o", str(out)]) == 0 and out.read_text().startswith("<?xml")
    axes = draw_paths([path]).axes
    walked = fipgeo.PathResult.load(path)
    assert y_of(lines(axes[2], "fipgeo-path-values")[0]).tolist() == [point.sparsity for point in walked]
    (path.parent / "b.safetensors").write_bytes(path.read_bytes())
    save_record(path.parent / "c.safetensors", {"w": torch.zeros(1)}, {"kind": "another"})  # is passed over
    assert {"a", "b"} <= set(legend(draw_paths([path.parent]).axes[0])) and not plt.get_fignums()


def test_what_cannot_be_drawn_is_said_in_a_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    for call, said in (
        (["spectrum", str(path)], "holds path, not a spectrum"),
        (["path", str(tmp_path / "none.safetensors")], "there is no file"),
        (["path", str(tmp_path)], "holds no saved path"),
    ):
        assert main([*call, "-o", str(out)]) == 1 and not out.exists()
        error = capsys.readouterr().err
        assert error.startswith(f"python -m fipgeo {call[0]}: ") and said in error and error.count("\n") == 1
    assert main(["path", str(path), "-o", str(out)]) == 0
    assert main(["path", str(path), "-o", str(out)]) == 1 and "--overwrite" in capsys.readouterr().err
    assert main(["path", str(path), "-o", str(out), "--overwrite"]) == 0
    assert main(["path", str(path), "-o", str(tmp_path / "out.doc")]) == 1
