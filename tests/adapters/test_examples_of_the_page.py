"""Every example of docs/adapters.md is judged as a reader would run it, and comes out as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sdpo_conformance

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
FILE = re.compile(r"^```python\n(# file: (\S+)\.py\n.*?)^```$", re.MULTILINE | re.DOTALL)

EXAMPLES = {
    "my_adapter": (("LP-1",), ()),
    "topk_gjs": (("GJS-1",), ()),
    "incident": (("IS-2",), ("IS-2",)),
    "mended": (("IS-10", "GRAD-2"), ()),
    "trainer": (("STEP-3",), ()),
}
"""File -> the requirements it is judged by here, and those it fails."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, side by side."""
    folder = tmp_path_factory.mktemp("examples")
    for text, name in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_judged_as_the_page_says(name: str, folder: Path) -> None:
    only, fails = EXAMPLES[name]
    dtypes = ("float32", "bfloat16") if name == "mended" else ("float32",)
    report = sdpo_conformance.run(
        str(folder / f"{name}.py"), profile="quick", only=only, dtypes=dtypes, jobs=1, out=folder / f"out-{name}"
    )
    failed = [record["requirement"] for record in report.failures if record["level"] == "MUST"]
    assert failed == [*fails], report


def test_every_file_of_the_page_is_judged() -> None:
    names = {name for _, name in FILE.findall(PAGE.read_text(encoding="utf-8"))}
    assert names - {"broken"} == set(EXAMPLES)  # broken.py offers no entry: the page's table runs it
