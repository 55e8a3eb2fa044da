"""What the checkpoints of one run say together: weights that came back, an adapter begun anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run

from .parts import adapter
from .test_run_layouts import put

Tensors = dict[str, torch.Tensor]
RATE = 1e-3


def found(folder: Path) -> dict[str, str]:
    return {finding.id: finding.severity.value for finding in audit_run(folder).alarms}


def state(steps: float, seed: int = 7) -> Tensors:
    """The adapter after so many AdamW steps in the same direction, from a lora_B of zero."""
    generator = torch.Generator().manual_seed(seed)
    signs = {key: torch.randn(value.shape, generator=generator).sign() for key, value in adapter().items()}
    return {k: (v if "lora_A" in k else 0 * v) + 0.8 * RATE * steps * signs[k] for k, v in adapter().items()}


def log(folder: Path, steps: int, **more: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(steps, 2, generator=generator, dtype=torch.float64).tolist()
    rows = [
        {"step": n, "loss": a, "grad_norm": b, "learning_rate": RATE, "epoch": n / 10, **more}
        for n, (a, b) in enumerate(noise, 1)
    ]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def series(folder: Path, states: Mapping[int, Tensors], name: str = "iter_{:07d}") -> Path:
    for number, tensors in states.items():
        put(folder / name.format(number), tensors)
    log(folder, max(states))
    return folder


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({4: 4, 8: 8, 12: 12, 13: 1, 20: 8.5}, {"adapter-fell-back": "warning"}),
        ({4: 4, 8: 8, 12: 12, 13: 13, 20: 20}, {}),
        ({4: 4, 8: 8, 12: 12, 13: 9}, {}),  # no more than a batch that pulls back
        ({2: 2, 4: 1}, {}),  # two updates can take back what two have done
    ],
)
def test_older_weights_that_come_back(states: Mapping[int, float], expected: dict[str, str], tmp_path: Path) -> None:
    assert found(series(tmp_path, {n: state(s) for n, s in states.items()})) == expected


def test_who_falls_on_purpose(tmp_path: Path) -> None:
    states = {4: state(4), 8: state(8), 12: state(12), 13: state(1)}
    series(tmp_path / "relora", states)
    (tmp_path / "relora" / "config.yml").write_text("relora_steps: 12\n")
    assert found(tmp_path / "relora") == {}
    assert found(series(tmp_path / "epochs", states, "epoch_{}")) == {}


def test_a_run_that_began_again(tmp_path: Path) -> None:
    states = {10: state(10), 20: state(20), 30: state(10), 40: state(20)}
    assert found(series(tmp_path / "again", states)) == {"checkpoints-identical": "error"}
    assert found(series(tmp_path / "on", {n: state(n) for n in states})) == {}


def test_one_save_under_two_names(tmp_path: Path) -> None:
    for name, steps in (("epoch_0", 10), ("epoch_1", 20), ("step_10", 10), ("step_20", 20)):
        put(tmp_path / name, state(steps))
    log(tmp_path, 20)
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda start, other: other, ["adapter-restarted"]),
        (lambda start, other: {k: v + 0.02 * other[k].sign() for k, v in start.items()}, []),
    ],
)
@pytest.mark.parametrize("tool", [True, False])
def test_a_small_adapter_drawn_anew(
    change: Callable[[Tensors, Tensors], Tensors], expected: Sequence[str], tool: bool, tmp_path: Path
) -> None:
    """Below 1024 elements chance alone is no sign; moves beyond AdamW's are one more."""
    start = adapter()
    put(tmp_path / "before", start)
    put(tmp_path / "after", change(start, adapter(seed=5)))
    log(tmp_path, 20, **({} if tool else {"learning_rate": 0.0}))
    assert list(found(tmp_path)) == (expected if tool else [])


def saved(folder: Path, counters: Mapping[int, float | None], **given: Any) -> dict[str, str]:
    """Checkpoints of transformers with an optimizer's state; None keeps its counter as a Python int, as 8-bit does."""
    for number, counter in counters.items():
        place = folder / f"checkpoint-{number}"
        put(place, state(number))
        moments = {k: 1e-3 * v + number for k, v in state(number).items()}
        step: Any = number if counter is None else torch.tensor(float(counter))
        states = {i: {"step": step, "exp_avg": m, "exp_avg_sq": m + 1} for i, m in enumerate(moments.values())}
        torch.save({"state": states, "param_groups": []}, place / "optimizer.pt")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": []}))
    log(folder, max(counters))
    (folder / "training_args.json").write_text(json.dumps(given))
    return found(folder)


def test_an_optimizer_without_state(tmp_path: Path) -> None:
    for number in (10, 20):
        put(tmp_path / f"checkpoint-{number}", state(number))
        torch.save({"state": {}, "param_groups": [{"lr": RATE}]}, tmp_path / f"checkpoint-{number}" / "optimizer.pt")
    log(tmp_path, 20)
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("counters", "given", "expected"),
    [
        ({10: 10, 20: 20, 30: 10, 40: 20}, {"resume_from_checkpoint": "checkpoint-20"}, "error"),
        ({10: 10, 20: 20, 30: 10, 40: 20}, {}, "warning"),
        ({40: 20}, {"resume_from_checkpoint": "checkpoint-20"}, "warning"),
        ({10: 10, 20: 20, 30: 30}, {"resume_from_checkpoint": True}, None),
        ({10: 10, 20: 19, 30: 28}, {}, None),  # a loss scaler skipped two
        ({10: None, 20: None}, {}, None),
        ({10: 10, 20: 20, 30: 10}, {"resume_from_checkpoint": "checkpoint-20", "resume_only_model": True}, None),
        ({10: 0.25, 20: 0.125}, {}, None),  # a parameter of one element: no counter
    ],
)
def test_an_optimizer_begun_anew(
    counters: Mapping[int, float | None], given: Mapping[str, Any], expected: str | None, tmp_path: Path
) -> None:
    assert found_of(saved(tmp_path, counters, **given), "optimizer-restarted") == expected


def found_of(findings: Mapping[str, str], name: str) -> str | None:
    assert set(findings) <= {name}
    return findings.get(name)


def evaluated(folder: Path, name: str, values: Sequence[float], best: int, **given: Any) -> dict[str, str]:
    for number in range(1, len(values) + 1):
        put(folder / f"checkpoint-{10 * number}", state(10 * number))
    log(folder, 10 * len(values))
    history = [{"step": 10 * n, f"eval_{name}": value, "eval_runtime": 4.1} for n, value in enumerate(values, 1)]
    document = {"best_metric": values[best], "best_model_checkpoint": f"out/checkpoint-{10 * best + 10}"}
    last = folder / f"checkpoint-{10 * len(values)}" / "trainer_state.json"
    last.write_text(json.dumps({**document, "global_step": 10 * len(values), "log_history": history}))
    (folder / "training_args.json").write_text(json.dumps(given))
    return found(folder)


@pytest.mark.parametrize(
    ("name", "values", "best", "expected"),
    [
        ("reward", [0.64, 0.79, 0.80], 0, "warning"),
        ("rewards/accuracy_reward/mean", [0.8, 0.7, 0.6], 2, "warning"),
        ("loss", [0.9, 0.7, 0.6], 0, "warning"),
        ("reward", [0.64, 0.79, 0.80], 2, None),
        ("loss", [0.9, 0.7, 0.6], 2, None),
        ("reward", [0.64, 0.79, 0.80], 1, None),  # not the best, not the worst: evaluated where nothing was saved
        ("reward", [0.64, 0.64, 0.80], 0, None),  # a tie
        ("reward", [0.64, 0.80], 0, None),
        ("reward_std", [0.1, 0.2, 0.3], 0, None),
        ("rewards/rejected", [0.1, 0.2, 0.3], 0, None),
        ("kl", [0.1, 0.2, 0.3], 0, None),  # a name that does not say
        ("accuracy_loss", [0.1, 0.2, 0.3], 0, None),
    ],
)
def test_the_best_checkpoint_is_the_best(
    name: str, values: Sequence[float], best: int, expected: str | None, tmp_path: Path
) -> None:
    assert found_of(evaluated(tmp_path / "a", name, values, best), "worst-is-best") == expected
    named = evaluated(tmp_path / "b", name, values, best, metric_for_best_model=name, greater_is_better=False)
    assert found_of(named, "worst-is-best") == expected


@pytest.mark.parametrize("value", ["1" + "0" * 400, "true", "null", '"x"', "[1]", "NaN", "Infinity"])
def test_evaluations_that_are_no_numbers(value: str, tmp_path: Path) -> None:
    evaluated(tmp_path, "reward", [0.6, 0.7, 0.8], 0)
    path = tmp_path / "checkpoint-30" / "trainer_state.json"
    for old in ("0.7", "0.6"):
        path.write_text(path.read_text().replace(old, value))
        assert found(tmp_path) == {}
