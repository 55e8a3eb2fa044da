"""Who is told how far a run is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class Watcher:
    """Told by a run how far it is; this one says nothing. ``show`` adapts any callback of (done, planned)."""

    def __call__(self, done: int, planned: int) -> None:
        """So many of so many are judged."""

    def verdict(self, record: Mapping[str, Any]) -> None:
        """One requirement was judged."""

    def phase(self, name: str) -> None:
        """The run now does this."""


class Lines(Watcher):
    """A line on stderr for each requirement as it ends, for logs."""

    done = 0
    verdicts = False

    def __call__(self, done: int, planned: int) -> None:
        if done != self.done and not self.verdicts:
            print(f"{done} of {planned}", file=sys.stderr, flush=True)
        self.done = done

    def verdict(self, record: Mapping[str, Any]) -> None:
        self.verdicts = True
        through = record["entry"].removeprefix("compute_")
        why = f"  {record['reason']}" if record["reason"] and record["status"] != "passed" else ""
        seconds = f"{record['seconds']:.1f} s"
        print(
            f"{record['requirement']:<8} {through:<18} {record['status']:<17} {seconds:>7}{why}",
            file=sys.stderr,
            flush=True,
        )

    def phase(self, name: str) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
