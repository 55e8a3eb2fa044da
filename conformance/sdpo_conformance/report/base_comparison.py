"""What changed since an earlier report: newly failing, repaired, no longer judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.records import Status

BAD = (Status.FAILED, Status.UNEXPECTED_PASS)
JUDGED = (Status.PASSED, Status.FAILED, Status.EXPECTED_FAILURE, Status.UNEXPECTED_PASS)
MET = (Status.PASSED, Status.UNEXPECTED_PASS)


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or the one in the folder of a run; raises ValueError with one line where there is none."""
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{file} is no JSON; expected a results.json of this suite") from None
    if not isinstance(content, dict) or not {"format", "records", "verdict", "run"} <= set(content):
        raise ValueError(f"{file} is not a results.json of this suite")
    if content["format"] != 1:
        raise ValueError(f"{file} has format {content['format']!r}, expected 1: judge it anew")
    content.setdefault("spec", {"name": "claas", "version": "1.0", "title": "CLaaS"})
    return content


def compared(base: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each kind of change, none where nothing changed."""
    before = {(one["requirement"], one["entry"]): one["status"] for one in base["records"]}
    after = {(one["requirement"], one["entry"]): one["status"] for one in now["records"]}
    newly = [key for key, status in after.items() if status in BAD and before.get(key) not in BAD and key in before]
    unseen = [key for key, status in after.items() if status in BAD and key not in before]
    repaired = [key for key, status in after.items() if status in MET and before.get(key) == Status.FAILED]
    lost = [key for key, status in before.items() if status in JUDGED and after.get(key) not in JUDGED]
    kinds = {
        "newly failing": newly,
        "failing, not judged in the base": unseen,
        "repaired": repaired,
        "no longer judged": lost,
    }
    return [f"{ids(found)} {words}" for words, found in kinds.items() if found]


def ids(keys: list[tuple[str, str]]) -> str:
    """The requirements of these records, each once."""
    return ", ".join(dict.fromkeys(requirement for requirement, _ in keys))


def failed_last(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The requirements that failed in a report."""
    return tuple(dict.fromkeys(one["requirement"] for one in results["records"] if one["status"] in BAD))
