"""A reproduction really reproduces: without the harness, on the defect; and no longer once it is mended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.programs import Programs, Ran

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.implementation import load_implementation
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction.failure import failure_of
from sdpo_conformance.reproduction.program import PROGRAMS
from sdpo_conformance.sharded import reproduce_on_ranks
from sdpo_conformance.specs import find_spec

DEFECTS = {
    "values": ("IS-2", "    i.old_student_logprobs = chosen(i)\n    return right(i)\n"),
    "unmodified": ("GRAD-3", "    result = right(i)\n    i.base_logprobs.add_(1)\n    return result\n"),
    "types": ("RED-6", "    return {**right(i), 'kl_reg': None}\n"),
    "raises": ("RED-3", "    assert i.response_mask.double().sum() > 0, 'empty'\n    return right(i)\n"),
    "old_gradient": (
        "IS-7",
        "    result = right(i)\n    result['loss'] = result['loss'] + 0 * i.old_student_logprobs.sum() + "
        "(i.old_student_logprobs.sum() - i.old_student_logprobs.detach().sum())\n    return result\n",
    ),
    "no_grad": (
        "GRAD-6",
        "    result = right(i)\n    if not torch.is_grad_enabled():\n        result['loss'] = result['loss'] * 2 + 1\n"
        "    return result\n",
    ),
    "two_graphs": (
        "GRAD-5",
        "    result = right(i)\n    return {**result, 'kl_reg': BUFFER.copy_(result['kl_reg'])}\n",
    ),
    "two_graphs, options of the latest call": (
        "GRAD-5",
        "    result, own = right(i), i.training.kl_reg_weight\n    LATEST[0] = own\n"
        "    result['loss'].register_hook(lambda g: g * (1 + LATEST[0] - own))\n    return result\n",
    ),
    "from_model": (
        "GRAD-4",
        "    result = right(i)\n    if i.student_logits.is_leaf:\n        return result\n"
        "    return {**result, 'loss': result['loss'] * 2}\n",
    ),
    "after_error": (
        "GRAD-5",
        "    if i.teacher_logprobs is None:\n        BUFFER.fill_(1)\n    wrong = bool(BUFFER)\n    result = right(i)\n"
        "    BUFFER.zero_()\n    return {**result, 'loss': result['loss'] * 2} if wrong else result\n",
    ),
    "after_evaluation": (
        "GRAD-6",
        "    shape = tuple(i.student_logits.shape)\n    if not torch.is_grad_enabled():\n        KEPT.add(shape)\n"
        "    wrong = shape in KEPT and shape[1] == 6 and torch.is_grad_enabled()\n    result = right(i)\n"
        "    return {**result, 'loss': result['loss'] * 2} if wrong else result\n",
    ),
    "repeat": (
        "GRAD-7",
        "    result = right(i)\n    return {**result, 'loss': result['loss'] * (1 + 1e-3 * torch.rand(()))}\n",
    ),
}
ON_RANKS = Path(reproduce_on_ranks.__file__)
RIGHT = "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
PRELUDE = """
import torch
BUFFER = torch.zeros(())
KEPT = set()
LATEST = [0.0]
def chosen(i):
    return i.student_logits.detach().float().log_softmax(-1).gather(-1, i.response_ids.long()[..., None])[..., 0]
def compute_sdpo_loss(i):
"""


@pytest.mark.parametrize("probe", DEFECTS)
def test_reproduces_and_is_silent_once_mended(probe: str, tmp_path: Path, programs: Programs) -> None:
    requirement, body = DEFECTS[probe]
    target, spec = tmp_path / "mine.py", find_spec("claas")
    target.write_text(RIGHT + PRELUDE + body)
    judged = load_implementation(str(target), spec)
    subject = Subject(judged.object, Capability.LOSS, judged.claims, PROFILES["quick"], dtypes=spec.dtypes)
    found = spec.requirements()[requirement]
    with pytest.raises((Disagreement, ImplementationError)) as raised:
        subject.run(found)
    failure = failure_of(tmp_path, str(target), "cpu", spec, found, Capability.LOSS, raised.value)
    assert failure["probe"] in (probe.partition(",")[0], "inference_mode")
    program = tmp_path / failure["reproduction"]
    assert "sdpo_conformance" not in program.read_text().replace("sdpo_conformance import", "")
    shown = programs.run(program)
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert shown.stdout.strip()
    (tmp_path / "mine.py").write_text("from sdpo_implementations.reference.loss import compute_sdpo_loss\n")
    mended = programs.run(program)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "the defect is gone" in mended.stdout
    (tmp_path / "mine.py").write_text("import sys\nsys.exit('no licence')\n")
    could_not_run(programs.run(program), "SystemExit: no licence")
    program.with_suffix(".safetensors").unlink()
    (tmp_path / "mine.py").write_text("def compute_sdpo_loss(i): ...\n")
    could_not_run(programs.run(program), "No such file")


def could_not_run(ran: Ran, words: str) -> None:
    """Status 1 would say that the defect is there."""
    assert ran.returncode == 125, ran.stdout + ran.stderr
    assert ran.stderr.startswith("could not run: ")
    assert words in ran.stderr


@pytest.mark.parametrize("program", [*sorted(PROGRAMS.glob("[!_]*.py")), ON_RANKS], ids=lambda path: path.stem)
def test_without_torch_it_could_not_run(program: Path) -> None:
    command = [sys.executable, "-S", "-I", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    could_not_run(Ran(done.returncode, done.stdout, done.stderr), "No module named")


def test_a_process_that_ends_is_told_from_a_call_that_returns(tmp_path: Path, programs: Programs) -> None:
    target, spec = tmp_path / "mine.py", find_spec("claas")
    case = spec.parts.ordinary("float32", Capability.LOSS)
    error = ImplementationError("ended the process")
    error.probe, error.case = "ends", case
    found = failure_of(tmp_path, str(target), "cpu", spec, spec.requirements()["IS-1"], Capability.LOSS, error)
    program = tmp_path / found["reproduction"]
    target.write_text("import os\ndef compute_sdpo_loss(i):\n    os._exit(0)\n")
    assert programs.run(program).returncode == 1
    target.write_text("from sdpo_implementations.reference.loss import compute_sdpo_loss\n")
    assert programs.run(program).returncode == 0
