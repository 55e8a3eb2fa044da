"""Whether a merged model holds the adapter as its config scales it."""

from __future__ import annotations

from collections.abc import Iterator

from sdpo_conformance.audit.adapter import Adapter
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

#: How far from the config's scale the factor has to be, as a part of it, and how little may be no multiple of B A.
_OFF = 0.02
_ASIDE = 0.05
_ROUNDINGS = 4.0
#: Settings of tools that weigh an adapter on purpose.
_WEIGHED = r"(merge|lora|adapter|task)_?(weight|strength|multiplier|ratio|lambda)|^(weights?|density|normalize)$"


def merged_scale(evidence: Evidence) -> Verdicts:
    """merged - base is a multiple of B A, and not the one that the config asks for."""
    merged, change = evidence.merged, evidence.change
    if merged is None or change is None or evidence.settings.given(_WEIGHED):
        return
    adapter = change.after
    scale, kind = adapter.scale, str(adapter.config.get("peft_type", "LORA")).upper()
    if not scale or kind != "LORA" or adapter.config.get("use_dora") or adapter.config.get("fan_in_fan_out"):
        return
    off = abs(merged.factor - scale) * merged.update
    straight = merged.aside <= _ASIDE * abs(merged.factor) * merged.update + _ROUNDINGS * merged.rounding
    if not straight or off <= _OFF * scale * merged.update + _ROUNDINGS * merged.rounding:
        return
    name = next((name for value, name in _mistakes(adapter, scale) if abs(merged.factor - value) <= _OFF * scale), "")
    yield Finding(
        id="merged-scale",
        severity=Severity.ERROR if name or merged.equal else Severity.WARNING,
        statement=(
            f"{shown(merged.merged)} is {shown(merged.base)} to the last bit: the adapter is not in it"
            if merged.equal
            else f"{shown(merged.merged)} holds {merged.factor:.4g} B A, where adapter_config.json asks for {scale:.4g}"
        ),
        evidence=(
            f"merged - base against B A over {merged.modules} module(s): {merged.factor:.6g}",
            *((f"that is {name}",) if name and not merged.equal else ()),
        ),
        cause="merged by hand or by a tool that reads alpha, rank or rsLoRA otherwise, or more or less than once",
        next_step="merge again with PEFT's merge_and_unload from the unchanged base model",
        data={"factor": merged.factor, "scale": scale},
    )


def _mistakes(adapter: Adapter, scale: float) -> Iterator[tuple[float, str]]:
    """What a merge puts in front of B A by mistake."""
    rank, alpha = float(adapter.config["r"]), float(adapter.config["lora_alpha"])
    yield 0.0, "nothing"
    yield 1.0, "no scale at all"
    yield alpha / rank, "alpha / r, without rsLoRA's square root"
    yield alpha / rank**0.5, "alpha / sqrt(r), as rsLoRA has it"
    yield alpha, "alpha, not divided by the rank"
    yield 2 * scale, "the adapter twice"
    yield -scale, "the adapter taken away"
    yield 1 / rank, "1 / r, without alpha"


CHECKS = (Check("merged-scale", "a merged model that holds another multiple of the adapter", merged_scale),)
