"""The same in a transformers Trainer: a callback that records the run for the audit and warns while it goes on.

trainer = Trainer(..., callbacks=[AuditCallback("runs/today", steps_per_batch=4)])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sdpo_conformance.audit.metrics.metric_names import field_of, is_summary
from sdpo_conformance.audit.run_recorder import RunRecorder


class AuditCallback(TrainerCallback):
    """Records what the Trainer logs, and the adapter before and after.

    `steps_per_batch` is the number of optimizer steps between two samplings (see RunRecorder). A loss that keeps
    behaviour log-probs hands them over with `old_logprobs(values)` at each forward: the second step of a batch that
    uses the same ones is warned of. Rows are steps only with `logging_steps=1`.
    """

    def __init__(self, folder: str | Path, *, steps_per_batch: int | None = None) -> None:
        self.folder = Path(folder)
        self.recorder: RunRecorder | None = None
        self._steps_per_batch = steps_per_batch
        self._collected: list[Any] = []
        self._used: list[Any] | None = None

    def old_logprobs(self, values: Any) -> None:
        """The behaviour log-probs that this forward's loss uses, (B, T) or one tensor per sample."""
        self._collected.append(values.detach().clone())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write `before/` and open the log."""
        settings = {"learning_rate": float(args.learning_rate)}
        self.recorder = RunRecorder(self.folder, model, steps_per_batch=self._steps_per_batch, settings=settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the step's log-probs until the step is logged."""
        self._used, self._collected = self._collected or None, []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record a training row; evaluations and the summary are none."""
        logs = logs or {}
        trained = any(field_of(key) not in (None, "learning_rate") for key in logs) and not is_summary(logs)
        if self.recorder is not None and trained:
            self.recorder.step(logs, old_logprobs=self._used, number=state.global_step)
            self._used = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write `after/`."""
        if self.recorder is not None:
            self.recorder.close()
