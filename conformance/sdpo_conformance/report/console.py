"""Where reports are printed: fitted to a terminal; into a pipe or file a line stays a line, without padding."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

from rich.console import Console

UNBOUNDED = 100_000


def show(write: Callable[[Console], None]) -> None:
    """Let ``write`` print to stdout."""
    console = Console(highlight=False)
    if console.is_terminal:
        write(console)
        return
    text = io.StringIO()
    write(Console(file=text, width=UNBOUNDED, highlight=False, color_system=None, force_terminal=False))
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))
    sys.stdout.flush()
