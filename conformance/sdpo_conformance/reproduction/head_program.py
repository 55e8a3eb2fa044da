"""Writing a failure of an entry that scores or ranks a vocabulary as a program of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

from sdpo_conformance.files import write_tensors, write_text
from sdpo_conformance.inputs.heads import HeadCase
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.reproduction.loss_program import docstring
from sdpo_conformance.reproduction.program import filled, location
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.specs.spec import Spec


def write_head_program(
    case: HeadCase,
    found: Disagreement | ImplementationError,
    expected: Expectation,
    folder: Path,
    spec: Spec,
    requirement: Requirement,
    target: str,
    device: str,
    before: HeadCase | None = None,
    after: HeadCase | None = None,
) -> str:
    """Write ID.py and ID.safetensors into ``folder``; the name of the program. ``expected``: log_softmax with its
    bound, (B, T, V). ``before`` and ``after``: what the entry is called on first, on the same tensors, or next."""
    entry = requirement.capabilities[0]
    words = [f"{target}, {entry.value}: {found}", f"Input: {case.words}"]
    program = filled(
        "head",
        docstring(requirement, words, f"Plain PyTorch and {requirement.id}.safetensors"),
        {
            "TARGET": location(target, spec),
            "ENTRY": entry.value,
            "DEVICE": device,
            "K": case.k,
            "LAYOUT": case.layout,
            "OTHER": "before" if before is not None else "after" if after is not None else "",
        },
    )
    tensors = {"hidden": case.hidden, "head": case.head, "response_ids": case.response_ids}
    tensors |= {"expected": expected.value, "bound": expected.bound}
    if (other := before or after) is not None:
        tensors |= {"other.hidden": other.hidden, "other.head": other.head}
    write_tensors(folder / f"{requirement.id}.safetensors", tensors)
    path = folder / f"{requirement.id}.py"
    write_text(path, program)
    return path.name
