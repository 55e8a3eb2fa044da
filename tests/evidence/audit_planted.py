"""Planted faults, counted: every PEFT kind that installs, trained soundly, with one fault put into what it saved.

python -m tests.evidence.audit_planted [KIND ...]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sdpo_conformance.audit import AuditError, audit_run
from sdpo_conformance.audit.findings import Severity
from sdpo_conformance.audit.names import place_of

from .audit_false_alarms import kinds, train, write_log

Tensors = dict[str, torch.Tensor]


def renamed(change: Callable[[str], str]) -> Callable[[Tensors, Tensors], Tensors]:
    return lambda before, after: {change(key): value for key, value in after.items()}


def still_zero(before: Tensors, after: Tensors) -> Tensors:
    """What starts at zero is zero; everything else moved. Nothing, for a kind without such a part."""
    zero = {key for key in after if place_of(key).starts_at_zero}
    return {key: value * 0 if key in zero else value for key, value in after.items()} if zero else {}


def halved(before: Tensors, after: Tensors) -> Tensors:
    """One of two ranks' rows, of every tensor with an even number of them."""
    if any(value.dim() == 0 or value.shape[0] % 2 for value in after.values()):
        return {}
    return {key: value[: value.shape[0] // 2].clone() for key, value in after.items()}


def not_a_number(before: Tensors, after: Tensors) -> Tensors:
    key = next(key for key, value in after.items() if value.is_floating_point() and value.dim())
    return {**after, key: torch.full_like(after[key], float("nan"))}


FAULTS: dict[str, tuple[Callable[[Tensors, Tensors], Tensors], str]] = {
    "saved before the update": (lambda before, after: before, "weights-unchanged"),
    "still zero": (still_zero, "lora-b-zero"),
    "NaN": (not_a_number, "tensor-nonfinite"),
    "emptied": (lambda before, after: {key: torch.zeros(0) for key in after}, "tensor-empty"),
    "no tensor": (lambda before, after: {"": torch.zeros(0)}, "tensor-empty"),
    "one rank's rows": (halved, "tensor-mismatch"),
    "torch.compile": (renamed(lambda key: f"_orig_mod.{key}"), "wrapper-prefix"),
    "FSDP": (renamed(lambda key: key.replace(".layers.", "._fsdp_wrapped_module.layers.")), "wrapper-prefix"),
    "checkpointing": (
        renamed(lambda key: key.replace("self_attn", "_checkpoint_wrapped_module.self_attn")),
        "wrapper-prefix",
    ),
    "DDP": (renamed(lambda key: f"module.{key}"), "wrapper-prefix"),
    "prefix dropped": (renamed(lambda key: key.removeprefix("base_model.model.")), "wrapper-prefix"),
}
"""Fault -> how it is put in (nothing where the kind cannot have it), and the finding that names it."""


def planted(only: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str, set[str]]]:
    """(kind, fault, the id that names it, the ids of all errors and warnings) of each."""
    for kind, make in kinds().items():
        if only and kind not in only:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                rows = train(folder, make(), 0)
            except Exception:  # a kind that this PEFT or this model does not take
                continue
            write_log(folder, rows, "transformers")
            weights = folder / "after" / "adapter_model.safetensors"
            before, after = load_file(folder / "before" / weights.name), load_file(weights)
            for fault, (put, expected) in FAULTS.items():
                made = put(dict(before), dict(after))
                if not made or (made.keys() == after.keys() and expected == "wrapper-prefix"):
                    continue
                save_file({} if "" in made else {k: v.contiguous() for k, v in made.items()}, weights)
                yield kind, fault, expected, told(folder)
            shutil.rmtree(folder / "before")
            shutil.rmtree(folder / "after")
            for step in (2, 4):
                target = folder / f"checkpoint-{step}"
                target.mkdir()
                save_file(after, target / weights.name, {"step": str(step)})
                (target / "adapter_config.json").write_text(json.dumps({"peft_type": "X"}))
            yield kind, "equal checkpoints", "checkpoints-identical", told(folder)


def told(folder: Path) -> set[str]:
    try:
        report = audit_run(folder)
    except AuditError as error:
        return {f"refused: {error}"}
    return {finding.id for finding in report.findings if finding.severity is not Severity.NOTE}


if __name__ == "__main__":
    named: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for kind, fault, expected, found in planted(tuple(sys.argv[1:])):
        total[fault] += 1
        named[fault] += expected in found
        if expected not in found:
            print(f"{kind}, {fault}: expected {expected}, found {sorted(found) or 'nothing'}")
    for fault in total:
        print(f"{fault}: {named[fault]} of {total[fault]}")
    print(f"{sum(named.values())} of {sum(total.values())} planted faults named", flush=True)
