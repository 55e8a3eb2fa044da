"""One input of the loss, frozen: the tensors, the config, and how they are handed over.

A case holds contiguous CPU tensors; ``layout`` says which memory layout the implementation gets. Cases are
saved as a .safetensors file with the config in its metadata, readable without this package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.files import write_tensors
from sdpo_conformance.judging.call import is_fused_entry
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.oracle import LossTruth, sdpo_loss

LAYOUTS = (
    "contiguous",
    "transposed",
    "strided",
    "offset",
    "sliced",
    "expanded",
    "odd:base_logprobs",
    "odd:old_student_logprobs",
    "odd:response_mask",
    "odd:response_ids",
    "odd:teacher_logprobs",
    "odd:teacher_indices",
)
"""How the tensors lie in memory; ``sliced``: cut out of longer rows; ``odd:FIELD``: that one transposed, the others
contiguous."""

PER_TOKEN_FIELDS = ("base_logprobs", "response_mask", "old_student_logprobs", "response_ids")
SHARED_FIELDS = ("teacher_logprobs", "teacher_indices", *PER_TOKEN_FIELDS)


@dataclass(frozen=True, eq=False)
class LossCase:
    """``loss_input`` on the CPU; ``trainable_head``: whether the head asks for a gradient (fused only);
    ``incoming``: the gradient that arrives at the loss; ``name`` of a recorded case, or empty."""

    loss_input: SDPOLossInput | FusedSDPOLossInput
    layout: str = "contiguous"
    trainable_head: bool = False
    incoming: float = 1.0
    name: str = ""

    @property
    def fused(self) -> bool:
        return isinstance(self.loss_input, FusedSDPOLossInput)

    @property
    def training(self) -> TrainingConfig:
        return self.loss_input.training

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The fields whose gradient the implementation owes."""
        if not self.fused:
            return ("student_logits",)
        return ("student_hidden", "lm_head_weight") if self.trainable_head else ("student_hidden",)

    @cached_property
    def truth(self) -> LossTruth:
        return sdpo_loss(self.loss_input)

    @property
    def vocabulary(self) -> int:
        loss_input = self.loss_input
        if isinstance(loss_input, FusedSDPOLossInput):
            return loss_input.lm_head_weight.shape[0]
        return loss_input.student_logits.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its protocol name."""
        return {key: value for key, value in vars(self.loss_input).items() if isinstance(value, Tensor)}

    def with_fields(self, **changes: Any) -> LossCase:
        """The same case with fields of the input replaced; a name no longer applies."""
        return replace(self, loss_input=replace(self.loss_input, **changes), name="")

    def with_training(self, **changes: Any) -> LossCase:
        """The same case with hyperparameters replaced."""
        return self.with_fields(training=replace(self.training, **changes))

    def rows(self, keep: Tensor) -> LossCase:
        """The case with only the batch rows ``keep`` (int64), in that order."""
        changes = {key: value[keep].contiguous() for key, value in self.tensors().items() if key != "lm_head_weight"}
        return self.with_fields(**changes)

    def columns(self, keep: Sequence[int]) -> LossCase:
        """The case with only the positions ``keep`` of each row, in that order."""
        changes = {
            key: value[:, list(keep)].contiguous() for key, value in self.tensors().items() if key != "lm_head_weight"
        }
        return self.with_fields(**changes)

    def with_tokens_alike(self) -> LossCase:
        """The case with its first counted token at every position, under the mask as it is."""
        counted = self.loss_input.response_mask.nonzero().tolist()
        b, t = counted[0] if counted else (0, 0)
        shape = self.loss_input.response_mask.shape
        changes = {
            key: value[b, t].expand(*shape, *value.shape[2:]).contiguous()
            for key, value in self.tensors().items()
            if key not in ("lm_head_weight", "response_mask")
        }
        return self.with_fields(**changes)

    def tokens_alone(self) -> Iterator[LossCase]:
        """Every token that counts as a batch of its own, (1, 1), with mask 1; 64 spread over the case where there
        are more."""
        counted = self.loss_input.response_mask.nonzero().tolist()
        for b, t in counted[:: -(-len(counted) // 64) or 1]:
            token = self.rows(torch.tensor([b])).columns([t])
            mask = torch.ones_like(token.loss_input.response_mask)
            yield replace(token.with_fields(response_mask=mask), layout="contiguous")

    def to_fused(self) -> LossCase:
        """The same numbers through hidden states: the head is the identity and the hidden states the logits.

        Exact: the product of a row with the identity adds zeros. Logits must be finite.
        """
        loss_input = self.loss_input
        assert isinstance(loss_input, SDPOLossInput)
        fields = {key: getattr(loss_input, key) for key in SHARED_FIELDS}
        logits = loss_input.student_logits
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        return replace(
            self,
            loss_input=FusedSDPOLossInput(logits, head, training=self.training, **fields),
            name=self.name,
        )

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None, scratch: bool = False) -> None:
        """Write ``path`` (.safetensors) whole, with ``extra`` tensors beside the inputs; ``scratch``: in place."""
        metadata = {
            "training": json.dumps(asdict(self.training)),
            "layout": self.layout,
            "trainable_head": json.dumps(self.trainable_head),
            "incoming": repr(self.incoming),
            "name": self.name,
        }
        write_tensors(path, {**self.tensors(), **(extra or {})}, metadata, scratch)

    @classmethod
    def load(cls, path: Path) -> LossCase:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(path)
        kind = FusedSDPOLossInput if "student_hidden" in tensors else SDPOLossInput
        leading = ("student_hidden", "lm_head_weight") if kind is FusedSDPOLossInput else ("student_logits",)
        fields = {key: tensors[key] for key in (*leading, *SHARED_FIELDS)}
        return cls(
            loss_input=kind(training=TrainingConfig(**json.loads(metadata["training"])), **fields),
            layout=metadata["layout"],
            trainable_head=json.loads(metadata["trainable_head"]),
            incoming=float(metadata["incoming"]),
            name=metadata["name"],
        )


def vectors_directory() -> Path:
    """Where the recorded loss vectors lie: package data, a copy of ``cases/loss`` in the repository."""
    return Path(str(files("sdpo_conformance") / "vectors" / "loss"))


def recorded_cases(directory: Path | None = None) -> Iterator[tuple[LossCase, dict[str, Any]]]:
    """Each recorded upstream case with its manifest entry (``expected`` among it), in float64."""
    directory = directory or vectors_directory()
    manifest = json.loads((directory / "manifest.json").read_text())
    tensors = load_file(directory / manifest["tensors"])
    for name, entry in manifest["cases"].items():
        fields = {key: tensors[f"{name}/{key}"] for key in ("student_logits", *SHARED_FIELDS)}
        loss_input = SDPOLossInput(training=TrainingConfig(**entry["config"]), **fields)
        yield LossCase(loss_input, name=name), {**entry, "gradient": tensors[f"{name}/grad_student_logits"]}


def ordinary_case(dtype: str, entry: Capability) -> LossCase:
    """One ordinary on-policy token pair in one dtype."""
    logits = torch.tensor([[[0.5, -0.25, 1.0, 0.0], [1.0, 0.5, -0.5, 0.25]]], dtype=DTYPES[dtype])
    support = torch.tensor([[[2, 0], [0, 1]]])
    logprobs = logits.double().log_softmax(-1)
    chosen = logprobs[..., :1].squeeze(-1)
    case = LossCase(
        SDPOLossInput(
            student_logits=logits,
            teacher_logprobs=logprobs.gather(-1, support).to(DTYPES[dtype]),
            teacher_indices=support,
            base_logprobs=chosen.to(DTYPES[dtype]),
            response_mask=torch.ones(1, 2),
            old_student_logprobs=chosen.float(),
            response_ids=torch.zeros(1, 2, dtype=torch.int64),
            training=TrainingConfig(),
        )
    )
    return case.to_fused() if is_fused_entry(entry) else case
