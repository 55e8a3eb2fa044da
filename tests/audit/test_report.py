"""The report in its three forms, and the command that writes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.audit_command import audit, write_report
from sdpo_conformance.audit.findings import CHECKS
from sdpo_conformance.audit.reporting.audit_document import document, schema
from sdpo_conformance.audit.reporting.html import page

from .parts import SOUND, adapter, altered, moved

WriteRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
CASES = ROOT / "cases" / "audit"
VOID = {"meta", "link", "br", "img", "input", "hr"}

app = Typer()
app.command()(audit)


class Page(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Page:
    reader = Page()
    reader.feed(html)
    assert reader.open == []
    return reader


@pytest.mark.parametrize("name", ["incident", "sound_four_steps_sampler_mismatch", "incident_without_adapters"])
def test_page_is_whole_and_needs_nothing_else(name: str) -> None:
    html = page(audit_run(CASES / name))
    reader = parsed(html)
    names = {tag for tag, _ in reader.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object"})
    for _, attributes in reader.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(key.startswith("on") for key in attributes)
    assert re.findall(r"https?://|url\(|@import", html) == []
    assert "prefers-color-scheme: dark" in html


def test_page_shows_what_happened() -> None:
    html = page(audit_run(CASES / "incident"))
    assert "DO NOT TRUST THIS RUN" in html
    assert "869 of 1198" in html
    assert html.count('class="still"') == 6  # three fields, steps 3 and 4
    assert html.count('class="cell idle"') == 164
    assert html.count('<rect class="cell') == 599


def test_page_escapes_what_the_run_says(write_run: WriteRun) -> None:
    evil = "</title><script>alert(1)</script>\x1b[31m"
    before = {
        f"layers.0.{evil}.lora_A.weight": torch.ones(2, 2),
        "layers.0.b.lora_A.weight": torch.ones(2, 2),
    }
    after = {name: tensor * (1 if "script" in name else 2) for name, tensor in before.items()}
    report = audit_run(write_run(SOUND, before=before, after=after))
    html = page(report)
    assert "<script" not in html
    assert "\x1b" not in html
    parsed(html)
    result = CliRunner().invoke(app, [str(write_run(SOUND, before=before, after=after))])
    assert "\x1b[31m" not in result.output


def test_page_with_broken_numbers(write_run: WriteRun) -> None:
    after = moved(adapter())
    next(iter(after.values()))[0, 0] = float("nan")
    rows = altered(kl_reg=[0.1, None, "inf", 0.2])
    report = audit_run(write_run(rows, before=adapter(), after=after))
    html = page(report)
    parsed(html)
    assert html.count('class="broken"') == 2
    assert 'class="cell bad"' in html
    written = json.dumps(document(report), allow_nan=False)
    jsonschema.validate(json.loads(written), schema())


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_every_check_is_documented_and_has_one_id() -> None:
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids))
    documented = (ROOT / "docs" / "audit.md").read_text("utf-8")
    assert [id_ for id_ in ids if f"`{id_}`" not in documented] == []


def test_json_goes_to_stdout_alone() -> None:
    result = CliRunner().invoke(app, [str(CASES / "incident"), "--json", "-"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["exit_status"] == 1


def test_output_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_report(target, "x")
    assert target.read_text() == "x"
    with pytest.raises(UnicodeEncodeError):
        write_report(target, "\ud800")
    assert target.read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    result = CliRunner().invoke(app, [str(CASES / "incident"), "--json", str(tmp_path / "nowhere" / "r.json")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_the_run_is_left_as_it_was(write_run: WriteRun) -> None:
    folder = write_run(SOUND, before=adapter(), after=moved(adapter()))
    seen = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert CliRunner().invoke(app, [str(folder)]).exit_code == 0
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == seen


def test_module_entry_and_help_without_heavy_imports() -> None:
    program = (
        "import sys, runpy; sys.argv = ['audit', '--help']\ntry: runpy.run_module('sdpo_conformance.audit',"
        " run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\nheavy = {'torch',"
        " 'transformers', 'peft', 'safetensors', 'matplotlib', 'jinja2'} & set(sys.modules)\nassert not"
        " heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout
