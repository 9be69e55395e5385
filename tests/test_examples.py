"""The examples run and do what they say, in a shorter form."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.slow
def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        table = quickstart.main(tmp_path, quick=True)
    finally:
        torch.set_default_dtype(before)
    assert table["path"] >= table["dense"] - 0.03
    assert table["path"] > table["magnitude, statistics re-estimated"] > 0
    assert table["old digits, path"] > table["old digits, fine-tuned"]
    assert {p.name for p in tmp_path.iterdir()} == {"quickstart.png", "sparsify.png", "adapt.png", "layers.png"}
    assert "90% sparsity, no labels used" in capsys.readouterr().out
