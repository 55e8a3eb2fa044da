"""The documentation builds, with every link checked, and the published results are in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed, reason="pip install 'sdpo-conformance[docs]' to build the documentation")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_site_builds_and_frames_the_matrix(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    results = tmp_path / "site" / "results" / "index.html"
    (frame,) = re.findall(r'<iframe[^>]* src="([^"]+)"', results.read_text(encoding="utf-8"))
    assert (results.parent / frame).resolve().is_file()
    for page in DOCS.rglob("*.md"):
        if "examples" not in page.parts:
            assert (tmp_path / "site" / page.relative_to(DOCS).with_suffix(".html")).is_file()


@pytest.mark.parametrize("link", ["[x](nothing.md)", "[x](spec.md#nowhere-at-all)", "[x](#nor-here)"])
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    shutil.copytree(DOCS / "_static", source / "_static")
    (source / "results" / "published").mkdir(parents=True)
    shutil.copy(DOCS / "spec.md", source)
    (source / "index.md").write_text(f"# Start\n\n{link}\n\n```{{toctree}}\nspec\n```\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    assert "index.md" in done.stderr


def test_published_results_are_one_run(tmp_path: Path) -> None:
    """Page, badges and the table in the text all tell of the implementations in the document."""
    from sdpo_conformance.matrix.cells import rows_of, tally
    from sdpo_conformance.matrix.gather import read_columns
    from sdpo_conformance.matrix.matrix_files import badge_names

    published = DOCS / "results" / "published"
    columns = read_columns(published / "matrix.json")
    created = json.loads((published / "matrix.json").read_text(encoding="utf-8"))["created"]
    rows = rows_of(columns)
    shown = (published / "matrix.html").read_text(encoding="utf-8")
    assert f'datetime="{created}"' in shown
    assert all(f'"name":"{column.implementation}"' in shown for column in columns)
    assert {path.stem for path in (published / "badges").iterdir()} == set(badge_names(columns))
    text = (DOCS / "results" / "index.md").read_text(encoding="utf-8")
    assert created[:10] in text
    for column in columns:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{column.implementation}` ")]
        if column.results is not None:
            met, judged = tally(column, [row for row in rows if row.level == "MUST"])
            assert f"| {met}/{judged} |" in line
