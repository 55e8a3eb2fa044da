"""Documents that are generated from the code are current, and the package says what it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs.pages import check_page
from docs.pages.spec_page import updated

from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.requirement import Level

ROOT = Path(__file__).parents[2]

PUBLIC = {
    "GJS": 9, "RKL": 3, "IS": 10, "KL": 6, "RED": 6, "GRAD": 7, "NUM": 8, "FUS": 6, "LP": 4, "TK": 3, "STEP": 11,
}  # fmt: skip
SHOULD = {"GRAD-7", "NUM-3", "NUM-4", "NUM-5", "NUM-8", "FUS-5", "STEP-12"}


def test_every_public_id_exists_with_its_level() -> None:
    known = find_spec("claas").requirements()
    wanted = {f"{family}-{number}" for family, count in PUBLIC.items() for number in range(1, count + 1)}
    assert wanted <= set(known)
    assert {id for id, entry in known.items() if entry.level is Level.SHOULD} == SHOULD


def test_every_requirement_says_why_and_whence() -> None:
    for entry in find_spec("claas").requirements().values():
        assert len(entry.statement) > 20, entry.id
        assert entry.source, entry.id
        assert entry.why, entry.id


def test_the_spec_page_is_current() -> None:
    page = (ROOT / "docs" / "spec.md").read_text()
    assert updated(page) == page, "run python -m docs.pages.spec_page docs/spec.md"


@pytest.mark.parametrize("title", check_page.CHECKS)
def test_the_transcripts_are_what_a_check_prints(title: str) -> None:
    printed = check_page.comparable(check_page.transcript(check_page.CHECKS[title]))
    assert printed in check_page.comparable(check_page.written()), "run python docs/pages/check_page.py"


@pytest.mark.parametrize("package", ["protocol", "specs.claas.oracle", "specs.claas.defects"])
def test_the_lower_layers_import_no_pytest(package: str) -> None:
    probe = f"import sys, sdpo_conformance.{package}; assert 'pytest' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
