"""Results documents as a run leaves them, made without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdpo_conformance.matrix.cells import rows_of
from sdpo_conformance.matrix.columns import Column, Standing
from sdpo_conformance.matrix.page import page
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec

CREATED = "2026-01-02T03:04:05Z"
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def record(id: str, entry: str, status: str = "passed", **more: Any) -> dict[str, Any]:
    """One record of results.json, with the failing example where it failed."""
    found = find_spec("claas").requirements()[id]
    failure: dict[str, Any] = {}
    if status in ("failed", "expected failure"):
        name = f"{id}.py" if entry == "compute_sdpo_loss" else f"{id}-{entry}.py"
        failure = {
            "kind": "disagreement",
            "summary": "loss: expected 0.33847, got 0.06769",
            "aspect": "loss",
            "expected": "0.33847",
            "got": "0.06769",
            "detail": "",
            "probe": "values",
            "secondary": False,
            "words": "B=1 T=2 V=4 K=2, alpha=0.5 is_clip=5 kl_reg_weight=0, float32",
            "reproduction": name,
        }
    return {
        "requirement": id,
        "entry": entry,
        "level": str(found.level),
        "status": status,
        "reason": "",
        "examples": 12,
        "rejected": 0,
        "recorded": 3,
        "seconds": 0.5,
        "out_of_time": False,
        "failure": failure,
        "family": find_spec("claas").families[found.family],
        "statement": found.statement,
        "source": found.source,
        **more,
    }


def results(
    name: str = "mypkg.loss",
    statuses: Mapping[str, str] | None = None,
    entries: tuple[str, ...] = ("compute_sdpo_loss",),
    **run: Any,
) -> dict[str, Any]:
    """The document of a run through ``entries`` in which all passed but what ``statuses`` says, keyed by id or by
    ``id/entry``."""
    statuses = statuses or {}
    only = run.get("only", [])
    records = [
        record(id, entry, statuses.get(f"{id}/{entry}", statuses.get(id, "passed")))
        for entry in entries
        for id, found in find_spec("claas").requirements().items()
        if Capability(entry) in found.capabilities and (not only or found.family in only)
    ]
    must = [one for one in records if one["level"] == "MUST" and one["status"] != "not judged"]
    met = [one for one in must if one["status"] in ("passed", "unexpected pass")]
    broken = [one for one in must if one["status"] == "failed"]
    diagnosis = {
        "lines": ["dropped-importance-sampling: explains 2 of 2 failures to 1e-7"],
        "usable_for": "",
        "matches": [
            {
                "entry": "compute_sdpo_loss",
                "name": "dropped-importance-sampling",
                "kind": "defect",
                "quality": 1e-7,
                "explained": 2,
                "of": 2,
                "fix": "Multiply by the ratio.",
                "usable_for": "",
                "equivalent": [],
                "seen": [],
            }
        ],
    }
    return {
        "format": 1,
        "spec": {"name": "claas", "version": "1.0", "title": "CLaaS"},
        "implementation": name,
        "offered": list(entries),
        "claims": {"dtypes": None, "devices": None, "max_steps_per_batch": None, "expected_failures": {}},
        "run": {
            "device": "cpu",
            "device_name": "x86_64",
            "dtypes": ["float32", "bfloat16"],
            "refused_dtypes": {"float16": "it says so"},
            "profile": "quick",
            "seed": 0,
            "only": [],
            "seconds": 12.5,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            **run,
        },
        "records": records,
        "diagnosis": diagnosis if broken else None,
        "verdict": {
            "conforming": len(met) == len(must),
            "passed": not broken and not any(one["status"] == "unexpected pass" for one in records),
            "must_met": len(met),
            "must_judged": len(must),
            "should_not_met": [],
            "text": f"NOT CONFORMING: loss {len(met)}/{len(must)} MUST." if broken else "CONFORMING.",
        },
    }


def column(
    name: str = "mypkg.loss", statuses: Mapping[str, str] | None = None, version: str = "", **more: Any
) -> Column:
    """A judged column whose failures have their programs."""
    from sdpo_conformance.matrix.columns import Reproduction

    document = results(name, statuses, **more)
    programs = {
        one["failure"]["reproduction"]: Reproduction(f'"""{one["requirement"]}"""\nprint("shows it")\n', "AAEC")
        for one in document["records"]
        if one["failure"]
    }
    return Column(name, Standing.JUDGED, document["run"]["device"], version, "", document, programs)


def absent(name: str = "adapters.gone", standing: Standing = Standing.NOT_INSTALLED) -> Column:
    """A column without results."""
    message = "not installed: gone: pip install gone" if standing is Standing.NOT_INSTALLED else "no module 'gone'"
    return Column(name, standing, "cpu", message=message)


def every_status() -> list[Column]:
    """Columns that show each status at least once, one of them with hostile text in every field."""
    hostile = results("hostile" + HOSTILE, {"IS-2": "failed"})
    for one in hostile["records"]:
        if one["failure"]:
            one["failure"].update(summary=HOSTILE, aspect=HOSTILE, expected=HOSTILE, got=HOSTILE, words=HOSTILE)
    hostile["diagnosis"] = {"lines": [HOSTILE], "usable_for": "", "matches": []}
    return [
        column("reference", entries=find_spec("claas").entries),
        column("mypkg.loss", {"IS-2": "failed", "IS-6": "failed", "NUM-8": "failed"}, version="mypkg 1.2.3"),
        column("claimed", {"NUM-3": "expected failure", "NUM-4": "unexpected pass", "NUM-5": "internal error"}),
        column("unjudged", {"KL-3": "not judged"}, entries=("compute_fused_sdpo_loss",), device="cuda"),
        absent("adapters.gone"),
        absent("adapters.broken", Standing.COULD_NOT_RUN),
        Column(hostile["implementation"], Standing.JUDGED, "cpu", HOSTILE, "", hostile),
    ]


@pytest.fixture
def make_column() -> Callable[..., Column]:
    return column


@pytest.fixture
def make_absent() -> Callable[..., Column]:
    return absent


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    return results


@pytest.fixture(scope="session")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every status on it, as a file."""
    columns = every_status()
    path = tmp_path_factory.mktemp("page") / "matrix.html"
    path.write_text(page(columns, rows_of(columns), CREATED), encoding="utf-8")
    return path
