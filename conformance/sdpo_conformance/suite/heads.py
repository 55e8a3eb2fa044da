"""What the LP and TK requirements share: calling the entry, and saying where its numbers are wrong."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdpo_conformance.execution import ImplementationError, implementation_errors
from sdpo_conformance.judgement import Disagreement, number, worst
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction import environment, location
from sdpo_conformance.requirements import Requirement
from sdpo_conformance.strategies.heads import HeadCase
from sdpo_conformance.subject import Subject
from sdpo_conformance.tolerances import Expectation


def score(subject: Subject, case: HeadCase, requires_grad: bool = False) -> Tensor:
    """Call compute_response_logprobs; a (B, T) floating tensor."""
    hidden, head = on_device(subject, case, requires_grad)
    with implementation_errors(subject.entry.value):
        found = subject.function(hidden, head, case.response_ids.to(subject.device))
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ImplementationError(f"returned a {type(found).__name__}, expected a floating (B, T) tensor")
    if found.shape != case.response_ids.shape:
        shape = tuple(case.response_ids.shape)
        raise ImplementationError(f"returned shape {tuple(found.shape)}, expected (B, T) = {shape}")
    return found


def rank(subject: Subject, case: HeadCase, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Call compute_teacher_topk; log-probs and integer indices of one shape (B, T, K)."""
    hidden, head = on_device(subject, case, requires_grad)
    with implementation_errors(subject.entry.value):
        found = subject.function(hidden, head, case.k)
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not all(isinstance(x, Tensor) for x in found):
        raise ImplementationError(f"returned a {type(found).__name__}, expected (logprobs, indices)")
    logprobs, indices = found
    k = min(max(1, case.k), case.head.shape[0])
    shape = (*case.hidden.shape[:2], k)
    for name, tensor in (("logprobs", logprobs), ("indices", indices)):
        if tensor.shape != shape:
            raise ImplementationError(f"{name} has shape {tuple(tensor.shape)}, expected (B, T, K) = {shape}")
    if indices.is_floating_point() or not logprobs.is_floating_point():
        kinds = f"{logprobs.dtype} and {indices.dtype}"
        raise ImplementationError(f"expected floating log-probs and integer indices, got {kinds}")
    return logprobs, indices


def on_device(subject: Subject, case: HeadCase, requires_grad: bool) -> tuple[Tensor, Tensor]:
    """Fresh hidden states and head where the run takes place."""
    hidden, head = (x.detach().clone().to(subject.device) for x in (case.hidden, case.head))
    return hidden.requires_grad_(requires_grad), head.requires_grad_(requires_grad)


def compare(case: HeadCase, aspect: str, expectation: Expectation, got: Tensor, detail: str = "") -> None:
    """Raise a Disagreement at the element that is furthest beyond its bound."""
    got = got.detach().to("cpu", torch.float64)
    excess, where = worst(expectation, got)
    if excess > 1:
        place = ", ".join(map(str, where))
        raise disagreement(
            case,
            f"{aspect}[{place}]",
            number(float(expectation.value[where])),
            number(float(got[where])),
            detail=detail,
            excess=excess,
        )


def disagreement(
    case: HeadCase, aspect: str, expected: str, got: str, detail: str = "", excess: float = float("inf")
) -> Disagreement:
    """A disagreement that knows its input in words and how to write it as a program."""
    found = Disagreement(aspect, expected, got, probe="head", detail=detail, excess=excess)
    found.extra["words"] = case.words
    found.extra["reproduction"] = partial(write_reproduction, case, found)
    return found


def write_reproduction(
    case: HeadCase, found: Disagreement, folder: Path, requirement: Requirement, target: str, device: str
) -> str:
    """Write ID.py and ID.safetensors into ``folder``; the name of the program."""
    entry = requirement.capabilities[0]
    program = (
        environment()
        .get_template("head_reproduction.py.jinja")
        .render(
            requirement=requirement,
            target=target,
            disagreement=found,
            entry=entry.value,
            ranks=entry is Capability.TEACHER_TOPK,
            words=case.words,
            stem=requirement.id,
            device=json.dumps(device),
            k=case.k,
            **location(target),
        )
    )
    tensors = {"hidden": case.hidden, "head": case.head, "response_ids": case.response_ids}
    save_file(
        {name: t.clone().contiguous() for name, t in tensors.items()},
        folder / f"{requirement.id}.safetensors",
    )
    path = folder / f"{requirement.id}.py"
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(program, encoding="utf-8")
    os.replace(partial_path, path)
    return path.name
