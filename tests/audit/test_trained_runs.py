"""Runs that really were trained: a sound one, and one for each fault, told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings import Severity

from .training import TRAINING, Faults, leave_behind, tiny_model


def alarms(folder: Path, **named: object) -> dict[str, Severity]:
    report = audit_run(folder, **named)  # type: ignore[arg-type]
    return {finding.id: finding.severity for finding in report.findings}


@pytest.mark.parametrize("mismatch", [0.0, 0.3])
@pytest.mark.parametrize("settings", [True, False])
def test_sound_run(tmp_path: Path, mismatch: float, settings: bool) -> None:
    assert alarms(leave_behind(tmp_path, mismatch=mismatch, settings=settings)) == {}


def test_sound_run_of_the_bundled_reference(tmp_path: Path) -> None:
    from sdpo_implementations.reference.trainer import distill

    assert alarms(leave_behind(tmp_path, trainer=distill, mismatch=0.3), sampler="differs") == {}


def test_sound_single_step(tmp_path: Path) -> None:
    assert alarms(leave_behind(tmp_path, training=replace(TRAINING, steps_per_batch=1))) == {}


def test_sound_run_at_the_default_learning_rate(tmp_path: Path) -> None:
    assert alarms(leave_behind(tmp_path, training=replace(TRAINING, learning_rate=3e-5))) == {}


def test_sound_run_with_a_low_cap(tmp_path: Path) -> None:
    for cap in (1.0, 0.8):
        folder = tmp_path / str(cap)
        folder.mkdir()
        assert alarms(leave_behind(folder, training=replace(TRAINING, is_clip=cap), settings=False)) == {}


@pytest.mark.parametrize("rate", [5e-3, 3e-5])
@pytest.mark.parametrize("mismatch", [0.0, 0.3])
def test_no_refresh(tmp_path: Path, rate: float, mismatch: float) -> None:
    training = replace(TRAINING, learning_rate=rate)
    found = alarms(leave_behind(tmp_path, Faults(refresh=False), training=training, mismatch=mismatch))
    assert set(found) == {"behaviour-not-refreshed"}
    assert found["behaviour-not-refreshed"] is not Severity.NOTE


def test_stale_logits(tmp_path: Path) -> None:
    found = alarms(leave_behind(tmp_path, Faults(stale_from=3, refresh=True)))
    assert found["stale-metrics"] is Severity.ERROR


def test_the_incident_trained(tmp_path: Path) -> None:
    """No refresh and a loss on cached state: what the incident did."""
    found = alarms(leave_behind(tmp_path, Faults(stale_from=3, refresh=False)))
    assert found["stale-metrics"] is Severity.ERROR
    assert "behaviour-not-refreshed" in found


def test_dropped_ratio(tmp_path: Path) -> None:
    folder = leave_behind(tmp_path, Faults(ratio=False), mismatch=0.3)
    assert alarms(folder) == {}  # nothing in these files shows it ...
    assert alarms(folder, sampler="differs") == {"ratio-dropped": Severity.ERROR}  # ... but this knowledge does


def test_anchor_with_the_wrong_sign(tmp_path: Path) -> None:
    for settings in (True, False):
        folder = tmp_path / str(settings)
        folder.mkdir()
        found = alarms(leave_behind(folder, Faults(anchor_sign=-1.0), settings=settings))
        assert found["loss-not-sum"] is Severity.ERROR


def test_update_that_was_not_saved(tmp_path: Path) -> None:
    assert alarms(leave_behind(tmp_path, Faults(saves_update=False))) == {"weights-unchanged": Severity.ERROR}


def test_modules_left_out_of_the_optimizer(tmp_path: Path) -> None:
    found = alarms(leave_behind(tmp_path, Faults(frozen=frozenset({"v_proj"}))))
    assert found == {"modules-untouched": Severity.WARNING}


# --- with the model at hand: step 1 again
# --------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("mismatch", [0.0, 0.3])
def test_replay_of_a_sound_run(tmp_path: Path, base: Path, mismatch: float) -> None:
    (tmp_path / "run").mkdir()
    report = audit_run(leave_behind(tmp_path / "run", mismatch=mismatch), model=base, max_new_tokens=8, device="cpu")
    assert {"replay-ratio", "replay-kl", "ratio-dropped"}.isdisjoint(f.id for f in report.findings)
    replay, metrics = report.evidence.replay, report.evidence.metrics
    assert replay is not None
    assert metrics is not None
    assert replay.mean_is_ratio == pytest.approx(metrics.steps[0].values["mean_is_ratio"], rel=1e-5)
    assert replay.kl_reg == pytest.approx(metrics.steps[0].values["kl_reg"], rel=1e-4)
    assert report.evidence.sampler == ("differs" if mismatch else "same")


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(ratio=False), "ratio-dropped"),
        (Faults(recorded=False), "replay-ratio"),
        (Faults(shift=1), "replay-ratio"),
        (Faults(anchor_to="start"), "replay-kl"),
    ],
)
def test_replay_tells_faults_that_the_files_hide(tmp_path: Path, base: Path, faults: Faults, expected: str) -> None:
    (tmp_path / "run").mkdir()
    folder = leave_behind(tmp_path / "run", faults, mismatch=0.5)
    assert expected not in alarms(folder)
    assert alarms(folder, model=base, max_new_tokens=8, device="cpu")[expected] is Severity.ERROR
