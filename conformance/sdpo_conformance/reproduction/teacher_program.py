"""Writing a failure of an EMA teacher's update as a program of plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sdpo_conformance.files import write_tensors, write_text
from sdpo_conformance.reproduction.loss_program import docstring
from sdpo_conformance.reproduction.program import filled, location
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.specs.spec import Spec


def tied(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """A name -> the first other name under which the same tensor stands."""
    first: dict[int, str] = {}
    return {name: known for name, value in weights.items() if (known := first.setdefault(id(value), name)) != name}


def write_teacher_program(
    folder: Path,
    spec: Spec,
    requirement: Requirement,
    target: str,
    device: str,
    words: str,
    rate: float,
    teacher: Mapping[str, Tensor],
    students: Sequence[Mapping[str, Tensor]],
    other: Mapping[str, Tensor],
    at_rest: Sequence[int],
) -> str:
    """Write ID.py and ID.safetensors into ``folder``; the name of the program. ``teacher`` before the first call,
    ``students`` at each; ``other``: a teacher that is handed over after them, or nothing; ``at_rest``: numbers of calls
    with one student after which an adapter is looked at."""
    entry = requirement.capabilities[0]
    said = [f"{target}, {entry.value}", f"Input: {words}"]
    program = filled(
        "teacher",
        docstring(requirement, said, f"Plain PyTorch and {requirement.id}.safetensors"),
        {
            "TARGET": location(target, spec),
            "ENTRY": entry.value,
            "DEVICE": device,
            "RATE": rate,
            "CALLS": len(students),
            "AT_REST": list(at_rest),
            "TIED": tied(teacher),
        },
    )
    tensors = {f"teacher.{name}": value for name, value in teacher.items()}
    for call, student in enumerate(students):
        tensors |= {f"student{call}.{name}": value for name, value in student.items()}
    tensors |= {f"other.{name}": value for name, value in other.items()}
    write_tensors(folder / f"{requirement.id}.safetensors", {name: value.clone() for name, value in tensors.items()})
    path = folder / f"{requirement.id}.py"
    write_text(path, program)
    return path.name
