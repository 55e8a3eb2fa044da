"""What the LP and TK requirements share: calling the entry, and saying where its numbers are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.inputs.heads import HeadCase, unlike
from sdpo_conformance.judging.call import ImplementationError, implementation_errors, lay_out, settings_kept
from sdpo_conformance.judging.compare import Disagreement, number, worst
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.reproduction.head_program import write_head_program
from sdpo_conformance.specs.claas import SPEC
from sdpo_conformance.specs.claas.head_bounds import vocabulary_logprobs
from sdpo_conformance.specs.requirement import Requirement

Tensors = tuple[Tensor, Tensor, Tensor]
"""Hidden states, head and response ids."""


def score(subject: Subject, case: HeadCase, tensors: Tensors | None = None) -> Tensor:
    """Call compute_response_logprobs on ``tensors``, or on fresh ones; a (B, T) floating tensor."""
    with shown(case):
        found = called(subject, case, tensors, lambda hidden, head, ids: subject.function(hidden, head, ids))
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise ImplementationError(f"returned a {type(found).__name__}, expected a floating (B, T) tensor")
        if found.shape != case.response_ids.shape:
            shape = tuple(case.response_ids.shape)
            raise ImplementationError(f"returned shape {tuple(found.shape)}, expected (B, T) = {shape}")
        return found


def rank(subject: Subject, case: HeadCase, tensors: Tensors | None = None) -> tuple[Tensor, Tensor]:
    """Call compute_teacher_topk on ``tensors``, or on fresh ones; log-probs and integer indices of one shape
    (B, T, K)."""
    with shown(case):
        found = called(subject, case, tensors, lambda hidden, head, _: subject.function(hidden, head, case.k))
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


@contextmanager
def shown(case: HeadCase) -> Iterator[None]:
    """An error of the implementation's knows its input in words and how to write it."""
    try:
        yield
    except ImplementationError as error:
        knows_its_input(error, case, {})
        raise


def called(subject: Subject, case: HeadCase, tensors: Tensors | None, call: Callable[..., Any]) -> Any:
    """What the entry returns for ``tensors``, or for fresh ones in the case's layout. One that refuses a layout, or
    ids that are no int64, with an error is given a contiguous int64 copy: only wrong numbers count against it."""
    name, plain = subject.entry.value, replace(case, layout="contiguous", response_ids=case.response_ids.long())
    try:
        with implementation_errors(name), settings_kept(name):
            return call(*(tensors or on_device(subject, case)))
    except ImplementationError:
        same = plain.layout == case.layout and plain.response_ids.dtype == case.response_ids.dtype
        if tensors is not None or same:
            raise
    with implementation_errors(name), settings_kept(name):
        return call(*on_device(subject, plain))


def on_device(subject: Subject, case: HeadCase, asking: tuple[bool, bool] = (False, False)) -> Tensors:
    """Fresh hidden states, head and response ids where the run takes place, laid out as the case says; ``asking``:
    whether hidden states and head ask for a gradient."""
    hidden, head, ids = (
        lay_out(tensor.detach().clone().to(subject.device), case.layout, "").detach()
        for tensor in (case.hidden, case.head, case.response_ids)
    )
    return hidden.requires_grad_(asking[0]), head.requires_grad_(asking[1]), ids


def judge_two_calls(
    subject: Subject,
    case: HeadCase,
    call: Callable[[HeadCase, Tensors], Any],
    judge: Callable[[HeadCase, Any], object],
) -> None:
    """Two calls on the same tensor objects, hidden states and head changed in place in between as an optimizer step
    changes them: the second result is that of the new values, and the first is still that of the old."""
    case = replace(case, layout="contiguous")
    tensors, other = on_device(subject, case), unlike(case)
    first = call(case, tensors)
    with torch.no_grad():
        tensors[0].copy_(other.hidden)
        tensors[1].copy_(other.head)
    second = call(other, tensors)
    for one, result, before, after, words in (
        (other, second, case, None, "after the same tensors were changed in place"),
        (case, first, None, other, "once a second call was made"),
    ):
        try:
            judge(one, result)
        except Disagreement as found:
            found.detail = f"{found.detail}; {words}" if found.detail else words
            knows_its_input(found, case, {})
            found.extra["reproduction"] = partial(write_reproduction, one, found, before=before, after=after)
            raise


ASKING = ((True, True), (True, False), (False, True), (False, False))
"""Whether hidden states and head ask for a gradient: both, as in a full model; the hidden states alone, as before a
frozen head; the head alone, as after a frozen body; neither."""


def judge_untouched(
    subject: Subject,
    case: HeadCase,
    call: Callable[[HeadCase, Tensors], Any],
    judge: Callable[[HeadCase, Any], object],
    graph: Callable[[Any], Tensor],
) -> None:
    """Calls on tensors that ask for a gradient and on such that ask for none: the values are right, there is no graph,
    and the inputs are as they were. The values are right, too, for a slice of hidden states inside a graph in front of
    a parameter, and under no_grad and inference_mode."""
    case = replace(case, layout="contiguous")
    for asking in ASKING:
        tensors = on_device(subject, case, asking)
        result = call(case, tensors)
        given = (case.hidden, case.head, case.response_ids)
        for name, tensor, value, asked in zip(
            ("hidden", "head", "response_ids"), tensors, given, (*asking, False), strict=True
        ):
            if not torch.equal(tensor.detach().cpu(), value):
                raise disagreement(case, f"{name} after the call", "the values passed in", "other values")
            if tensor.requires_grad != asked or tensor.grad is not None:
                got = f"requires_grad {tensor.requires_grad}" + (", a gradient" if tensor.grad is not None else "")
                raise disagreement(case, f"{name} after the call", f"requires_grad {asked}, no gradient", got)
        if graph(result).requires_grad:
            raise disagreement(case, "log-probs", "requires_grad False", "a tensor with a graph")
        judge(case, result)
    hidden, head, ids = on_device(subject, case, (True, False))
    inside = torch.cat([hidden[:, :1], hidden, hidden[:, -1:]], dim=1)[:, 1:-1]
    judge(case, call(case, (inside, torch.nn.Parameter(head, requires_grad=False), ids)))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            result = call(case, on_device(subject, case))
        try:
            judge(case, result)
        except Disagreement as found:
            words = f"under {mode.__name__}"
            found.detail = f"{found.detail}; {words}" if found.detail else words
            raise


Returned = Mapping[str, Tensor]
"""What came back, by name: ``log-prob`` (B, T) or (B, T, K), and ``token``, the ids of a top-k."""


def compare(
    case: HeadCase, aspect: str, expectation: Expectation, got: Tensor, returned: Returned, detail: str = ""
) -> None:
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
            returned,
            detail=detail,
            excess=excess,
        )


def disagreement(
    case: HeadCase,
    aspect: str,
    expected: str,
    got: str,
    returned: Returned | None = None,
    detail: str = "",
    excess: float = float("inf"),
) -> Disagreement:
    """A disagreement that knows its input and how to write it; ``returned``: where its values are what is wrong."""
    found = Disagreement(aspect, expected, got, probe="head", detail=detail, excess=excess)
    knows_its_input(found, case, returned or {})
    return found


def knows_its_input(found: Disagreement | ImplementationError, case: HeadCase, returned: Returned) -> None:
    """Leave with a failure its input in words, and how it is written: for the diagnosis, and as a program."""
    values = {f"got.{name}": tensor.detach().cpu() for name, tensor in returned.items()}
    found.extra["words"] = case.words
    found.extra["observed"] = partial(case.save, extra=values)
    found.extra["reproduction"] = partial(write_reproduction, case, found)


def write_reproduction(
    case: HeadCase,
    found: Disagreement | ImplementationError,
    folder: Path,
    requirement: Requirement,
    target: str,
    device: str,
    before: HeadCase | None = None,
    after: HeadCase | None = None,
) -> str:
    """The program that shows ``found``; its name in ``folder``."""
    expected = vocabulary_logprobs(case)
    return write_head_program(case, found, expected, folder, SPEC, requirement, target, device, before, after)
