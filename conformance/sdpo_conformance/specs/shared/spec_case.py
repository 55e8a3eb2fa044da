"""One input of a spec's loss, frozen: the tensors, the options, how they are handed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.files import write_tensors
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth
from sdpo_conformance.specs.shared.yardstick import Eager, Errors, Expectations, eager_of, expectations_of


@dataclass(frozen=True)
class CaseKind:
    """What a spec's inputs are: ``input`` and ``training`` types; ``mask`` the field of token weights (B, T), ``rows``
    that of row weights (B,) or ""; ``ids``: a (B, T) field, for sizes. ``oracle`` (input, published), ``errors``
    (input, truth), ``plain``: the loss with every stage in the dtypes it is given."""

    spec: str
    input: type
    training: type
    mask: str
    rows: str
    ids: str
    oracle: Callable[..., SpecTruth]
    errors: Callable[[Any, SpecTruth], Errors]
    plain: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class SpecCase:
    """``loss_input`` on the CPU; ``layout`` of its tensors in memory; ``incoming``: the gradient that arrives at the
    loss; ``name`` of a recorded case, or empty."""

    loss_input: Any
    kind: CaseKind
    layout: str = "contiguous"
    incoming: float = 1.0
    name: str = ""

    fused = False
    trainable_head = False
    differentiable = ("student_logits",)

    @property
    def training(self) -> Any:
        return self.loss_input.training

    @cached_property
    def truth(self) -> SpecTruth:
        """The limit where the published code is not finite."""
        truth: SpecTruth = self.kind.oracle(self.loss_input)
        return truth

    @cached_property
    def published(self) -> bool:
        """Whether the published code is finite here, and does not refuse."""
        try:
            truth = self.kind.oracle(self.loss_input, True)
        except ValueError:
            return False
        return bool(torch.isfinite(truth.loss)) and bool(torch.isfinite(truth.grad_logits).all())

    @cached_property
    def errors(self) -> Errors:
        return self.kind.errors(self.loss_input, self.truth)

    def eager(self) -> Eager:
        return eager_of(self.kind.plain, self.loss_input, self.incoming)

    @cached_property
    def expectations(self) -> Expectations:
        """What the loss entry must return where the published code is finite."""
        return self._expectations(self.published)

    @cached_property
    def limits(self) -> Expectations:
        """What it should return where the published code is not finite: the bounds are the analytic ones."""
        return self._expectations(False)

    def _expectations(self, finite: bool) -> Expectations:
        masks = tuple(name for name in (self.kind.mask, self.kind.rows) if name)
        return expectations_of(self.tensors(), masks, self.incoming, self.truth, self.errors, self.eager, finite)

    @property
    def size(self) -> tuple[int, ...]:
        """What makes one failing example easier to read than another."""
        logits = self.loss_input.student_logits
        return int(self.layout != "contiguous"), logits.shape[0] * logits.shape[1], 0, int(logits.shape[-1])

    @property
    def vocabulary(self) -> int:
        return int(self.loss_input.student_logits.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field."""
        return {key: value for key, value in vars(self.loss_input).items() if isinstance(value, Tensor)}

    def with_fields(self, **changes: Any) -> SpecCase:
        """The same case with fields of the input replaced; a name no longer applies."""
        return replace(self, loss_input=replace(self.loss_input, **changes), name="")

    def with_training(self, **changes: Any) -> SpecCase:
        """The same case with options replaced."""
        return self.with_fields(training=replace(self.training, **changes))

    def rows(self, keep: Tensor) -> SpecCase:
        """Only the batch rows ``keep`` (int64), in that order."""
        return self.with_fields(**{key: value[keep].contiguous() for key, value in self.tensors().items()})

    def columns(self, keep: Sequence[int]) -> SpecCase:
        """Only the positions ``keep`` of each row, in that order."""
        changes = {key: value[:, list(keep)].contiguous() for key, value in self.tensors().items() if value.dim() > 1}
        return self.with_fields(**changes)

    def with_rows_alike(self) -> SpecCase:
        """The first row in every row's place, as an expanded tensor has it."""
        changes = {key: value[:1].expand_as(value).contiguous() for key, value in self.tensors().items()}
        return self.with_fields(**changes)

    def tokens_alone(self) -> Iterator[SpecCase]:
        """Every token that counts as a batch of its own, its row counting, 32 of them spread over the case."""
        mask = getattr(self.loss_input, self.kind.mask)
        rows = getattr(self.loss_input, self.kind.rows) if self.kind.rows else None
        counted = (mask.double() if rows is None else mask.double() * rows.double().unsqueeze(-1)).nonzero().tolist()
        for b, t in counted[:: -(-len(counted) // 32) or 1]:
            token = self.rows(torch.tensor([b])).columns([t])
            ones = {self.kind.mask: torch.ones_like(getattr(token.loss_input, self.kind.mask))}
            if rows is not None:
                ones[self.kind.rows] = torch.ones_like(rows[:1])
            yield replace(token.with_fields(**ones), layout="contiguous")

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None, scratch: bool = False) -> None:
        """Write ``path`` (.safetensors) atomically, with ``extra`` tensors beside the inputs."""
        metadata = {
            "spec": self.kind.spec,
            "training": json.dumps(asdict(self.training)),
            "layout": self.layout,
            "incoming": repr(self.incoming),
            "name": self.name,
        }
        write_tensors(path, {**self.tensors(), **(extra or {})}, metadata, scratch)

    @classmethod
    def load(cls, path: Path, kind: CaseKind) -> SpecCase:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        known = {one.name for one in fields(kind.input)}
        tensors = {key: value for key, value in load_file(path).items() if key in known}
        training = kind.training(**json.loads(metadata["training"]))
        loss_input = kind.input(training=training, **tensors)
        return cls(loss_input, kind, metadata["layout"], float(metadata["incoming"]), metadata["name"])
