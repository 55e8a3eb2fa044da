"""Contract (the diagnosis engineer fills this package):

diagnose_run(folder, failed, offered) -> mapping for results.json's "diagnosis" or None:
    folder: the run's folder; record.failure["observed"] names a .safetensors in it: LossCase.load(path) gives the
    failing input, and tensors "got.<result key>" / "got.gradient.<field>" (float64) what the implementation returned.
    Keys required: "lines": list[str] (what the terminal prints under 'diagnosis'), "usable_for": str (a sentence for
    the verdict, or ""), "matches": list (name, quality, explained, of, fix, kind: defect|dialect).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def diagnose_run(folder: Path, failed: Sequence[Any], offered: Sequence[Any]) -> Mapping[str, Any] | None:
    return None
