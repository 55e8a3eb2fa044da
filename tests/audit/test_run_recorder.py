"""The live record: what it leaves behind is audited as any run, and what it warns of is there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.run_recorder import RunRecorder, RunWarning

from .parts import SOUND

pytest.importorskip("transformers")
pytest.importorskip("peft")

from .training import tiny_model, with_adapter


def record(folder: Path, rows: Any = SOUND, **options: Any) -> list[str]:
    said: list[str] = []
    with RunRecorder(folder, warn=said.append, **options) as recorder:
        for row in rows:
            recorder.step({key: value for key, value in row.items() if key != "step"})
    return said


def test_a_sound_record_says_nothing_and_is_audited(tmp_path: Path) -> None:
    assert record(tmp_path, [*SOUND, *({**row, "total_loss": row["total_loss"] * 0.9, "distill_loss": row[
        "distill_loss"] * 0.9, "kl_reg": row["kl_reg"] * 0.9} for row in SOUND)], steps_per_batch=4) == []  # fmt: skip
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert report.evidence.metrics is not None
    assert [len(batch.steps) for batch in report.evidence.metrics.batches] == [4, 4]


def test_the_second_step_warns_of_a_ratio_that_stays_away_from_one(tmp_path: Path) -> None:
    said: list[str] = []
    with RunRecorder(tmp_path, warn=said.append, steps_per_batch=4) as recorder:
        recorder.step({**SOUND[0], "mean_is_ratio": torch.tensor(1.0)})
        assert said == []
        told = recorder.step({**SOUND[1], "mean_is_ratio": 1.08})
    assert list(told) == said
    assert "not refreshed" in said[0]
    assert "step 2" in said[0]


def test_the_second_step_warns_of_the_same_log_probs(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    old = torch.randn(2, 5)
    recorder = RunRecorder(tmp_path, model, steps_per_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.step({"loss": 0.5}, old_logprobs=old)  # the weights did not move: the same ones are right
        recorder.step({"loss": 0.4}, old_logprobs=[*old])
    for number in (3, 4):
        model.weight.data += 0.1
        if number == 3:
            recorder.step({"loss": 0.5}, old_logprobs=old)  # a batch's first
        else:
            with pytest.warns(RunWarning, match=r"step 4: .* are not refreshed"):
                recorder.step({"loss": 0.4}, old_logprobs=old.clone())
    recorder.close()


def test_metrics_that_stand_still_and_a_dead_run(tmp_path: Path) -> None:
    assert any("identical" in text for text in record(tmp_path / "a", [*SOUND[:3], SOUND[2]], steps_per_batch=4))
    dead = [{**row, "total_loss": 0.0, "grad_norm": float("nan")} for row in SOUND]
    assert any("dead" in text for text in record(tmp_path / "b", dead))


def test_adapters_are_kept_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    model = with_adapter(tiny_model())
    for number in (1, 3):  # two processes: the second goes on where the first one ended
        with RunRecorder(tmp_path, model, settings={"learning_rate": 1e-2}) as recorder:
            for step in (number, number + 1):
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter += 1e-3
                recorder.step({"loss": 1 / step, "skipped": False, "note": "x"})
    report = audit_run(tmp_path)
    assert [finding.id for finding in report.findings] == []
    assert report.evidence.change is not None
    assert report.evidence.change.max_abs_delta == pytest.approx(4e-3, rel=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "training.json").read_text()) == {"learning_rate": 1e-2}


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps_per_batch must be at least 1"):
        RunRecorder(tmp_path, steps_per_batch=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be written"):
        RunRecorder(tmp_path / "file" / "run")


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(6) + index
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("refreshed", [True, False])
def test_the_callback_in_a_trainer(refreshed: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    import transformers

    from sdpo_conformance.audit.trainer_callback import AuditCallback

    callback = AuditCallback(tmp_path / "run", steps_per_batch=4)
    first: list[torch.Tensor] = []

    class SelfDistilling(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(**inputs)
            first.append(output.logits.detach().log_softmax(-1).amax(-1))
            callback.old_logprobs(first[-1] if refreshed else first[0])
            return output.loss

    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to=[],
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, logging_strategy="steps",
    )  # fmt: skip
    trainer = SelfDistilling(with_adapter(tiny_model()), arguments, train_dataset=Rows(), callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if issubclass(w.category, RunWarning)]
    assert [text[:6] for text in said] == ([] if refreshed else ["step 2"])
    report = audit_run(tmp_path / "run")
    assert report.findings == ()
    assert report.evidence.metrics is not None
    assert len(report.evidence.metrics.steps) == 4
    assert report.evidence.change is not None
    assert report.evidence.change.moved > 0
