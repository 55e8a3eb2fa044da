"""The contract of autograd, and numerics: rules that every spec has, in its own corners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.inputs.masks import without_every_second
from sdpo_conformance.judging.call import (
    Outcome,
    call_entry,
    differentiable_output,
    gradients_of,
    implementation_errors,
    incoming_gradient,
    materialise,
)
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.rule import ALL, LOSS, VALUE, Rule

MUST, SHOULD = Level.MUST, Level.SHOULD
LAYOUTS = ("transposed", "strided", "offset", "sliced", "expanded")


def plainly_wrong(subject: Subject, case: Any) -> bool:
    """The control of rules about modes and several graphs: one plain call."""
    return subject.wrong_on(case, ALL)


def frozen_inputs(subject: Subject, case: Any) -> None:
    """No input but the student's gets a gradient."""
    loss_input = materialise(case, subject.device)
    output = differentiable_output(call_entry(subject.function, subject.entry, loss_input), subject.entry)
    with implementation_errors("backward"):
        output.backward(incoming_gradient(case, subject.entry, output))
    for key in case.tensors():
        tensor = getattr(loss_input, key)
        if key not in case.differentiable and (tensor.requires_grad or tensor.grad is not None):
            got = f"requires_grad {tensor.requires_grad}, gradient {'set' if tensor.grad is not None else 'None'}"
            raise Disagreement(
                f"{key} after backward", "no gradient, requires_grad False", got, case=case, probe="frozen_inputs"
            )


def unmodified_inputs(subject: Subject, case: Any) -> None:
    """Every input is what it was."""
    outcome = subject.evaluate(case)
    if outcome.touched:
        names = ", ".join(outcome.touched)
        raise Disagreement(
            f"{names} after the call",
            "the values passed in",
            "other values",
            case=case,
            outcome=outcome,
            probe="unmodified",
        )


def gives_zeros(subject: Subject, case: Any) -> None:
    """Where nothing counts the student's logits get a gradient of zeros: one is made, and a rank takes part."""
    outcome = subject.evaluate(case)
    if outcome.gradients["student_logits"] is None:
        raise Disagreement(
            "gradient to student_logits", "zeros", "none at all", case=case, outcome=outcome, probe="no_gradient"
        )


def unlike(case: Any) -> Any:
    """A case of the same shapes whose logits, tokens that count and incoming gradient are others: every second token
    that counts has a weight of 0, or label 0."""
    mask = without_every_second(getattr(case.loss_input, case.kind.mask))
    changes = {"student_logits": 0.5 * case.loss_input.student_logits, case.kind.mask: mask}
    return replace(case.with_fields(**changes), incoming=2.0)


def another_batch(case: Any) -> Any:
    """``unlike`` with the positions of every row in reverse order."""
    other = unlike(case)
    return other.with_fields(**{key: one.flip(1) for key, one in other.tensors().items() if one.dim() > 1})


def another_batchs_options(case: Any) -> Any:
    """The case with another temperature and, where they are given, other counts of the whole batch."""
    changes = {key: 2 * value for key, value in vars(case.training).items() if key in COUNTS and value is not None}
    return case.with_training(temperature=0.75 * case.training.temperature, **changes)


def second_call(function: Callable[[Any], Any], case: Any, probe: str, device: str = "cpu") -> Outcome:
    """The outcome on ``case``, in the tensors or in the options object that held others in the call before it."""
    before = CHANGED[probe](case)
    loss_input = materialise(before, device)
    loss_input.training = replace(before.training)
    output = differentiable_output(call_entry(function, Capability.LOSS, loss_input), Capability.LOSS)
    gradients_of(loss_input, before, Capability.LOSS, output)
    if probe == "options_changed":
        vars(loss_input.training).update(vars(case.training))
        loss_input = replace(materialise(case, device), training=loss_input.training)
    else:
        with torch.no_grad():
            for key, tensor in case.tensors().items():
                getattr(loss_input, key).copy_(tensor)
    result = call_entry(function, Capability.LOSS, loss_input)
    output = differentiable_output(result, Capability.LOSS)
    return Outcome(result, gradients_of(loss_input, case, Capability.LOSS, output))


CHANGED: Mapping[str, Callable[[Any], Any]] = {
    "changed_in_place": another_batch,
    "options_changed": another_batchs_options,
}
"""Probe -> what stood there before."""

CHANGED_WORDS = {"changed_in_place": "the same tensors", "options_changed": "the same options object"}
COUNTS = ("batch_num_tokens", "global_batch_size", "num_items_in_batch")


def nothing_is_kept(subject: Subject, case: Any) -> None:
    """A call in the tensors, and one with the options object, of a call before it."""
    if subject.expectations(case) is None:
        return
    for probe, words in CHANGED_WORDS.items():
        found = compare(case, second_call(subject.function, case, probe, subject.device), ALL, case.expectations)
        if found is not None:
            found.probe, found.detail = probe, found.detail or f"after {words} held another batch's values"
            found.extra["other"] = CHANGED[probe](case)
            found.secondary = plainly_wrong(subject, case)
            raise found


def two_graphs(subject: Subject, case: Any) -> None:
    """Two graphs alive at once, and gradients that accumulate."""
    other = unlike(case)
    inputs = [materialise(one, subject.device) for one in (case, other)]
    results = [call_entry(subject.function, subject.entry, one) for one in inputs]
    outputs = [differentiable_output(result, subject.entry) for result in results]
    for index, one in enumerate((case, other)):
        if subject.expectations(one) is None:
            return
        outcome = Outcome(results[index], gradients_of(inputs[index], one, subject.entry, outputs[index]))
        found = compare(one, outcome, ALL, one.expectations)
        if found is not None:
            found.probe, found.detail = "two_graphs", found.detail or "with a second graph alive"
            found.extra["other"] = other if one is case else case
            found.secondary = plainly_wrong(subject, one)
            raise found
    leaf = materialise(case, subject.device)
    for _ in range(2):
        output = differentiable_output(call_entry(subject.function, subject.entry, leaf), subject.entry)
        with implementation_errors("backward"):
            output.backward(incoming_gradient(case, subject.entry, output))
    doubled = replace(case, incoming=2 * case.incoming)
    if subject.expectations(doubled) is None:
        return
    grads: dict[str, Tensor | None] = {}
    for key in case.differentiable:
        grad = getattr(leaf, key).grad
        grads[key] = None if grad is None else grad.detach().to("cpu", torch.float64)
    found = compare(doubled, Outcome({}, grads), (GRADIENT,), doubled.expectations)
    if found is not None:
        found.probe, found.detail, found.case = "accumulate", found.detail or "after two backward passes", case
        found.secondary = plainly_wrong(subject, case)
        raise found


def without_graph(subject: Subject, case: Any) -> None:
    """no_grad and inference_mode: the same values, no graph."""
    if subject.expectations(case) is None:
        return
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = call_entry(subject.function, subject.entry, materialise(case, subject.device))
            output = result.get(LOSS)
            if isinstance(output, Tensor) and output.requires_grad:
                raise Disagreement(
                    f"loss under {mode.__name__}", "no graph", "requires_grad", case=case, probe=mode.__name__
                )
            found = compare(case, Outcome(result, {}), VALUE, case.expectations)
        if found is not None:
            found.probe, found.secondary = mode.__name__, plainly_wrong(subject, case)
            raise found


def repeatable(subject: Subject, case: Any) -> None:
    """The same bits twice."""
    first, second = subject.evaluate(case), subject.evaluate(case)
    for key in first.result:
        if not same(first.number(key), second.number(key)):
            got = float(first.number(key).reshape(-1)[0])
            raise Disagreement(key, repr(got), "another value", case=case, probe="repeat")
    for key, gradient in first.gradients.items():
        again = second.gradients[key]
        if (gradient is None) != (again is None) or (
            gradient is not None and again is not None and not same(gradient, again)
        ):
            raise Disagreement(f"gradient to {key}", "bitwise the same twice", "different", case=case, probe="repeat")


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def result_is_readable(subject: Subject, case: Any) -> None:
    """loss: 0-dim, floating, differentiable, on the input's device."""
    result = call_entry(subject.function, subject.entry, materialise(case, subject.device))
    loss = result.get(LOSS)
    problem = ""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        problem = type(loss).__name__
    elif loss.dim() != 0:
        problem = f"shape {tuple(loss.shape)}"
    elif not loss.requires_grad:
        problem = "a tensor without graph"
    elif loss.device.type != torch.device(subject.device).type:
        problem = f"on {loss.device}"
    if problem:
        raise Disagreement(
            "the result", "loss: a 0-dim floating tensor with graph", problem, case=case, probe="loss_type"
        )


def limit_is_met(subject: Subject, case: Any, control: Any) -> None:
    """Judge where the published code is not finite: the bound is the analytic one alone."""
    outcome = subject.evaluate(case)
    found = compare(case, outcome, ALL, case.limits)
    if found is not None:
        found.secondary = subject.wrong_on(control, ALL)
        raise found


def autograd_rules(prefix: str, broad: Any, source: str) -> tuple[Rule, ...]:
    """``prefix``-GRAD-1 to 9 in the corner ``broad``."""
    contract = f"{source}, and the contract of torch.autograd"
    return (
        Rule(
            f"{prefix}-GRAD-1",
            MUST,
            "the gradient scales with the gradient that arrives at the loss",
            contract,
            "gradient accumulation multiplies the loss: a kernel that ignores what arrives trains at the wrong rate",
            broad.but(incoming=(0.25, -1.0, 3.0, 1000.0, 0.0)),
            (GRADIENT,),
            control=lambda case: replace(case, incoming=1.0),
        ),
        Rule(
            f"{prefix}-GRAD-2",
            MUST,
            "no input but the student's gets a gradient",
            contract,
            "a graph into the teacher keeps it alive and trains it",
            broad,
            share=0.3,
            check=frozen_inputs,
        ),
        Rule(
            f"{prefix}-GRAD-3",
            MUST,
            "no input is modified, by forward or by backward",
            contract,
            "logits that are divided by a temperature in place are wrong for whoever reads them next",
            broad,
            check=unmodified_inputs,
            share=0.5,
        ),
        Rule(
            f"{prefix}-GRAD-4",
            MUST,
            "inputs may be non-contiguous, expanded, or views inside their storage",
            contract,
            "a kernel that assumes strides reads the wrong tokens",
            broad.but(layout=LAYOUTS),
            control=lambda case: replace(case, layout="contiguous"),
        ),
        Rule(
            f"{prefix}-GRAD-5",
            MUST,
            "gradients accumulate, and two live graphs do not share buffers",
            contract,
            "micro-batches are summed before one step: a reused buffer mixes them up",
            broad,
            check=two_graphs,
            share=0.4,
            dtypes=("float32", "float64"),
        ),
        Rule(
            f"{prefix}-GRAD-6",
            MUST,
            "under no_grad and inference_mode the value is the same and carries no graph",
            contract,
            "evaluation calls the loss without gradients",
            broad,
            check=without_graph,
            share=0.3,
        ),
        Rule(
            f"{prefix}-GRAD-7",
            SHOULD,
            "the same input gives bitwise the same result and gradient",
            contract,
            "a run that cannot be repeated cannot be debugged",
            broad,
            check=repeatable,
            share=0.3,
        ),
        Rule(
            f"{prefix}-GRAD-8",
            MUST,
            "the result's loss is a 0-dim floating tensor with a graph, on the input's device",
            contract,
            "a caller reads it and calls backward",
            broad,
            check=result_is_readable,
            share=0.3,
        ),
        Rule(
            f"{prefix}-GRAD-9",
            MUST,
            "nothing is kept of an earlier call: tensors and options that were changed in place are read anew",
            contract,
            "a loader fills the same buffers, and a trainer writes each batch's counts into the same options",
            broad,
            check=nothing_is_kept,
            share=0.3,
        ),
    )


def precision_rules(prefix: str, everything: Any, aspects: Sequence[str] = ALL) -> tuple[Rule, ...]:
    """``prefix``-NUM-1 and 2: every corner at once, by dtype."""
    source = "design: numbers; specs/shared/rounding.py"
    return (
        Rule(
            f"{prefix}-NUM-1",
            MUST,
            "float32 (and float64 where it is offered) is true to a few roundings, everywhere in the spec at once",
            source,
            "precision lost inside does not show in a loss curve",
            everything,
            aspects,
            dtypes=("float32", "float64"),
            share=2.0,
        ),
        Rule(
            f"{prefix}-NUM-2",
            MUST,
            "bfloat16 and float16 are at most twice as far off as plain PyTorch in that dtype",
            source,
            "training runs in bfloat16: a branch that only half precision takes must be right too",
            everything,
            aspects,
            dtypes=("bfloat16", "float16"),
            share=2.0,
        ),
    )


Check = Callable[[Subject, Any], None]
