"""Which dtypes a run judges: asked for, claimed, or offered without complaint."""

from __future__ import annotations

from collections.abc import Callable

from sdpo_conformance.cases.case import Case
from sdpo_conformance.judging.call import ImplementationError, evaluate
from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.spec import Spec

DEFAULT = ("float32", "bfloat16", "float16")
REFUSALS = ("ValueError", "TypeError", "NotImplementedError")
LOSS_ENTRIES = (Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE)


def dtypes_for(
    implementation: Implementation,
    spec: Spec,
    entry: Capability,
    device: str,
    asked: tuple[str, ...],
    keep: Callable[[Case], None],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The dtypes to judge ``entry`` in, and those it refused with the reason it gave. ``keep`` is told each case before
    the entry is called on it, for the call may end the process.

    Where neither the user nor ``SDPO_CLAIMS`` names dtypes, a clear refusal (ValueError, TypeError or
    NotImplementedError that speaks of the dtype) of a half-precision dtype means that it is not offered.
    Any other failure is a verdict, and left to the requirements.
    """
    if asked:
        return asked, {}
    if implementation.claims.dtypes is not None:
        return implementation.claims.dtypes, {}
    refused: dict[str, str] = {}
    if entry in LOSS_ENTRIES:
        function = getattr(implementation.object, entry.value)
        for name in spec.dtypes:
            case = spec.parts.ordinary(name, entry)
            keep(case)
            try:
                evaluate(function, entry, case, device)
            except ImplementationError as error:
                if is_refusal(error, name):
                    refused[name] = error.summary
    kept = tuple(name for name in spec.dtypes if name not in refused)
    return (kept, refused) if kept else (spec.dtypes, {})


def is_refusal(error: ImplementationError, dtype: str) -> bool:
    """Whether an error says, on purpose, that a dtype is not supported."""
    text = error.summary.lower()
    mentions = (
        "dtype",
        dtype,
        dtype.replace("float", "fp"),
        dtype.replace("bfloat", "bf"),
        "half",
        "precision",
    )
    return any(f"raised {kind}" in error.summary for kind in REFUSALS) and any(word in text for word in mentions)
