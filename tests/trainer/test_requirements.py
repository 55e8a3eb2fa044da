"""The STEP requirements themselves: each defect is named by its requirement, every sound trainer passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.programs import Programs
from variants import DEFECTIVE, SOUND

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec

STEPS = [found for found in find_spec("claas").requirements().values() if found.family == "STEP"]
MUSTS = [found for found in STEPS if found.level == "MUST"]


def subject_of(distill: Callable[..., Any], claims: Claims | None = None, dtype: str = "float32") -> Subject:
    implementation = SimpleNamespace(distill=distill)
    return Subject(implementation, Capability.DISTILL, claims or Claims(), PROFILES["default"], dtypes=(dtype,))


def failures(subject: Subject) -> dict[str, Exception]:
    found: dict[str, Exception] = {}
    for requirement in MUSTS:
        try:
            subject.run(requirement)
        except (Disagreement, ImplementationError) as error:
            found[requirement.id] = error
    return found


REPRODUCED = {
    "no refresh",
    "metrics of the last sample",
    "base weight trained",
    "adapter restored at the end",
    "accepts anything",
}
"""Defects, one of each probe, whose failure is shown by the program that it leaves."""


@pytest.mark.parametrize("name", DEFECTIVE)
def test_defect_is_named_by_its_requirement(name: str, tmp_path: Path, trainer_programs: Programs) -> None:
    requirement_id, distill = DEFECTIVE[name]
    found = find_spec("claas").requirements()[requirement_id]
    with pytest.raises(Disagreement) as raised:
        subject_of(distill).run(found)
    if name not in REPRODUCED:
        return
    (tmp_path / "wrong.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from variants import DEFECTIVE, SOUND\n"
        f"distill = DEFECTIVE[{name!r}][1]\n"
    )
    program = raised.value.extra["reproduction"](tmp_path, found, str(tmp_path / "wrong.py"), "cpu")
    shown = trainer_programs.run(program)
    assert shown.returncode == 1, shown.stderr
    assert "no disagreement" not in shown.stdout
    (tmp_path / "wrong.py").write_text((tmp_path / "wrong.py").read_text() + "distill = SOUND['as it is']\n")
    # by a process of its own, as a user runs it
    mended = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert mended.returncode == 0, mended.stdout + mended.stderr


JUDGED_ELSEWHERE = {
    "asks_the_embedding": ("AttributeError", "with an adapter on the embedding: judged without that adapter"),
    "knows_no_gpt2": ("AttributeError", "on gpt2: judged on llama in its place"),
    "boolean_mask": ("boolean mask", "masks by it, and on llama for gemma2, which has no sdpa"),
}
"""Sound trainers that are judged on other models than the scenarios', and what the note says of why and where."""


@pytest.mark.parametrize("name", SOUND)
def test_sound_trainer_passes(name: str) -> None:
    subject = subject_of(SOUND[name])
    assert failures(subject) == {}
    if name in JUDGED_ELSEWHERE:
        why, where = JUDGED_ELSEWHERE[name]
        subject.run(find_spec("claas").requirements()["STEP-1"])  # its runs are kept
        assert why in subject.tally.note
        assert subject.tally.note.endswith(where)


@pytest.mark.parametrize("name", ["as it is", "checkpointed", "own_optimizer"])
def test_sound_trainer_passes_in_bfloat16(name: str) -> None:
    assert failures(subject_of(SOUND[name], dtype="bfloat16")) == {}


@pytest.mark.parametrize("name", ["no ratio", "no refresh", "teacher with the adapter on"])
def test_defect_is_named_in_bfloat16(name: str) -> None:
    requirement_id, distill = DEFECTIVE[name]
    with pytest.raises(Disagreement, match="the gradient is the one of"):
        subject_of(distill, dtype="bfloat16").run(find_spec("claas").requirements()[requirement_id])


@pytest.mark.parametrize("name", ["no refresh", "teacher with the adapter on", "recorded log-probs ignored"])
def test_defect_is_named_without_the_recording_optimizer(name: str) -> None:
    requirement_id, distill = DEFECTIVE[name]

    def own_optimizer(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        return distill(model, samples, training, torch.optim.AdamW)

    subject = subject_of(own_optimizer)
    with pytest.raises(Disagreement, match="the run is the one of"):
        subject.run(find_spec("claas").requirements()[requirement_id])
    assert "could not be observed" in subject.tally.note


def one_step_only(refuses: bool) -> Callable[..., Any]:
    """A trainer without the ratio, for one step per batch."""
    no_ratio = DEFECTIVE["no ratio"][1]

    def distill(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        if refuses and training.steps_per_batch > 1:
            raise ValueError("one step per batch only")
        return no_ratio(model, samples, training, optimizer_cls)

    return distill


def test_one_step_claim_is_judged_on_policy_only() -> None:
    subject = subject_of(one_step_only(refuses=True), Claims(max_steps_per_batch=1))
    for requirement in MUSTS:
        if requirement.id in ("STEP-2", "STEP-3"):
            with pytest.raises(pytest.skip.Exception, match="steps_per_batch up to 1 only"):
                subject.run(requirement)
        else:
            subject.run(requirement)


def test_one_step_claim_must_be_kept() -> None:
    subject = subject_of(one_step_only(refuses=False), Claims(max_steps_per_batch=1))
    with pytest.raises(Disagreement, match="steps_per_batch = 2, claimed at most 1"):
        subject.run(find_spec("claas").requirements()["STEP-11"])


def crash(*_: Any) -> Any:
    raise RuntimeError("out of memory")


def leave(*_: Any) -> Any:
    sys.exit(3)


@pytest.mark.parametrize("distill", [crash, leave, lambda *_: None, lambda *_: {"per_step_metrics": 3}])
def test_what_does_not_deliver_is_an_error_not_a_crash(distill: Callable[..., Any]) -> None:
    with pytest.raises(ImplementationError):
        subject_of(distill).run(find_spec("claas").requirements()["STEP-1"])
