"""Writes the incident's scaled copies into cases/audit: `python tests/audit/make_incident_cases.py`.

The incident: 869 of 1,198 LoRA tensors changed, max |delta| 0.139, the metrics of steps 3 and 4 bit-
identical.
The copies keep those facts (one keeps the very counts) and shrink the tensors. Everything else in them, which
modules stood still and what the metrics were, is made up: the report of the incident does not say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CASES = Path(__file__).parents[2] / "cases" / "audit"
MAX_DELTA = 0.139
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "linear_attn.out_proj",
    "mlp.shared.down_proj",
)
FULL_PRECISION = (
    {
        "step": 1,
        "total_loss": 0.2187334895133972,
        "distill_loss": 0.2181947976350784,
        "kl_reg": 0.005386918783187866,
    },
    {
        "step": 2,
        "total_loss": 0.18409812450408936,
        "distill_loss": 0.18124544620513916,
        "kl_reg": 0.02852678298950195,
    },
    {
        "step": 3,
        "total_loss": 0.1711532473564148,
        "distill_loss": 0.16517478227615356,
        "kl_reg": 0.05978465080261230,
    },
    {
        "step": 4,
        "total_loss": 0.1711532473564148,
        "distill_loss": 0.16517478227615356,
        "kl_reg": 0.05978465080261230,
    },
)
GRAD_NORMS = (0.8113752603530884, 0.6402198076248169, 0.5817430019378662, 0.5694213509559631)
MOVING_FOURTH = {
    "total_loss": 0.1642310619354248,
    "distill_loss": 0.1563091278076172,
    "kl_reg": 0.0792193412780762,
}


def adapters(layers: int, changed: int, *, head: bool, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank-1 LoRA factors of 2 x 2 modules, before and after, float32, with exactly `changed` tensors
    moved.
    """
    rng = np.random.default_rng(seed)
    modules = [f"model.layers.{layer}.{kind}" for kind in KINDS for layer in range(layers)]
    modules += ["lm_head"] if head else []
    before: dict[str, Any] = {}
    for module in modules:
        for part, shape in (("lora_A", (1, 2)), ("lora_B", (2, 1))):
            key = f"base_model.model.{module}.{part}.weight"
            before[key] = (rng.choice([-1, 1], shape) * rng.uniform(0.1, 0.3, shape)).astype(np.float32)
    after = dict(before)
    # B before A: of an odd number the last module moves its lora_B alone, as after one step from a fresh
    # adapter.
    order = [f"base_model.model.{m}.{part}.weight" for m in modules for part in ("lora_B", "lora_A")]
    for index, key in enumerate(order[:changed]):
        size = MAX_DELTA if index == 0 else MAX_DELTA * float(rng.uniform(0.01, 0.9))
        delta = np.zeros(before[key].shape, dtype=np.float32)
        delta.flat[index % 2] = size if index % 3 else -size
        after[key] = before[key] + delta
    return before, after


def response(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A DistillResponse as CLaaS's trainer returns it."""
    last = {key: value for key, value in rows[-1].items() if key != "step"}
    metadata = {**last, "steps_per_batch_applied": len(rows), "per_step_metrics": list(rows)}
    return {"lora_id": "incident", "metadata": metadata}


def write(name: str, expected: Mapping[str, Any], adapter: tuple[Any, Any] | None, **files: str) -> None:
    folder = CASES / name
    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        save_file(adapter[0], folder / "before.safetensors")
        save_file(adapter[1], folder / "after.safetensors")
    for file, text in files.items():
        stem, _, suffix = file.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write every case; the same bytes each time."""
    full = adapters(46, 869, head=True, seed=1)
    small = adapters(9, 170, head=False, seed=2)
    moved = adapters(9, 234, head=False, seed=3)
    counts = {"tensors_compared": 1198, "tensors_changed": 869, "max_abs_delta": MAX_DELTA}
    stale = {"id": "stale-metrics", "severity": "error"}
    untouched = {"id": "modules-untouched", "severity": "warning"}
    silent = {"id": "ratio-not-reported", "severity": "warning"}
    write(
        "incident",
        {
            "why": (
                "The incident with its own counts: 869 of 1198 tensors, max |delta| 0.139, steps 3 and 4 bit-identical."
            ),
            "exit_status": 1,
            "findings": [stale, untouched, silent],
            "adapter": counts,
            "says": ["total_loss, distill_loss and kl_reg are bit-identical between step 3 and step 4"],
        },
        full,
        distill_response_json=json.dumps(response(FULL_PRECISION), indent=1) + "\n",
    )
    rows = [
        {**row, "mean_is_ratio": 1.0, "clip_fraction": 0.0, "grad_norm": norm}
        for row, norm in zip(FULL_PRECISION, GRAD_NORMS, strict=True)
    ]
    write(
        "incident_gradient_moves",
        {
            "why": (
                "Only some fields stand still: the gradient norm moves on, and the ratio is reported as a constant 1."
            ),
            "exit_status": 1,
            "findings": [stale, untouched],
            "not_judged": ["ratio-dropped"],
            "adapter": {"tensors_compared": 234, "tensors_changed": 170, "max_abs_delta": MAX_DELTA},
            "says": ["but grad_norm moved"],
        },
        small,
        metrics_json=json.dumps(rows, indent=1) + "\n",
    )
    write(
        "incident_sampler_differs",
        {
            "why": (
                "The same run, with the word that the log-probs came from another engine: then the constant 1"
                " is a dropped ratio."
            ),
            "arguments": {"sampler": "differs"},
            "exit_status": 1,
            "findings": [stale, {"id": "ratio-dropped", "severity": "error"}, untouched],
        },
        small,
        metrics_json=json.dumps(rows, indent=1) + "\n",
    )
    near = [dict(row) for row in rows]
    near[3].update({k: near[2][k] * (1 + 3e-8) for k in ("total_loss", "distill_loss", "kl_reg", "grad_norm")})
    write(
        "incident_nearly_identical",
        {
            "why": (
                "Steps 3 and 4 differ in the last digits alone, as when cached state is summed in another"
                " order. JSON lines."
            ),
            "exit_status": 1,
            "findings": [stale, untouched],
            "says": ["identical up to float32 rounding"],
        },
        small,
        metrics_jsonl="".join(json.dumps(row) + "\n" for row in near),
    )
    write(
        "incident_without_metrics",
        {
            "why": ("Only the adapters are left: what stood still is named, and what cannot be judged is said."),
            "exit_status": 1,
            "findings": [untouched],
            "not_judged": ["stale-metrics", "behaviour-not-refreshed"],
            "adapter": {"tensors_compared": 234, "tensors_changed": 170, "max_abs_delta": MAX_DELTA},
        },
        small,
    )
    write(
        "incident_without_adapters",
        {
            "why": (
                "Only the metrics are left: bit-identical steps are doubtful even where nobody can see the weights."
            ),
            "exit_status": 1,
            "findings": [{"id": "stale-metrics", "severity": "warning"}],
            "not_judged": ["weights-unchanged"],
        },
        None,
        metrics_json=json.dumps(rows, indent=1) + "\n",
    )
    sound = [*rows[:3], {**rows[3], **MOVING_FOURTH}]
    write(
        "incident_repaired",
        {
            "why": ("The incident's shape without its fault: every tensor moved, every step's metrics are its own."),
            "exit_status": 0,
            "findings": [],
            "adapter": {"tensors_compared": 234, "tensors_changed": 234, "max_abs_delta": MAX_DELTA},
        },
        moved,
        distill_response_json=json.dumps(response(sound), indent=1) + "\n",
    )
    rounded = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in (
            *sound,
            {**sound[3], "step": 5, "total_loss": 0.1642, "distill_loss": 0.1563, "kl_reg": 0.0793},
        )
    ]
    write(
        "converged_and_rounded",
        {
            "why": ("A log rounded to four decimals in which converging steps look alike: no evidence, no alarm."),
            "exit_status": 0,
            "findings": [],
        },
        moved,
        trainer_state_json=json.dumps(
            {"global_step": 5, "log_history": [{**row, "loss": row["total_loss"]} for row in rounded]},
            indent=1,
        )
        + "\n",
    )


if __name__ == "__main__":
    main()
