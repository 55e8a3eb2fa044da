"""What an implementation does costs it the requirement, never the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.implementation import load_implementation
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec

RIGHT = "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"


def written(folder: Path, source: str, profile: str) -> Subject:
    """A loss written as by a user, to be judged in this process."""
    (folder / "mine.py").write_text(RIGHT + textwrap.dedent(source))
    found = load_implementation(str(folder / "mine.py"), find_spec("claas"))
    return Subject(found.object, Capability.LOSS, found.claims, PROFILES[profile], dtypes=find_spec("claas").dtypes)


def failure(report: Any, requirement: str = "IS-2") -> str:
    return next(r["failure"]["summary"] for r in report.failures if r["requirement"] == requirement)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('no kernel image')", "raised RuntimeError: no kernel image"),
        ("return None", "returned a NoneType, expected a mapping"),
        ("return {'loss': 1.0}", "expected a tensor to differentiate"),
        ("return {**right(i), 'loss': right(i)['loss'].detach()}", "carries no graph"),
        ("return {**right(i), 'loss': right(i)['loss'].expand(2)}", "expected 0-dim"),
        ("return {**right(i), 'loss': right(i)['loss'] * float('nan')}", "got nan"),
    ],
)
def test_misbehaviour_is_a_finding(tmp_path: Path, body: str, words: str) -> None:
    subject = written(tmp_path, f"def compute_sdpo_loss(i):\n    {body}\n", "quick")
    with pytest.raises((Disagreement, ImplementationError), match=re.escape(words)):
        subject.run(find_spec("claas").requirements()["IS-2"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit(3)", "called sys.exit: 3"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    ],
)
def test_what_would_end_the_process_is_a_verdict(judge: Any, body: str, words: str) -> None:
    report = judge(f"def compute_sdpo_loss(i):\n    {body}\n", only=["IS-2"])
    assert report.exit_status == 1
    assert words in failure(report)


def test_threads_that_never_end_and_another_folder_change_nothing(judge: Any) -> None:
    report = judge(
        """
        import os, threading, time
        def forever():
            time.sleep(1000)
        def compute_sdpo_loss(i):
            os.chdir("/")
            if threading.active_count() < 4:
                threading.Thread(target=forever).start()
            return right(i)
        """,
        only=["IS-2"],
    )
    assert report.exit_status == 0, report


def test_crashes_and_hangs_cost_one_requirement_each(judge: Any) -> None:
    report = judge(
        """
        import os, time, ctypes
        def compute_sdpo_loss(i):
            if float(i.training.kl_reg_weight) and float(i.training.alpha) == 0.0:
                time.sleep(1000)                                  # KL-4 draws alpha = 0 with an anchor
            if i.student_logits.shape[1] == 0:
                os._exit(9)                                       # NUM-8
            if i.response_mask.double().sum() == 0:
                ctypes.string_at(0)                               # RED-3: a segfault
            return right(i)
        """,
        only=["KL-4", "RED-3", "NUM-8", "IS-1"],
        call_timeout=6,
    )
    status = {record["requirement"]: record["status"] for record in report.results["records"]}
    assert status == {"KL-4": "failed", "RED-3": "failed", "NUM-8": "failed", "IS-1": "passed"}
    assert "did not return within" in failure(report, "KL-4")
    assert "Segmentation fault" in failure(report, "RED-3")
    assert "ended the process" in failure(report, "NUM-8")
    hung = next(r["failure"] for r in report.failures if r["requirement"] == "KL-4")
    assert "alpha=0" in hung["words"]
    assert (report.folder / hung["reproduction"]).exists()
    crashed = next(r["failure"] for r in report.failures if r["requirement"] == "RED-3")
    program = [sys.executable, str(report.folder / crashed["reproduction"])]
    assert subprocess.run(program, capture_output=True, timeout=120, check=False).returncode == 1


def test_an_input_that_ends_the_process_at_once_is_shown(judge: Any) -> None:
    report = judge("import os\ndef compute_sdpo_loss(i):\n    os._exit(0)\n", only=["IS-1"])
    found = report.failures[0]["failure"]
    assert found["words"].startswith("B=")
    assert (report.folder / found["reproduction"]).exists()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("raise ValueError('K is above 1024')", True),
        ("raise IndexError('K is above 1024')", False),
        ("i.teacher_logprobs[..., 1024:] = -50.0", False),
    ],
)
def test_a_support_above_1024_may_be_refused_but_not_answered_wrong(tmp_path: Path, answer: str, right: bool) -> None:
    body = f"""
        def compute_sdpo_loss(i):
            if i.teacher_indices.shape[-1] > 1024:
                {answer}
            return right(i)
        """
    allowed = nullcontext() if right else pytest.raises((Disagreement, ImplementationError))
    with allowed:
        written(tmp_path, body, "default").run(find_spec("claas").requirements()["GJS-1"])


def test_modified_inputs_and_missing_keys(judge: Any) -> None:
    report = judge(
        """
        def compute_sdpo_loss(i):
            result = right(i)
            result.pop("clip_fraction")
            i.old_student_logprobs.add_(1)
            return result
        """,
        only=["GRAD-3", "RED-6", "RED-3"],
    )
    assert "no clip_fraction" in failure(report, "RED-6")
    assert "old_student_logprobs after the call" in failure(report, "GRAD-3")
    assert {r["requirement"] for r in report.failures} == {"GRAD-3", "RED-6"}


def test_expected_failures_are_strict(judge: Any) -> None:
    report = judge(
        """
        SDPO_CLAIMS = {"dtypes": ["float32"], "expected_failures": {"IS-2": "no ratio yet", "IS-1": "surely fails"}}
        def compute_sdpo_loss(i):
            i.old_student_logprobs = right.__globals__["torch"].zeros_like(i.old_student_logprobs) + 0 * 1
            from types import SimpleNamespace
            chosen = i.student_logits.float().log_softmax(-1).gather(-1, i.response_ids.long()[..., None])[..., 0]
            return right(SimpleNamespace(**{**vars(i), "old_student_logprobs": chosen.detach()}))
        """,
        only=["IS-1", "IS-2", "GJS-1"],
    )
    status = {record["requirement"]: record["status"] for record in report.results["records"]}
    assert status == {"IS-1": "unexpected pass", "IS-2": "expected failure", "GJS-1": "passed"}
    assert report.exit_status == 1
    assert "UNEXPECTED PASS: IS-1 passed although a failure is expected" in str(report)


def test_only_claimed_failures_end_with_status_0_but_do_not_conform(judge: Any) -> None:
    report = judge(
        """
        SDPO_CLAIMS = {"expected_failures": {"RED-3": "empty batches never reach us"}}
        def compute_sdpo_loss(i):
            if i.response_mask.double().sum() == 0:
                raise ValueError("empty batch")
            return right(i)
        """,
        only=["RED-3", "IS-1"],
    )
    assert report.exit_status == 0
    assert not report.conforming
    assert "FAILS ONLY WHAT IT CLAIMS TO FAIL (RED-3)" in str(report)


def test_a_clear_refusal_of_a_dtype_is_no_failure(judge: Any) -> None:
    report = judge(
        """
        import torch
        def compute_sdpo_loss(i):
            if i.student_logits.dtype == torch.float16:
                raise TypeError("float16 is not supported, use bfloat16")
            return right(i)
        """,
        only=["NUM-2", "IS-2"],
    )
    assert report.exit_status == 0
    assert report.results["run"]["dtypes"] == ["float32", "bfloat16"]
    assert "float16 is not supported" in report.results["run"]["refused_dtypes"]["float16"]


def test_a_wrong_half_precision_path_is_found(judge: Any) -> None:
    report = judge(
        """
        import torch
        from types import SimpleNamespace
        def compute_sdpo_loss(i):
            if i.student_logits.dtype == torch.bfloat16:
                i = SimpleNamespace(**{**vars(i), "training": SimpleNamespace(
                    alpha=i.training.alpha, is_clip=1e9, kl_reg_weight=i.training.kl_reg_weight)})
            return right(i)
        """,
        only=["IS-5"],
    )
    assert {r["requirement"] for r in report.failures} == {"IS-5"}
    assert "bfloat16" in report.failures[0]["failure"]["words"]


def test_results_are_plain_json(judge: Any) -> None:
    report = judge(
        "def compute_sdpo_loss(i):\n    return {**right(i), 'loss': right(i)['loss'] * float('inf')}\n", only=["IS-1"]
    )
    text = (report.folder / "results.json").read_text()
    assert json.loads(text) == dict(report.results)
    assert "NaN" not in text.replace('"', "")


def test_a_failure_of_the_suite_itself_is_no_verdict() -> None:
    from sdpo_conformance.judging.implementation import Implementation
    from sdpo_conformance.judging.records import Record, Status
    from sdpo_conformance.protocol import Claims
    from sdpo_conformance.report.results import verdict
    from sdpo_conformance.specs.requirement import Level

    records = [
        Record("IS-1", "compute_sdpo_loss", Level.MUST, Status.PASSED),
        Record("IS-2", "compute_sdpo_loss", Level.MUST, Status.INTERNAL_ERROR, reason="ValueError: a bug of ours"),
    ]
    implementation = Implementation("mine", object(), (Capability.LOSS,), Claims())
    found = verdict(implementation, find_spec("claas"), records, None)
    assert not found["conforming"]
    assert not found["passed"]
    assert found["text"].startswith("NO VERDICT: the suite itself failed on IS-2")


def test_a_slow_implementation_gets_fewer_examples_and_no_accusation(
    judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = judge(
        """
        import time
        SDPO_CLAIMS = {"dtypes": ["bfloat16"]}
        def compute_sdpo_loss(i):
            time.sleep(1.0)
            return right(i)
        """,
        only=["NUM-2", "IS-10"],
        jobs=2,  # they sleep
    )
    assert report.exit_status == 0, str(report)
    assert all(record["out_of_time"] for record in report.results["records"])


def test_what_could_not_be_judged_is_no_part_of_what_holds() -> None:
    from sdpo_conformance.judging.implementation import Implementation
    from sdpo_conformance.judging.records import Record, Status
    from sdpo_conformance.protocol import Claims
    from sdpo_conformance.report.results import verdict
    from sdpo_conformance.specs.requirement import Level

    spec, offered = find_spec("claas"), (Capability.LOSS, Capability.DISTILL)
    implementation = Implementation("mine", None, offered, Claims())
    records = [
        Record("IS-1", Capability.LOSS.value, Level.MUST, Status.PASSED),
        *(
            Record(f"STEP-{number}", Capability.DISTILL.value, Level.MUST, Status.NOT_JUDGED, "needs transformers")
            for number in (1, 2, 3)
        ),
    ]
    whole = verdict(implementation, spec, records, None)["text"]
    assert whole == "CONFORMING to CLaaS 1.0: loss 1/1 MUST. Not judged: STEP-1 and 2 more (needs transformers)."
    part = verdict(implementation, spec, records, None, {"only": ["STEP", "IS-1"]})
    assert part["scope"] == "only IS-1"
    assert part["text"].startswith("Only IS-1 of CLaaS 1.0 holds: loss 1/1 MUST. ")
