"""What a run says while it is going: a bar with its phase on a terminal, a line per requirement elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sdpo_conformance.report.watcher import Lines, Watcher


class Bar(Watcher):
    """A bar on a terminal; its first words name the phase."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, done: int, planned: int) -> None:
        self.progress.update(self.task, completed=done, total=planned)

    def phase(self, name: str) -> None:
        self.progress.update(self.task, description=name)


@contextmanager
def progress_on_terminal() -> Iterator[Watcher]:
    """Yields the watcher that suits stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        SpinnerColumn("line" if os.environ.get("NO_COLOR") else "dots"),
        TextColumn("{task.description}"),
        CountedBar(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Bar(bar, bar.add_task("starting", total=None))


class CountedBar(BarColumn):
    """Rich draws the part that is left in the same signs as the part that is done: without colour nobody sees how far
    it is, so the left part stays empty."""

    def render(self, task: Any) -> Any:
        if not os.environ.get("NO_COLOR") or not task.total:
            return super().render(task)
        width = self.bar_width or 40
        done = min(width, int(width * task.completed / task.total))
        return f"[{'#' * done}{'.' * (width - done)}]".replace("[", "\\[", 1)
