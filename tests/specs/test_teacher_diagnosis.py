"""An EMA teacher's mistake is named by what the rules of updates find, and by nothing less."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.reproduction.failure import failure_of
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.shared.teacher_diagnosis import diagnose_teacher
from sdpo_conformance.specs.shared.wrong_teachers import average

TEACHERS = importlib.import_module(f"{find_spec('trl').package}.defects").TEACHERS
ENTRY = Capability.UPDATE_TEACHER


def said(update: Any, folder: Path, seed: int = 3) -> list[str]:
    """The names that an update gets, judged by every rule with another seed than the usual one."""
    spec = find_spec("trl")
    failed, held = [], []
    for rule in (one for one in spec.requirements().values() if ENTRY in one.capabilities):
        implementation = SimpleNamespace(update_teacher=update())
        subject = Subject(implementation, ENTRY, Claims(), PROFILES["quick"], seed, dtypes=spec.dtypes, spec=spec)
        try:
            subject.run(rule)
            held.append(rule.id)
        except Disagreement as found:
            failure = failure_of(folder, "defect:x", "cpu", spec, rule, ENTRY, found)
            failed.append(Record(rule.id, ENTRY.value, rule.level, Status.FAILED, failure=failure))
    answer = diagnose_teacher(failed, held, spec, TEACHERS)
    return [] if answer is None else [answer[1]["name"], *answer[1]["equivalent"]]


@pytest.mark.parametrize("defect", TEACHERS, ids=lambda one: str(one.name))
def test_each_is_named(defect: Any, tmp_path: Path) -> None:
    assert defect.name in said(defect.make, tmp_path)


def test_another_mistake_is_not(tmp_path: Path) -> None:
    assert said(lambda: lambda teacher, student, rate: average(teacher, student, rate / 2), tmp_path) == []
