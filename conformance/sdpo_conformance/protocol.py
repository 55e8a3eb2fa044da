"""What an implementation is called with and what it must return.

The field names are those of CLaaS (``claas/core/types.py`` of kfallah/CLaaS at e2331f7), so that its own
``compute_sdpo_loss`` works unmodified. An implementation needs none of these classes: it receives objects
with these attributes and returns a mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
"""What ``--dtype`` and ``SDPO_CLAIMS`` may name."""

AXES = ("dp", "cp", "tp")
"""Axes of a mesh, outermost first: batch rows, positions, vocabulary."""

RATIO_LOG_CLAMP = 20.0
"""The log of the importance ratio, and the anchor's log-ratio, are clamped to +- this before exp."""

MASS_FLOOR = 1e-8
"""The support's probability mass is divided out only down to this."""

RKL_FLOOR_LOGPROB = -20.0
"""The teacher's log-prob of a response token outside its top-k, at alpha >= 1."""


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters of one distillation batch, with CLaaS's defaults.

    ``alpha`` in [0, 1] weighs the teacher in the mixture; ``is_clip`` > 0 caps the importance ratio;
    ``learning_rate``, ``max_grad_norm``, ``teacher_top_k`` and ``steps_per_batch`` concern ``distill`` alone.
    """

    alpha: float = 0.5
    is_clip: float = 5.0
    kl_reg_weight: float = 0.0
    learning_rate: float = 3e-5
    max_grad_norm: float = 1.0
    teacher_top_k: int = 100
    steps_per_batch: int = 1


@dataclass
class SDPOLossInput:
    """Argument of ``compute_sdpo_loss``.

    Shapes: ``student_logits`` (B, T, V); ``teacher_logprobs`` and ``teacher_indices`` (B, T, K), the indices
    distinct within a token; ``base_logprobs``, ``response_mask``, ``old_student_logprobs`` and
    ``response_ids`` (B, T). Log-probs in nats. Indices int64 or int32, mask bool, integer or float.
    """

    student_logits: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor
    training: TrainingConfig


@dataclass
class FusedSDPOLossInput:
    """Argument of ``compute_fused_sdpo_loss``: ``SDPOLossInput`` with ``student_hidden`` (B, T, H) and
    ``lm_head_weight`` (V, H) in place of the logits ``student_hidden @ lm_head_weight.T``."""

    student_hidden: Tensor
    lm_head_weight: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor
    training: TrainingConfig


@dataclass(kw_only=True)
class ShardedSDPOLossInput(SDPOLossInput):
    """``SDPOLossInput`` on one rank of a ``DeviceMesh`` whose axes are some of dp, cp and tp.

    tp: ``student_logits`` holds the columns of the ids from ``vocab_start`` on; ids from ``vocab_size`` on are
    padding and count for nothing. All ids are global. dp, cp: the rows and positions of this rank.
    """

    mesh: Any
    vocab_start: int
    vocab_size: int


@dataclass(kw_only=True)
class ShardedFusedSDPOLossInput(FusedSDPOLossInput):
    """``FusedSDPOLossInput`` on one rank: ``lm_head_weight`` holds the rows of the ids from ``vocab_start`` on, the
    hidden states are whole on every rank of tp."""

    mesh: Any
    vocab_start: int
    vocab_size: int


class SDPOLossResult(TypedDict):
    """What both loss entries return: ``loss`` 0-dim and differentiable; the rest a float or a 0-dim tensor
    without graph."""

    loss: Tensor
    distill_loss: float | Tensor
    kl_reg: float | Tensor
    mean_is_ratio: float | Tensor
    clip_fraction: float | Tensor


METRIC_KEYS = ("distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction")
RESULT_KEYS = ("loss", *METRIC_KEYS)


@dataclass(frozen=True)
class Sample:
    """One element of ``distill``'s batch: token ids, and the sampler's log-probs of the response (nats,
    one per response token) or None where the sampler recorded nothing."""

    prompt_token_ids: Sequence[int]
    response_token_ids: Sequence[int]
    teacher_prompt_token_ids: Sequence[int]
    response_logprobs: Sequence[float] | None


class StepMetrics(TypedDict):
    """One entry of ``per_step_metrics``: means over samples taken before the update; ``grad_norm`` before
    clipping; ``step`` counts from 1."""

    step: int
    total_loss: float
    distill_loss: float
    kl_reg: float
    mean_is_ratio: float
    clip_fraction: float
    grad_norm: float


class DistillResult(TypedDict):
    """What ``distill`` returns; the model it was given carries the updated adapter."""

    per_step_metrics: list[StepMetrics]


class Capability(StrEnum):
    """The attributes of an implementation that the suite knows how to judge."""

    LOSS = "compute_sdpo_loss"
    FUSED = "compute_fused_sdpo_loss"
    DIVERGENCE = "compute_divergence"
    RESPONSE_LOGPROBS = "compute_response_logprobs"
    TEACHER_TOPK = "compute_teacher_topk"
    DISTILL = "distill"
    UPDATE_TEACHER = "update_teacher"


@dataclass(frozen=True)
class Entry:
    """One row of the table of entries. ``label``: in a verdict; ``column``: over its column in a report, empty for
    entries whose requirements have no other; ``suffix``: what the file name of a record carries; ``signature``: for
    people; ``from_hidden``: it takes hidden states and a head."""

    label: str
    column: str
    suffix: str
    signature: str
    from_hidden: bool = False


ENTRIES: Mapping[Capability, Entry] = {
    Capability.LOSS: Entry(
        "loss", "loss", "", "(loss_input) -> {loss, distill_loss, kl_reg, mean_is_ratio, clip_fraction}"
    ),
    Capability.FUSED: Entry(
        "fused loss", "fused", "fused", "(loss_input) -> the same, from student_hidden and lm_head_weight", True
    ),
    Capability.DIVERGENCE: Entry(
        "divergence",
        "divergence",
        "divergence",
        "(student_hidden, lm_head_weight, teacher_logprobs, teacher_indices, alpha) -> (B, T)",
        True,
    ),
    Capability.RESPONSE_LOGPROBS: Entry(
        "response log-probs", "", "", "(student_hidden, lm_head_weight, response_ids) -> (B, T)", True
    ),
    Capability.TEACHER_TOPK: Entry(
        "teacher top-k", "", "", "(teacher_hidden, lm_head_weight, k) -> (logprobs, indices), each (B, T, K)", True
    ),
    Capability.DISTILL: Entry(
        "trainer", "", "", '(model, samples, training, optimizer_cls) -> {"per_step_metrics": [...]}'
    ),
    Capability.UPDATE_TEACHER: Entry(
        "teacher update",
        "",
        "",
        "(teacher, student, teacher_update_rate) -> the teacher's state dict, or None where it was updated in place; "
        "both are state dicts of parameters, name -> tensor",
    ),
}
"""What an implementation may offer, by attribute. Everything that names an entry reads it here."""


@dataclass(frozen=True)
class Claims:
    """``SDPO_CLAIMS`` of an implementation, or the defaults where it says nothing.

    ``dtypes``: those it supports (None: it says nothing, and a clear refusal counts as not supported).
    ``devices``: device types it runs on (None: any). ``max_steps_per_batch``: the most steps ``distill``
    takes (None: any). ``expected_failures``: requirement id -> reason; strict, an unexpected pass is reported.
    ``mesh``: the axes out of dp, cp and tp that it can be cut along (None: it says nothing). ``dtensor``: tensors
    that tp cuts, and those beside them, are to be handed over as DTensors.
    """

    dtypes: tuple[str, ...] | None = None
    devices: tuple[str, ...] | None = None
    max_steps_per_batch: int | None = None
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    mesh: tuple[str, ...] | None = None
    dtensor: bool = False

    @classmethod
    def read(cls, declared: Any) -> Claims:
        """Validate what a module declares; raises ValueError naming the entry that is wrong."""
        if declared is None:
            return cls()
        if isinstance(declared, cls):
            return declared
        if not isinstance(declared, Mapping):
            raise ValueError(f"SDPO_CLAIMS must be a mapping, got {type(declared).__name__}")
        known = {"dtypes", "devices", "max_steps_per_batch", "expected_failures", "mesh", "dtensor"}
        if unknown := sorted(set(declared) - known):
            raise ValueError(f"SDPO_CLAIMS has unknown entries {unknown}; known: {sorted(known)}")
        dtypes = listed(declared, "dtypes")
        if dtypes is not None:
            dtypes = tuple(name.removeprefix("torch.") for name in dtypes)
            if not dtypes or (bad := [name for name in dtypes if name not in DTYPE_NAMES]):
                raise ValueError(
                    f"SDPO_CLAIMS['dtypes'] must name some of {list(DTYPE_NAMES)}, got {bad if dtypes else []}"
                )
        devices = listed(declared, "devices")
        steps = declared.get("max_steps_per_batch")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"SDPO_CLAIMS['max_steps_per_batch'] must be a positive integer, got {steps!r}")
        failures = declared.get("expected_failures") or {}
        if not isinstance(failures, Mapping) or not all(
            isinstance(key, str) and isinstance(reason, str) and reason.strip() for key, reason in failures.items()
        ):
            raise ValueError("SDPO_CLAIMS['expected_failures'] must map requirement ids to non-empty reasons")
        mesh = listed(declared, "mesh")
        if mesh is not None and not set(mesh) <= set(AXES):
            raise ValueError(f"SDPO_CLAIMS['mesh'] must list some of {list(AXES)}, got {list(mesh)}")
        return cls(
            dtypes=dtypes,
            devices=devices,
            max_steps_per_batch=steps,
            expected_failures=dict(failures),
            mesh=mesh,
            dtensor=bool(declared.get("dtensor", False)),
        )


def listed(declared: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """What ``SDPO_CLAIMS`` lists under a key, or None; raises ValueError for what is no list, a bare string among
    them."""
    value = declared.get(key)
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence | Set):
        raise ValueError(f"SDPO_CLAIMS['{key}'] must be a list, as in ['{value}'], got {value!r}")
    return tuple(str(one) for one in value)
