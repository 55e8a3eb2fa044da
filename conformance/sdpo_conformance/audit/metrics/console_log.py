"""What a trainer printed: metrics among everything else that a terminal saw.

Read are dicts as transformers prints them (`{'loss': 0.5, 'grad_norm': '1.25'}`, also inside a line or after a
progress bar), verl's `step:1 - actor/pg_loss:0.042 - ...`, and lines of a step's number with `name=number`,
`name: number` or `name number`. A number printed as 0.000 may be anything that small: it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.metrics.metric_names import field_of
from sdpo_conformance.audit.run_files import open_regular

ENDINGS = (".log", ".out", ".txt", ".err", ".stdout", ".stderr")
_MOST_BYTES = 256 * 2**20
_LONGEST_LINE = 2**20
_HEAD_BYTES = 2**22
"""Of a file of any name, so much is looked at for metrics."""

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# Every repeat is bounded: on a line that somebody made for it, two that may share text take for ever.
_NUMBER = r"[-+]?(?:(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,4})?|nan|inf(?:inity)?)"
_END = r"(?![\w.%])"
_DICT = re.compile(r"\{\s{0,9}['\"][^{}]*\}")
_ENTRY = re.compile(rf"(['\"])([^'\"]{{1,200}})\1\s*:\s*(['\"]?)({_NUMBER})\3\s*(?=[,}}])", re.IGNORECASE)
_VERL = re.compile(r"\bstep:(\d{1,12}) - ")
_STEP = re.compile(
    r"\b(?:global[ _])?(?:step|iteration|iter)\b[ \t]{0,9}[:=#]?[ \t]{0,9}(\d{1,12})\b(?!\.\d)", re.IGNORECASE
)
_PAIR = re.compile(
    rf"(?<![\w/.-])([A-Za-z][\w/.-]{{0,199}})[ \t]{{0,9}}([:=]?)[ \t]{{0,9}}({_NUMBER}){_END}", re.IGNORECASE
)
_BAR = re.compile(r"\| {0,12}(\d{1,12})/(\d{1,12}) \[")
_NOT_TRAINING = re.compile(r"\b(eval\w*|valid\w*|val|test\w*)\b", re.IGNORECASE)
_WRAPPED = re.compile(r"\b(?:np\.\w+|numpy\.\w+|tensor)\(([^(),]{1,60})(?:,[^()]{0,200})?\)")
_WORDS = (
    (re.compile(r"\bgrad(?:ient)?[ -]norm\b", re.IGNORECASE), "grad_norm"),
    (re.compile(r"\blearning[ -]rate\b", re.IGNORECASE), "learning_rate"),
)
_VANISHED = re.compile(r"[-+]?0\.0{2,}")
_STEP_KEYS = ("step", "global_step")


@dataclass
class ConsoleRows:
    """``rows`` in the file's order. ``numbered``: whether each carries its step; else ``bar`` has a progress bar's last
    count. ``digits``: the most significant ones that a number was printed with."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbered: bool = True
    bar: int = 0
    digits: int = 0

    @property
    def averaged_over(self) -> int:
        """How many steps a row without a number stands for, by the progress bar."""
        return max(1, round(self.bar / len(self.rows))) if self.rows and not self.numbered else 1


def is_console_log(path: Path) -> bool:
    """Whether the name is one that people give to a terminal's output."""
    return path.name.lower().endswith(ENDINGS) or path.name == "nohup.out"


def console_log(folder: Path) -> Path | None:
    """The file in a folder that reads most like a trainer's output: the one with most rows of metrics."""
    files = [entry for entry in sorted(folder.iterdir()) if is_console_log(entry) and entry.is_file()]
    found = [(len(_rows_at_the_beginning(file)), file) for file in files]
    return max((one for one in found if one[0] > 1), key=lambda one: one[0], default=(0, None))[1]


def _rows_at_the_beginning(path: Path) -> list[dict[str, Any]]:
    try:
        return read_console_log(path, _HEAD_BYTES).rows
    except (AuditError, OSError):
        return []


def read_console_log(path: Path, most: int = _MOST_BYTES) -> ConsoleRows:
    """Every row of metrics that was printed, of at most ``most`` bytes. Raises AuditError where there is none."""
    found = ConsoleRows()
    last = ""
    for line in _lines(path, most):
        if bar := _BAR.search(line):
            found.bar = int(bar[1])
        row = _row(line)
        if row is None:
            continue
        stripped = line.strip()
        if stripped == last:
            continue  # printed by each of several processes, or by two handlers of one logger
        last = stripped
        found.digits = max([found.digits, *(_digits(text) for name, text in row.items() if field_of(name))])
        found.numbered = found.numbered and any(key in row for key in _STEP_KEYS)
        values = {name: _value(text) for name, text in row.items() if not _VANISHED.fullmatch(text)}
        if found.rows and _continues(found.rows[-1], values):
            found.rows[-1].update(values)
        else:
            found.rows.append(values)
    if not found.rows:
        raise AuditError(
            f"{shown(path)}: holds no line of metrics that is understood; expected {{'loss': 0.5, ...}} as transformers"
            " prints, step:1 - actor/pg_loss:0.5 as verl does, or a step's number with name=number"
        )
    return found


def _lines(path: Path, most: int) -> Iterator[str]:
    """Lines of text without colours; what a progress bar wrote over counts as lines of its own."""
    read = 0
    with open_regular(path) as file:
        while read < most and (data := file.readline(_LONGEST_LINE)):
            read += len(data)
            text = data.decode("utf-8", "replace")
            for line in text.split("\r"):
                yield _ESCAPE.sub("", line)


def _row(line: str) -> dict[str, str] | None:
    """The names and numbers of a line of training metrics, as they were printed."""
    line = _WRAPPED.sub(r"\1", line)
    for words, name in _WORDS:
        line = words.sub(name, line)
    for part in _DICT.finditer(line):
        row = {match[2]: match[4] for match in _ENTRY.finditer(part[0])}
        if _tells(row):
            step = None if any(key in row for key in _STEP_KEYS) else _STEP.search(line, 0, part.start())
            return {"step": step[1], **row} if step else row
    if match := _VERL.search(line):
        row = {"step": match[1]}
        for entry in line[match.end() :].split(" - "):
            name, _, text = entry.strip().rpartition(":")
            if re.fullmatch(_NUMBER, text, re.IGNORECASE) and name:
                row[name] = text
        return row if _tells(row) else None
    step = _STEP.search(line)
    if step is None or _NOT_TRAINING.search(line):
        return None
    row = {
        match[1]: match[3]
        for match in _PAIR.finditer(line, step.end())
        if match[1].lower() not in _STEP_KEYS and (match[2] or "_" in match[1] or field_of(match[1]))
    }
    return {"step": step[1], **row} if _tells(row) else None


def _continues(before: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row tells more of the step that the one before it is of."""
    same = any(key in row and row[key] == before.get(key) for key in _STEP_KEYS)
    return same and not (row.keys() & before.keys()) - {*_STEP_KEYS}


def _tells(row: dict[str, str]) -> bool:
    return any(field_of(name) not in (None, "learning_rate") for name in row)


def _value(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


def _digits(text: str) -> int:
    """Significant digits of a printed number."""
    return len(re.sub(r"\D", "", text.lower().partition("e")[0]).lstrip("0"))
