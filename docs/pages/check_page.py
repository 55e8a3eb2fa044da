"""Put the transcripts of three checks into docs/check.md, between their markers.

python docs/pages/check_page.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "check.md"
BEGIN, END = "<!-- transcripts: begin -->", "<!-- transcripts: end -->"

CHECKS = {
    "A loss": ("check", "defect:anchor-sign-flipped"),
    "A trainer": ("check", "defect:no-refresh"),
    "A loss of another spec": ("check", "defect:trl-teacher-support", "--spec", "trl"),
}

TERMINAL = {"TTY_COMPATIBLE": "1", "TERM": "dumb", "COLUMNS": "100", "LINES": "40"}
"""A terminal of 100 columns without colours, for rich; stderr, where the progress is told, is left out."""


def transcript(arguments: tuple[str, ...]) -> str:
    """What a check prints on stdout, as it is but for blanks at line ends."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "sdpo_conformance", *arguments],
            cwd=folder,
            env={**os.environ, **TERMINAL},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 1:
        raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def transcripts() -> str:
    """Every check under its title."""
    return "\n".join(
        f"## {title}\n\n```text\n$ sdpo-conformance {' '.join(arguments)}\n{transcript(arguments)}\n```\n"
        for title, arguments in CHECKS.items()
    )


def comparable(text: str) -> str:
    """Without what differs between machines and edits: seconds, line numbers, digits beyond the third."""
    text = re.sub(r"(?<=\.py:)\d+", "N", re.sub(r"\d+\.\d s(?=\s|$)", "S", text))
    text = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.3g}", text)
    return " ".join(text.split())


def written() -> str:
    """What stands between the page's markers."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Rewrite the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{transcripts()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
