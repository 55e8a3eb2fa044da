"""What a failure on a mesh leaves behind: the case as one file, and a program that shows it without this package."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdpo_conformance.cases.case import divergence_incoming
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction.program import location
from sdpo_conformance.sharded.rule_on_ranks import ShardedRule
from sdpo_conformance.specs.claas import SPEC
from sdpo_conformance.specs.claas.sharded.compare_ranks import expected_of
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase, part_of, tokens_of
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject


def write_program(
    folder: Path, key: str, subject: ShardedSubject, rule: ShardedRule, failure: Mapping[str, Any], case: ShardedCase
) -> str:
    """Write KEY.py and KEY.safetensors into ``folder``; returns the program's name."""
    mesh, entry = subject.mesh, subject.entry
    tensors: dict[str, Tensor] = {}
    for rank in range(mesh.ranks):
        part = part_of(case, rank)
        for name, tensor in part.tensors.items():
            tensors[f"{rank}/{name}"] = tensor.contiguous().clone()
        if entry is Capability.DIVERGENCE:
            tensors[f"{rank}/incoming"] = tokens_of(case.laid, rank, divergence_incoming(case)).contiguous()
    expected = expected_of(case, entry)
    for name, expectation in expected.results.items():
        if expectation.value.dim() == 0:
            tensors[f"expected/{name}"] = torch.stack([expectation.value, expectation.bound])
    owed = {name: found for name, found in expected.gradients.items() if name in case.differentiable}
    for name, expectation in owed.items():
        for rank in range(mesh.ranks):
            tensors[f"{rank}/gradient/{name}"] = local_gradient(case, rank, name, expectation.value)
            tensors[f"{rank}/bound/{name}"] = local_gradient(case, rank, name, expectation.bound)
    facts = {
        "statement": f"{rule.id}: {rule.statement}",
        "summary": failure["summary"],
        "sizes": [list(pair) for pair in mesh.sizes],
        "backend": subject.pool.backend,
        "device": subject.pool.device,
        "entry": entry.value,
        "where": {
            **location(subject.pool.target, SPEC),
            "search_path": [str(Path(path).resolve()) for path in sys.path],
        },
        "training": asdict(case.training),
        "incoming": case.incoming,
        "differentiable": list(case.differentiable),
        "vocab_start": [part_of(case, rank).vocab_start for rank in range(mesh.ranks)],
        "vocab_size": case.vocabulary,
        "extent": case.laid.extent if subject.claims.dtensor else 0,
        "batch_ranks": 1 if entry is Capability.DIVERGENCE else mesh.batch_ranks,
    }
    save_file(tensors, folder / f"{key}.safetensors", metadata={"facts": json.dumps(facts)})
    program = files("sdpo_conformance.sharded") / "reproduce_on_ranks.py"
    (folder / f"{key}.py").write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    return f"{key}.py"


def local_gradient(case: ShardedCase, rank: int, key: str, whole: Tensor) -> Tensor:
    """The part of a whole gradient that ``rank`` owes."""
    changed = case.with_fields(**{key: whole})
    return part_of(changed, rank).tensors[key].clone()
