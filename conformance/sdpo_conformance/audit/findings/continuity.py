"""Whether the adapter after the run is the one before it, further on: layer by layer."""

from __future__ import annotations

from collections import defaultdict

from sdpo_conformance.audit.adapter_change import TensorChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.findings.partly_trained import shrunk_to
from sdpo_conformance.audit.findings.weight_growth import beyond_adam, furthest

#: The cosine of lora_A before and after that is no more than chance, over at least so many elements.
_CHANCE = 0.1
_FEWEST_ELEMENTS = 1024
#: Over fewer elements, these: standard deviations of a cosine that is chance, and the excess over AdamW's bound.
_FEWEST_FAR = 64
_DEVIATIONS = 3.0
_EXCESS = 2.0
#: Methods that merge the adapter into the base and begin anew.
_RESTARTS = r"relora|reset_lora|lora_reset|restart|merge_and_reinit|merge_every|rollback|roll_back"
_SHOWN = 5


def layers_identical(evidence: Evidence) -> Verdicts:
    """Layers that hold the same tensors after the run, and did not before."""
    change = evidence.change
    if change is None or change.before is None or change.before.fresh:
        return
    same: dict[tuple[object, ...], list[TensorChange]] = defaultdict(list)
    for tensor in change.compared:
        if tensor.place.layer is not None and tensor.norm_after > 0 and tensor.place.part in ("A", "B"):
            place = (tensor.place.stack, tensor.place.kind, tensor.place.part)
            same[(*place, tensor.norm_after, tensor.max_abs_after, tensor.numel)].append(tensor)
    copies = [group for group in same.values() if len({t.norm_before for t in group}) == len(group) > 1]
    of = len([t for t in change.compared if t.place.part in ("A", "B")])
    if not copies or sum(map(len, copies)) < of / 2:
        return
    layers = sorted({t.place.layer for group in copies for t in group if t.place.layer is not None})
    yield Finding(
        id="layers-identical",
        severity=Severity.ERROR,
        statement=f"layers {', '.join(map(str, layers[:12]))} hold the same tensors, which differed before the run",
        evidence=tuple(f"{shown(g[0].key)} and {len(g) - 1} more: norm {g[0].norm_after:.9g}" for g in copies[:_SHOWN]),
        cause="the file was written from one layer's tensors",
        next_step="save from the model's own state dict, and compare a layer of the file with the model's",
        data={"layers": len(layers)},
    )


def adapter_restarted(evidence: Evidence) -> Verdicts:
    """lora_A of the same size and with no more in common than chance: drawn anew, not trained on."""
    change = evidence.change
    if change is None or change.before is None or change.before.fresh:
        return
    rows = [
        (t.numel, t.norm_before, t.norm_after, t.norm_delta)
        for t in change.compared
        if t.place.part == "A" and t.norm_before and t.norm_delta is not None
    ]
    was, now = sum((b or 0.0) ** 2 for _, b, _, _ in rows), sum(a**2 for _, _, a, _ in rows)
    dots = [((b or 0.0) ** 2 + a**2 - (d or 0.0) ** 2) / 2 for _, b, a, d in rows]
    elements = sum(n for n, *_ in rows)
    if not was or not 0.25 < now / was < 4:
        return
    chance, far = _CHANCE, None
    if elements < _FEWEST_ELEMENTS:  # chance alone leaves a larger cosine: how far it went has to say so, too
        far = furthest(evidence)
        if elements < _FEWEST_FAR or far is None or far.excess < _EXCESS or far.tensor is None:
            return
        chance = _DEVIATIONS / elements**0.5
    cosine = sum(dots) / (was * now) ** 0.5
    apart = all(abs(dot) < 0.5 * (b or 0.0) * a for dot, (_, b, a, _) in zip(dots, rows, strict=True))
    if abs(cosine) >= chance or not apart:
        return
    yield Finding(
        id="adapter-restarted",
        severity=Severity.WARNING,
        statement=f"lora_A after the run has nothing in common with lora_A before it: cosine {cosine:.2g}",
        evidence=(
            f"{len(rows)} tensors, of {(now / was) ** 0.5:.3g} times the norm",
            *([f"an element moved {far.excess:.3g} times as far as AdamW can in {far.steps} updates"] if far else ()),
        ),
        cause="the adapter was initialised anew on resuming, or 'before' is another adapter; or restarts, as of ReLoRA",
        next_step="compare the checkpoints around the resumption; name the right start with --before",
        data={"cosine": cosine},
    )


def adapter_fell_back(evidence: Evidence) -> Verdicts:
    """lora_B that loses most of its norm from one checkpoint to the next, faster than updates can take it away."""
    fall, metrics = evidence.fall, evidence.metrics
    if fall is None or metrics is None or evidence.settings.says(_RESTARTS):
        return
    rates = [r for step in metrics.steps if (r := step.values.get("learning_rate", 0.0)) > 0]
    last = max(step.number for step in metrics.steps)
    if not rates or not fall.end - 1 <= last or all(shrunk_to(t) for t in fall.change.compared if t.norm_before):
        return  # weight decay alone is told of elsewhere
    steps = fall.end - fall.begin
    tensor, excess = beyond_adam(fall.change, max(rates), steps)
    if tensor is None:
        return
    yield Finding(
        id="adapter-fell-back",
        severity=Severity.WARNING,
        statement=f"lora_B lost {1 - fall.left:.0%} of its norm from {shown(fall.first)} to {shown(fall.second)}",
        evidence=(
            f"an element moved by {tensor.max_abs_delta:.3g}: {excess:.3g} times what AdamW can do in {steps} update(s)"
            f" at a rate of {max(rates):g}",
            f"it took up to {fall.begin} steps to get there",
        ),
        cause=(
            "older weights came back: an optimizer's stale master copy written over the restored ones, or a start anew"
            " on resuming"
        ),
        next_step="compare the weights right after loading with those after the first step",
        data={"left": fall.left, "excess": excess},
    )


CHECKS = (
    Check("layers-identical", "layers that hold the same tensors", layers_identical),
    Check("adapter-restarted", "lora_A drawn anew", adapter_restarted),
    Check("adapter-fell-back", "a checkpoint that went back to an older state", adapter_fell_back),
)
