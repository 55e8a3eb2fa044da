"""Right results that are rounded to half precision are said to be, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpo_conformance import run

RIGHT = "import torch\nfrom sdpo_implementations.reference import compute_sdpo_loss as right\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("which", ["r", "['loss']"])
def test_rounded_results_are_named(dtype: str, which: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"{RIGHT}def compute_sdpo_loss(i):\n    r = right(i)\n"
        f"    return {{k: v.to(torch.{dtype}) if k in {which} and torch.is_tensor(v) else v for k, v in r.items()}}\n"
    )
    report = run(
        str(tmp_path / "mine.py"), profile="quick", only=["GJS-1", "GJS-2", "IS-2"], jobs=1, out=tmp_path / "run"
    )
    assert report.exit_status == 1
    assert report.diagnosis is not None
    assert report.diagnosis["lines"][0].startswith(f"results in {dtype}: explains ")
    assert report.diagnosis["matches"] == []


@pytest.mark.parametrize("name", ["divergence-in-bfloat16", "dropped-importance-sampling", "logits-rounded-to-float16"])
def test_what_is_rounded_on_the_way_has_its_own_name(name: str, tmp_path: Path) -> None:
    report = run(f"defect:{name}", profile="quick", only=["GJS-1", "IS-2", "NUM-1"], jobs=1, out=tmp_path / "run")
    assert report.diagnosis is not None
    assert name in [match["name"] for match in report.diagnosis["matches"]]
