"""Ways in which values are right and what surrounds them is not: incoming gradients, buffers, inputs, strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.defect import Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import RATIO_LOG_CLAMP, Parts, Result, Work
from sdpo_conformance.specs.claas.defects.sources import cite

Entry = Callable[[Parts, Any], Result]

EVALUATION = "Evaluation: every value is right."
ONE_LIVE_GRAPH = "One forward and one backward at a time."
CONTIGUOUS = "Contiguous inputs."


def first_element(incoming: Tensor) -> Tensor:
    """The first element of the incoming gradient for every token."""
    return incoming.flatten()[:1].reshape(*[1] * incoming.dim()).expand_as(incoming)


def leaves_of(loss_input: Any) -> list[str]:
    """The differentiable fields that ask for a gradient."""
    fields = ("student_logits", "student_hidden", "lm_head_weight")
    return [field for field in fields if getattr(getattr(loss_input, field, None), "requires_grad", False)]


Release = Callable[[list[Tensor], Tensor], tuple[Tensor, ...]]


class Precomputed(torch.autograd.Function):
    """A loss whose gradients were computed in the forward; ``release`` makes the backward's answer of them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, kept: list[Tensor], release: Release, *inputs: Tensor) -> Tensor:
        ctx.kept, ctx.release = kept, release
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        return None, None, None, *ctx.release(ctx.kept, incoming)


def precomputing(keep: Callable[[list[Tensor]], list[Tensor]], release: Release, always_grad: bool = True) -> Change:
    """Compute gradients in the forward, as fused kernels do. ``keep`` says where they wait for the backward."""

    def entry(before: Entry, parts: Parts, loss_input: Any) -> Result:
        names = leaves_of(loss_input)
        if not names:
            return before(parts, loss_input)
        originals = [getattr(loss_input, name) for name in names]
        copies = [original.detach().clone().requires_grad_() for original in originals]
        with torch.set_grad_enabled(always_grad or torch.is_grad_enabled()):
            result = before(parts, replace(loss_input, **dict(zip(names, copies, strict=True))))
            gradients = list(torch.autograd.grad(result["loss"], copies, materialize_grads=True))
        loss = Precomputed.apply(result["loss"].detach(), keep(gradients), release, *originals)
        return {**result, "loss": loss}

    return around("entry", entry)


BUFFERS: dict[tuple[Any, ...], Tensor] = {}


def in_shared_buffers(gradients: list[Tensor]) -> list[Tensor]:
    """One buffer per shape, overwritten by the next call."""
    shared = []
    for position, gradient in enumerate(gradients):
        key = (position, gradient.shape, gradient.dtype, gradient.device)
        shared.append(BUFFERS.setdefault(key, torch.empty_like(gradient)).copy_(gradient))
    return shared


def scaled(kept: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
    """The gradients times the incoming one."""
    return tuple(gradient * incoming for gradient in kept)


def scaled_in_place(kept: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
    """The same, written over the saved gradients."""
    return tuple(gradient.mul_(incoming).clone() for gradient in kept)


def fresh(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients themselves."""
    return gradients


LATEST: dict[str, Tensor] = {}


def divided_by_latest_count(before: Entry, parts: Parts, loss_input: Any) -> Result:
    """The backward divides by the number of tokens that the latest forward left behind."""
    count = loss_input.response_mask.detach().double().sum().clamp(min=1.0)
    LATEST["count"] = count

    def release(kept: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * (incoming * (count / LATEST["count"]).to(incoming)) for gradient in kept)

    result: Result = precomputing(fresh, release)(replace(parts, entry=before)).entry(parts, loss_input)
    return result


def touching(change: Callable[[Any], None]) -> Change:
    """Compute, then do something to the caller's tensors."""

    def entry(before: Entry, parts: Parts, loss_input: Any) -> Result:
        result = before(parts, replace(loss_input))
        with torch.no_grad():
            change(loss_input)
        return result

    return around("entry", entry)


def given(loss_input: Any) -> Tensor:
    """Logits or hidden states."""
    tensor: Tensor = loss_input.student_hidden if hasattr(loss_input, "student_hidden") else loss_input.student_logits
    return tensor


def overwrite_logits(loss_input: Any) -> None:
    """Write log-probs over the logits."""
    tensor = given(loss_input).data
    tensor.copy_(torch.log_softmax(tensor.float(), dim=-1).to(tensor.dtype))


def renormalise_teacher(loss_input: Any) -> None:
    """Renormalise the teacher's log-probs where they lie."""
    teacher = loss_input.teacher_logprobs
    teacher.copy_(teacher - torch.logsumexp(teacher.float(), dim=-1, keepdim=True).to(teacher.dtype))


def subtract_from_old(loss_input: Any) -> None:
    """Leave the log-ratio's sign flipped in the behaviour log-probs."""
    loss_input.old_student_logprobs.neg_()


def sort_teacher(loss_input: Any) -> None:
    """Sort the support by token id where it lies."""
    indices, order = loss_input.teacher_indices.sort(dim=-1)
    teacher = loss_input.teacher_logprobs
    teacher.copy_(teacher.gather(-1, order))
    loss_input.teacher_indices.copy_(indices)


def as_stored(tensor: Tensor, from_start: bool = False) -> Tensor:
    """The tensor's memory read as if it were contiguous."""
    if tensor.is_contiguous() and not (from_start and tensor.storage_offset()):
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.as_strided(tensor, (size,), (1,), 0)
    start = 0 if from_start else tensor.storage_offset()
    places = (torch.arange(tensor.numel(), device=tensor.device) + start) % size
    return flat[places].reshape(tensor.shape)


def reading(change: Callable[[Any], dict[str, Tensor]]) -> Change:
    """Other tensors in place of some of the caller's."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        return before(replace(loss_input, **change(loss_input)))

    return around("accept", accept)


def leading(loss_input: Any, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Logits or hidden states through a function, by their field's name."""
    name = "student_hidden" if hasattr(loss_input, "student_hidden") else "student_logits"
    return {name: function(getattr(loss_input, name))}


def with_old_of_caller(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """The behaviour log-probs with whatever graph they have; zeros where nothing counts."""
    w = before(loss_input)
    old = loss_input.old_student_logprobs.to(w.old)
    w.old = torch.where(w.mask != 0, old, torch.zeros_like(old))
    return w


def made_trainable(field: str) -> Change:
    """A constant of the caller's that asks for a gradient from here on, and gets one."""

    def entry(before: Entry, parts: Parts, loss_input: Any) -> Result:
        result = dict(before(parts, loss_input))
        constant = getattr(loss_input, field)
        if isinstance(result["loss"], Tensor) and torch.is_grad_enabled() and constant.is_leaf:
            path = constant.requires_grad_().to(result["loss"].dtype).nan_to_num().sum()
            result["loss"] = result["loss"] + path - path.detach()
        return result

    return around("entry", entry)


def with_graph_always(before: Entry, parts: Parts, loss_input: Any) -> Result:
    """A graph whether or not the caller wants one."""
    names = ("student_hidden",) if hasattr(loss_input, "student_hidden") else ("student_logits",)
    if torch.is_grad_enabled():
        return before(parts, loss_input)
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: getattr(loss_input, name).clone().requires_grad_() for name in names}
        return before(parts, replace(loss_input, **copies))


RATIOS: dict[tuple[int, ...], Tensor] = {}


def first_ratio_of_shape(before: Callable[[Work], Tensor], w: Work) -> Tensor:
    """The ratio that the first batch of this shape had."""
    key = tuple(w.old.shape)
    if key not in RATIOS or RATIOS[key].dtype != w.old.dtype:
        RATIOS[key] = before(w)
    return RATIOS[key]


def noisy(gradient: Tensor) -> Tensor:
    """A gradient off by a rounding error or two, another one each time."""
    bits = torch.randint(-1, 2, gradient.shape, device=gradient.device)
    return gradient * (1 + 2 * torch.finfo(gradient.dtype).eps * bits)


def overwriting_grad(before: Entry, parts: Parts, loss_input: Any) -> Result:
    """The backward clears what the leaves had accumulated."""
    result = dict(before(parts, loss_input))
    leaves = [getattr(loss_input, name) for name in leaves_of(loss_input)]
    leaves = [leaf for leaf in leaves if leaf.is_leaf]

    def clear(incoming: Tensor) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return incoming

    if isinstance(result["loss"], Tensor) and result["loss"].requires_grad:
        result["loss"] = result["loss"].view_as(result["loss"])
        result["loss"].register_hook(clear)
    return result


DEFECTS = (
    Defect(
        name="incoming-gradient-ignored",
        sentence="The backward does not multiply with the gradient that arrives at the loss.",
        violates=("GRAD-1",),
        fix="Scale the saved gradient with grad_output.",
        change=replacing(incoming=torch.ones_like),
        seen=cite("NVIDIA/TransformerEngine#2139", "unslothai/unsloth-zoo#434"),
        usable_for="A loss that backward() is called on directly: no scaling, no accumulation, no mean over samples.",
        capabilities=(Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE),
    ),
    Defect(
        name="incoming-gradient-squared",
        sentence="The incoming gradient is multiplied in twice.",
        violates=("GRAD-1",),
        fix="Scale the saved gradient with grad_output once.",
        change=replacing(incoming=torch.square),
        usable_for="A loss that backward() is called on directly: no scaling, no accumulation, no mean over samples.",
        capabilities=(Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE),
    ),
    Defect(
        name="incoming-gradient-magnitude",
        sentence="The sign of the incoming gradient is lost.",
        violates=("GRAD-1",),
        fix="Scale the saved gradient with grad_output.",
        change=replacing(incoming=torch.abs),
        usable_for="Incoming gradients that are positive.",
        capabilities=(Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE),
    ),
    Defect(
        name="incoming-gradient-of-first-token",
        sentence="Every token is scaled with the incoming gradient of the first.",
        violates=("GRAD-1", "GJS-9"),
        fix="Scale each token with its own incoming gradient.",
        change=replacing(incoming=first_element),
        seen=cite("linkedin/Liger-Kernel#1298", "linkedin/Liger-Kernel#968"),
        capabilities=(Capability.DIVERGENCE,),
    ),
    Defect(
        name="teacher-made-trainable",
        sentence="The teacher's log-probs are made to require grad, and get one.",
        violates=("GRAD-2",),
        fix="Detach the teacher: it is a constant.",
        change=made_trainable("teacher_logprobs"),
        seen=cite("radixark/miles#1966", "huggingface/trl#6526"),
    ),
    Defect(
        name="base-made-trainable",
        sentence="The base log-probs are made to require grad, and get one.",
        violates=("GRAD-2",),
        fix="Detach base_logprobs: they are constants.",
        change=made_trainable("base_logprobs"),
        seen=cite("radixark/miles#1966"),
    ),
    Defect(
        name="old-not-detached",
        sentence="Gradient flows to the behaviour log-probs.",
        violates=("IS-7",),
        fix="Detach new - old before exp, not new alone.",
        change=both(
            around("accept", with_old_of_caller),
            replacing(log_ratio=lambda w: (w.chosen.detach() - w.old).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)),
        ),
        seen=cite("radixark/miles#1966"),
        usable_for="Behaviour log-probs computed under no_grad.",
    ),
    Defect(
        name="logits-overwritten",
        sentence="The caller's logits or hidden states are written over, with log-probs or less their maximum.",
        violates=("GRAD-3",),
        fix="Write into a buffer of your own.",
        change=touching(overwrite_logits),
        seen=cite("unslothai/unsloth#5002", "linkedin/Liger-Kernel#262"),
    ),
    Defect(
        name="teacher-overwritten",
        sentence="The teacher's log-probs are renormalised in place.",
        violates=("GRAD-3",),
        fix="Renormalise a copy.",
        change=touching(renormalise_teacher),
        seen=cite("huggingface/trl#5413"),
    ),
    Defect(
        name="old-overwritten",
        sentence="The log-ratio is computed in the memory of old_student_logprobs.",
        violates=("GRAD-3",),
        fix="Subtract into a tensor of your own.",
        change=touching(subtract_from_old),
        seen=cite("huggingface/trl#5413"),
    ),
    Defect(
        name="support-sorted-in-place",
        sentence="The support is sorted by token id in the caller's memory.",
        violates=("GRAD-3",),
        fix="Sort a copy.",
        change=touching(sort_teacher),
    ),
    Defect(
        name="strides-ignored",
        sentence="Logits or hidden states are read as if they were contiguous.",
        violates=("GRAD-4",),
        fix="Use the tensor's strides, or call contiguous().",
        change=reading(lambda loss_input: leading(loss_input, as_stored)),
        seen=cite("NVIDIA/TransformerEngine#2734", "unslothai/unsloth#10713", "vllm-project/vllm#42684"),
        usable_for=CONTIGUOUS,
    ),
    Defect(
        name="storage-offset-ignored",
        sentence="Logits or hidden states are read from the start of their storage.",
        violates=("GRAD-4",),
        fix="Use data_ptr() or storage_offset().",
        change=reading(lambda loss_input: leading(loss_input, lambda tensor: as_stored(tensor, from_start=True))),
        usable_for="Contiguous inputs that are no slices of larger tensors.",
    ),
    Defect(
        name="strides-of-old-ignored",
        sentence="old_student_logprobs is read as if it were contiguous.",
        violates=("GRAD-4",),
        fix="Use each tensor's own strides, or call contiguous().",
        change=reading(lambda loss_input: {"old_student_logprobs": as_stored(loss_input.old_student_logprobs)}),
        seen=cite("vllm-project/vllm#42684"),
        usable_for=CONTIGUOUS,
    ),
    Defect(
        name="strides-of-support-ignored",
        sentence="teacher_indices is read as if it were contiguous.",
        violates=("GRAD-4",),
        fix="Use each tensor's own strides, or call contiguous().",
        change=reading(lambda loss_input: {"teacher_indices": as_stored(loss_input.teacher_indices)}),
        seen=cite("vllm-project/vllm#42684"),
        usable_for=CONTIGUOUS,
    ),
    Defect(
        name="buffer-shared-between-calls",
        sentence="The gradient waits for the backward in a buffer that the next call of the same shape overwrites.",
        violates=("GRAD-5",),
        fix="Allocate the gradient per call, and save it for the backward.",
        change=precomputing(in_shared_buffers, scaled),
        usable_for=ONE_LIVE_GRAPH,
    ),
    Defect(
        name="count-of-latest-call",
        sentence="The backward divides by the number of tokens of the latest forward, whichever that was.",
        violates=("GRAD-5",),
        fix="Save the count with the graph it belongs to.",
        change=around("entry", divided_by_latest_count),
        usable_for=ONE_LIVE_GRAPH,
    ),
    Defect(
        name="saved-gradient-scaled-in-place",
        sentence="The backward scales the saved gradient in place, so a second backward sees it scaled twice.",
        violates=("GRAD-5",),
        fix="Multiply into a new tensor.",
        change=precomputing(fresh, scaled_in_place),
        seen=cite("Dao-AILab/quack#209"),
        usable_for="Graphs that are not retained, and incoming gradients of 1.",
    ),
    Defect(
        name="gradient-overwrites",
        sentence="The backward replaces what the inputs had accumulated in .grad.",
        violates=("GRAD-5",),
        fix="Return the gradient; autograd accumulates.",
        change=around("entry", overwriting_grad),
    ),
    Defect(
        name="grad-mode-required",
        sentence="Gradients are computed in the forward even under no_grad, which raises.",
        violates=("GRAD-6",),
        fix="Compute the gradient only where it is asked for; without grad mode, only the value.",
        change=precomputing(fresh, scaled, always_grad=False),
        seen=cite("fla-org/flash-linear-attention#1253"),
        usable_for="Training.",
    ),
    Defect(
        name="graph-under-no-grad",
        sentence="The loss carries a graph under no_grad.",
        violates=("GRAD-6",),
        fix="Leave grad mode as the caller set it.",
        change=around("entry", with_graph_always),
        seen=cite("fla-org/flash-linear-attention#1253"),
        usable_for="Training.",
    ),
    Defect(
        name="ratio-cached",
        sentence="The ratio of the first batch of a shape is reused for every later one.",
        violates=("IS-2", "IS-3"),
        fix="Compute the ratio from this call's log-probs.",
        change=around("ratio", first_ratio_of_shape),
        seen=cite("huggingface/trl#5413"),
    ),
    Defect(
        name="gradient-not-repeatable",
        sentence="The gradient's last bits differ from call to call.",
        violates=("GRAD-7",),
        fix="Accumulate in a fixed order, without atomics.",
        change=replacing(logits_gradient=lambda w, gradient: noisy(gradient)),
        usable_for="Everything but bitwise reproduction.",
    ),
)
