"""A run that audits itself while it goes on: two lines in any loop.

recorder = RunRecorder("runs/today", model, steps_per_batch=4)            # before the loop
recorder.step(metrics, old_logprobs=old)                                  # after each optimizer step

It leaves behind what `sdpo-conformance audit runs/today` reads: `before/` and `after/` (PEFT adapters), `training.json`
and `metrics.jsonl`. And it warns as soon as the second step of a batch shows that the behaviour log-probs were not
refreshed, or that the metrics stand still.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.findings import Evidence, Finding, Severity
from sdpo_conformance.audit.findings.liveness import dead_run
from sdpo_conformance.audit.findings.refresh import behaviour_not_refreshed
from sdpo_conformance.audit.findings.staleness import stale_metrics
from sdpo_conformance.audit.metrics import Batch, RunMetrics, Step
from sdpo_conformance.audit.metrics.row_reader import RowReader
from sdpo_conformance.files import write_json

#: A sum over each trained tensor.
Fingerprint = tuple[float, ...]
#: Rows that a dead run is looked for in.
_RECENT = 8


class RunWarning(UserWarning):
    """Something that an audit of the finished run would report, said while the run goes on."""


class RunRecorder:
    """Writes a run's folder as it goes on. Under torch.distributed rank 0 alone writes and warns.

    `steps_per_batch` is the number of optimizer steps between two samplings; without it nothing says where a batch
    ends, and the refresh is judged by `old_logprobs` alone. `settings` are further fields of training.json
    (`learning_rate`, `alpha`, `is_clip`, `kl_reg_weight`). A folder that holds a run already is gone on with: its
    `before/` stays.

    Raises AuditError when the folder cannot be written, ValueError for a `steps_per_batch` below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any = None,
        *,
        steps_per_batch: int | None = None,
        settings: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if steps_per_batch is not None and steps_per_batch < 1:
            raise ValueError(f"steps_per_batch must be at least 1, got {steps_per_batch}")
        self.folder = Path(folder)
        self._model = model
        self._steps_per_batch = steps_per_batch
        self._warn = warn or (lambda text: warnings.warn(text, RunWarning, stacklevel=4))
        self._writes = _is_main_process()
        self._reader = RowReader(shown(self.folder))
        self._batch: list[Step] = []
        self._recent: list[Step] = []
        self._number = 0
        self._said: set[str] = set()
        self._old_logprobs = b""
        self._weights: Fingerprint | None = None  # now, and before the last step
        self._weights_before: Fingerprint | None = None
        self._log: TextIO | None = None
        if self._writes:
            self._open(settings or {})
        self._weights = self._fingerprint()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(
        self, metrics: Mapping[str, Any], *, old_logprobs: Any = None, number: int | None = None
    ) -> tuple[str, ...]:
        """Record one optimizer step, after it was taken; return what was warned of.

        `metrics` holds numbers or 0-dim tensors under the audit's names (docs/audit.md); `old_logprobs` the behaviour
        log-probs that this step's loss used, a tensor or one per sample, any shape. `number` is the global step, from
        1, where the loop counts it; after a gap the rows are taken for averages, and no step is held against another.
        """
        averaged = number is not None and number != self._number + 1
        self._number = number if number is not None else self._number + 1
        first = self._steps_per_batch is not None and (self._number - 1) % self._steps_per_batch == 0
        if first or averaged or self._steps_per_batch is None:
            self._batch = []
        row = {"step": self._number, **{str(key): _plain(value) for key, value in metrics.items()}}
        if not self._writes:
            return ()
        if self._log is not None:
            self._log.write(json.dumps(row) + "\n")
            self._log.flush()
        self._reader.look([row])
        step = self._reader.step({key: value for key, value in row.items() if _is_number(value)}, self._number)
        self._batch.append(step)
        self._recent = [*self._recent, step][-_RECENT:]
        told = [*self._not_refreshed(old_logprobs, first or averaged), *self._judge()]
        for text in told:
            self._warn(text)
        return tuple(told)

    def close(self) -> None:
        """Write `after/` and let go of the log. Called at exit where nobody did; the second call does nothing."""
        atexit.unregister(self.close)
        if self._log is None:
            return
        self._log.close()
        self._log = None
        self._save("after")

    def _open(self, settings: Mapping[str, Any]) -> None:
        known = {"steps_per_batch": self._steps_per_batch, **settings}
        known = {name: value for name, value in known.items() if value is not None}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if known:
                write_json(self.folder / "training.json", known)
            self._number = _last_step(self.folder / "metrics.jsonl")
            self._log = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise AuditError(f"{shown(self.folder)}: cannot be written: {shown(error.strerror or error)}") from None
        if not (self.folder / "before").exists():
            self._save("before")
        atexit.register(self.close)

    def _save(self, name: str) -> None:
        """The adapter as it is now. A model that is no PEFT model, or is sharded, is left to its own trainer."""
        if not hasattr(self._model, "peft_config"):
            return
        if any(_is_sharded(parameter) for parameter in self._model.parameters()):
            self._warn(f"the model is sharded: gather it and save the adapter to {shown(self.folder / name)} yourself")
            return
        self._model.save_pretrained(str(self.folder / name))

    def _not_refreshed(self, old_logprobs: Any, first: bool) -> list[str]:
        """Whether the step used the very log-probs that the step before used, although that one moved the weights."""
        mark = _digest(old_logprobs)
        same = bool(mark) and mark == self._old_logprobs
        moved = self._weights is None or self._weights != self._weights_before
        self._old_logprobs = mark
        self._weights_before, self._weights = self._weights, self._fingerprint()
        if first or not same or not moved:
            return []
        return self._once(
            "old-logprobs",
            f"step {self._number}: the behaviour log-probs are bit-identical to those of the step before although the"
            " weights moved: they are not refreshed. Recompute them under the updated adapter, without gradient, after"
            " every step but a batch's last, or train with steps_per_batch = 1",
        )

    def _judge(self) -> list[str]:
        """What the audit's own rules say of this batch so far."""
        kind, tool = "live record", self._reader.tool
        batch = RunMetrics(self.folder, kind, (Batch(tuple(self._batch)),), "explicit", tool=tool)
        recent = RunMetrics(self.folder, kind, (Batch(tuple(self._recent)),), "unknown", tool=tool)
        verdicts = list(dead_run(Evidence(metrics=recent)))
        if len(self._batch) > 1:
            verdicts += [*behaviour_not_refreshed(Evidence(metrics=batch)), *stale_metrics(Evidence(metrics=batch))]
        found = [v for v in verdicts if isinstance(v, Finding) and v.severity is not Severity.NOTE]
        return [
            text
            for finding in found
            for text in self._once(finding.id, f"step {self._number}: {finding.statement}. {finding.next_step}")
        ]

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._said:
            return []
        self._said.add(name)
        return [text]

    def _fingerprint(self) -> Fingerprint | None:
        """A sum over each trained tensor, exact enough that an optimizer's step shows; None without a model."""
        if self._model is None or not self._writes:
            return None
        return tuple(
            float(parameter.detach().double().sum())
            for parameter in self._model.parameters()
            if parameter.requires_grad and parameter.numel() and not _is_sharded(parameter)
        )


def _last_step(path: Path) -> int:
    """The step of a log's last whole row; 0 without one."""
    for line in reversed(path.read_text("utf-8").splitlines() if path.exists() else []):
        try:
            number = json.loads(line).get("step")
        except (ValueError, AttributeError):
            continue
        if isinstance(number, int):
            return number
    return 0


def _digest(old_logprobs: Any) -> bytes:
    import torch

    if old_logprobs is None:
        return b""
    digest = hashlib.blake2b()
    for part in [old_logprobs] if isinstance(old_logprobs, torch.Tensor) else old_logprobs:
        values = torch.as_tensor(part).detach().to("cpu", torch.float64).contiguous()
        digest.update(repr(tuple(values.shape)).encode() + values.numpy().tobytes())
    return digest.digest()


def _plain(value: Any) -> Any:
    """A number where the value is one, or a tensor or array that holds one; otherwise text, cut short."""
    if value is None or isinstance(value, bool | int | float):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None:
        try:
            return item()
        except (ValueError, RuntimeError):
            pass
    return shown(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sharded(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")


def _is_main_process() -> bool:
    import torch.distributed

    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )
