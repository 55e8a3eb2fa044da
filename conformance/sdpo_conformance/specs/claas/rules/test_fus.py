"""FUS: the loss from hidden states and the head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_conformance.judging.call import (
    Outcome,
    call_entry,
    differentiable_output,
    implementation_errors,
    incoming_gradient,
    materialise,
)
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, gradient_disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.claas.inputs.edges import ANY_DIVERGENCE, ANY_LOSS, edge_shape, wide_hidden_states
from sdpo_conformance.specs.claas.inputs.special import special_heads
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import ALL
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss on student_hidden @ lm_head_weight.T"
FUSED = (Capability.FUSED, Capability.DIVERGENCE)
BROAD = NEUTRAL.but(
    alpha=("half", "inside", "one"),
    ratio=("mild", "below", "above_cap"),
    anchor=("off", "on"),
    drift=("mild", "strong"),
    mask=("full", "ragged"),
    mass=("normal", "student_floor"),
)
DIVERGENCE_ONLY = NEUTRAL.but(mass=("normal", "student_floor"))


def corner_of(subject: Subject) -> Any:
    """The broad corner; for a bare divergence its part below alpha = 1."""
    return DIVERGENCE_ONLY if subject.entry is Capability.DIVERGENCE else BROAD


@requirement(
    "FUS-1",
    Level.MUST,
    "the results are those of the loss on the logits of the same hidden states and head",
    source=SOURCE,
    why="a fused kernel is a rewrite of the loss, not another loss",
    capabilities=FUSED,
)
def test_fus_1(subject: Subject) -> None:
    aspects = tuple(aspect for aspect in ALL if aspect != GRADIENT)
    subject.for_all(corner_of(subject).but(head="frozen"), lambda case: subject.agrees(case, aspects))
    heads = special_heads(subject.entry, subject.widest, subject.seed)
    subject.each(heads, lambda case: subject.agrees(case, aspects))


@requirement(
    "FUS-2",
    Level.MUST,
    "the gradient to the hidden states is the gradient to the logits times the head",
    source=SOURCE,
    why="it is all that trains the adapter",
    capabilities=FUSED,
)
def test_fus_2(subject: Subject) -> None:
    subject.for_all(corner_of(subject).but(head="frozen"), lambda case: subject.agrees(case, (GRADIENT,)))
    heads = special_heads(subject.entry, subject.widest, subject.seed)
    subject.each(heads, lambda case: subject.agrees(case, (GRADIENT,)))


class ProductsOfShape(TorchDispatchMode):
    """Counts matrix products and scatters that yield one shape."""

    WATCHED = ("mm", "addmm", "bmm", "baddbmm", "index_add", "index_add_", "scatter_add", "scatter_add_")

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.seen = shape, []  # type: tuple[int, ...], list[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
        if name in self.WATCHED and shape[-2:] in (self.shape, self.shape[::-1]):
            self.seen.append(name)
        return result


@requirement(
    "FUS-3",
    Level.MUST,
    "a head that requires grad gets its gradient; for a frozen head none is computed",
    source=f"{SOURCE}; CLaaS trains LoRA, the head is frozen",
    why="a lost head gradient stalls training; a needless one costs V x H memory and a third of the time",
    capabilities=FUSED,
)
def test_fus_3(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(replace(case, trainable_head=True), (GRADIENT,), control=replace(case, trainable_head=False))
        head_alone_is_trained(subject, replace(case, trainable_head=True))
        frozen = replace(case, trainable_head=False)
        loss_input = materialise(frozen, subject.device)
        output = differentiable_output(call_entry(subject.function, subject.entry, loss_input), subject.entry)
        head = tuple(loss_input.lm_head_weight.shape)
        ids, support = loss_input.response_ids, loss_input.teacher_indices
        if head[0] == head[1] or min(head) <= ids.numel() or support.shape[-1] in head:
            return  # a chunk of tokens could yield a product of the head's shape
        watch = ProductsOfShape(head)
        with implementation_errors("backward"), watch:
            output.backward(incoming_gradient(frozen, subject.entry, output))
        if loss_input.lm_head_weight.grad is not None or watch.seen:
            got = f"{watch.seen[0]} of shape {head}" if watch.seen else "a gradient"
            raise Disagreement(
                "backward with a frozen head",
                "no gradient to the head computed",
                got,
                case=frozen,
                probe="frozen_head",
            )

    subject.for_all(corner_of(subject).but(layout=("contiguous", "transposed")), check, share=0.5)


def head_alone_is_trained(subject: Subject, case: LossCase) -> None:
    """A frozen body under a trainable head: the head's gradient does not depend on the hidden states' wish."""
    expected = subject.expectations(case)
    if expected is None:
        return
    loss_input = materialise(case, subject.device)
    loss_input = replace(loss_input, student_hidden=loss_input.student_hidden.detach())
    output = differentiable_output(call_entry(subject.function, subject.entry, loss_input), subject.entry)
    with implementation_errors("backward"):
        incoming = incoming_gradient(case, subject.entry, output)
        (found,) = torch.autograd.grad(output, [loss_input.lm_head_weight], incoming, allow_unused=True)
    gradient = None if found is None else found.detach().to("cpu", torch.float64)
    key = "lm_head_weight"
    wrong = gradient_disagreement(key, expected.gradients[key], Outcome({}, {key: gradient}))
    if wrong is not None:
        wrong.case, wrong.probe = case, "head_alone"
        wrong.detail = wrong.detail or "with hidden states that ask for no gradient"
        raise wrong


@requirement(
    "FUS-4",
    Level.MUST,
    "every requirement of the loss holds through the fused entry",
    source=SOURCE,
    why="the fused path is where the ratio gets lost; here every corner meets every other",
    capabilities=(Capability.FUSED,),
)
def test_fus_4(subject: Subject) -> None:
    subject.for_all(EVERYTHING, lambda case: subject.agrees(case, ALL), share=2.0)


@requirement(
    "FUS-5",
    Level.SHOULD,
    "never holds B x T x V values: peak memory stays below one copy of the logits",
    source="the reason to fuse",
    why="at V = 151936 one float32 copy of 4096 tokens is 2.3 GiB",
    capabilities=FUSED,
)
def test_fus_5(subject: Subject) -> None:
    if not subject.device.startswith("cuda"):
        pytest.skip("peak memory is measured on CUDA only")
    b, t, v, h, k = 1, 2048, 65536, 64, 32
    generator = torch.Generator().manual_seed(subject.seed)
    hidden = torch.randn(b, t, h, generator=generator)
    head = torch.randn(v, h, generator=generator)
    support = torch.rand(b, t, 4096, generator=generator).argsort(-1)[..., :k] * 16
    chosen = (hidden @ head.T).log_softmax(-1).gather(-1, support[..., :1]).squeeze(-1)
    case = LossCase(
        FusedSDPOLossInput(
            student_hidden=hidden.bfloat16(),
            lm_head_weight=head.bfloat16(),
            teacher_logprobs=torch.randn(b, t, k, generator=generator).log_softmax(-1),
            teacher_indices=support,
            base_logprobs=chosen,
            response_mask=torch.ones(b, t),
            old_student_logprobs=chosen,
            response_ids=support[..., 0].contiguous(),
            training=TrainingConfig(),
        )
    )
    logits_bytes = b * t * v * 2
    for _ in range(2):
        loss_input = materialise(case, subject.device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = differentiable_output(call_entry(subject.function, subject.entry, loss_input), subject.entry)
        with implementation_errors("backward"):
            output.backward(incoming_gradient(case, subject.entry, output))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    if peak >= logits_bytes:
        raise Disagreement(
            "peak memory beyond the inputs",
            f"less than {logits_bytes / 2**20:.0f} MiB",
            f"{peak / 2**20:.0f} MiB",
        )


@requirement(
    "FUS-6",
    Level.MUST,
    "any V, T, H and K, one below, at and one above the edges of tiles",
    source="tiles of 16 to 128 in every published kernel",
    why="the last V mod 16 columns left out of a logsumexp change the ratio by a little, always",
    capabilities=FUSED,
)
def test_fus_6(subject: Subject) -> None:
    corner = ANY_DIVERGENCE if subject.entry is Capability.DIVERGENCE else ANY_LOSS
    subject.for_all(corner, lambda case: subject.agrees(case, ALL), shape_of=edge_shape)
    wide = wide_hidden_states(corner, subject.entry, subject.torch_dtypes[0], subject.seed)
    subject.each(wide, lambda case: subject.agrees(case, ALL))
