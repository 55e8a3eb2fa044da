"""What a run's own files say of its settings, whichever tool wrote them, and the words that they use."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.run_files import read_text

_LIMIT_BYTES = 2**18
_MOST_FILES = 40
_SETTINGS = (".json", ".yaml", ".yml", ".sh", ".toml", ".ini")
_WORDS = (".md", ".py")
#: Results and descriptions of a model or an adapter: their names are no settings of the training.
_OTHERS = re.compile(
    r"(adapter_config|trainer_state|.*results|generation_config|tokenizer.*|special_tokens.*|vocab|added_tokens|"
    r".*\.index|metrics|per_step_metrics|.*response|quantization_config)"
)
#: `path.name=value` of Hydra, `--name value` and `--name=value` of a command line.
_WORD = re.compile(r"(?P<dashes>--|\+{0,2})(?P<name>[A-Za-z_][\w./-]{0,100})(?P<value>=.*)?", re.DOTALL)
#: `name: value` of YAML, `name = value` of TOML and INI.
_LINE = re.compile(r"(?:- +)?(?P<name>[A-Za-z_][\w.-]{0,100}) *[:=] *(?P<value>.*)")
_LONGEST_LINE = 1000
_LONGEST_NAME = 100

Scalar = bool | float | str


@dataclass(frozen=True)
class Declared:
    """`values`: for the last part of each setting's name, in lower case, every value that it is given. `text`: the
    settings, scripts and README in lower case.
    """

    values: Mapping[str, frozenset[Scalar]] = field(default_factory=dict)
    text: str = ""

    def number(self, *names: str) -> float | None:
        """The one finite number that the files give under any of the names; None where they give none or several."""
        found = {
            value
            for name in names
            for value in self.values.get(name, ())
            if isinstance(value, float) and math.isfinite(value)
        }
        return found.pop() if len(found) == 1 else None

    def words(self, *names: str) -> frozenset[str]:
        """Every text that the files give under any of the names, in lower case."""
        found = (value for name in names for value in self.values.get(name, ()))
        return frozenset(value.lower() for value in found if isinstance(value, str))

    def true(self, *names: str) -> bool:
        """Whether any of the names is switched on somewhere."""
        return any(value is True for name in names for value in self.values.get(name, ()))

    def false(self, *names: str) -> bool:
        """Whether any of the names is switched off somewhere."""
        return any(value is False for name in names for value in self.values.get(name, ()))

    def given(self, pattern: str) -> bool:
        """Whether the name of any setting that is not off, empty or 0 matches."""
        off = {False, "", "none", "null"}  # 0 equals False
        return any(re.search(pattern, name) and not values <= off for name, values in self.values.items())

    def says(self, pattern: str) -> bool:
        """Whether the files' text holds the pattern."""
        return re.search(pattern, self.text) is not None


def read_declared(*folders: Path | None) -> Declared:
    """The settings that lie in a run's folders themselves; files that cannot be read are passed over."""
    values: dict[str, set[Scalar]] = defaultdict(set)
    texts: list[str] = []
    for path in (path for folder in dict.fromkeys(folders) for path in _files(folder)):
        try:
            text = read_text(path, _LIMIT_BYTES)
        except AuditError:
            continue
        texts.append(text.lower())
        if path.parent.name == "params":  # MLflow keeps a file per parameter
            values[path.name.lower()].add(_scalar(text.strip()))
        elif path.suffix in _SETTINGS:
            for name, value in _settings(path, text):
                if len(name) <= _LONGEST_NAME:
                    values[name.rsplit(".", 1)[-1].rsplit("/", 1)[-1].replace("-", "_").lower()].add(value)
    return Declared({name: frozenset(found) for name, found in values.items()}, "\n".join(texts))


def _files(run: Path | None) -> list[Path]:
    if run is None or not run.is_dir():
        return []
    entries = [entry for entry in sorted(run.iterdir()) if entry.suffix in (*_SETTINGS, *_WORDS) and entry.is_file()]
    parameters = sorted(run.glob("mlruns/*/*/params/*"))
    kept = [entry for entry in entries if not _OTHERS.fullmatch(entry.stem.lower())]
    return [*kept, *(entry for entry in parameters if entry.is_file())][:_MOST_FILES]


def _settings(path: Path, text: str) -> Iterator[tuple[str, Scalar]]:
    if path.suffix == ".json":
        try:
            yield from _flat(json.loads(text), "")
        except (ValueError, RecursionError):
            return
        return
    lines = [line.strip() for line in text.splitlines() if len(line) <= _LONGEST_LINE]
    if path.suffix == ".sh":
        words = [word.strip("\"'") for line in lines for word in line.split()]
        for word, following in pairwise([*words, ""]):
            match = _WORD.fullmatch(word)
            if match and match["value"]:
                yield match["name"], _scalar(match["value"][1:].strip("\"'"))
            elif match and match["dashes"] == "--" and not following.startswith("-"):
                yield match["name"], _scalar(following)
        return
    for line in lines:
        if match := _LINE.fullmatch(line):
            yield match["name"], _scalar(match["value"].partition(" #")[0].strip().strip("\"'"))


def _flat(document: Any, name: str) -> Iterator[tuple[str, Scalar]]:
    """Every scalar with its own key; wandb's {"lr": {"value": 1}} with the outer one."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from _flat(value, name if key == "value" and name else str(key))
    elif isinstance(document, list):
        for value in document[:100]:
            yield from _flat(value, name)
    elif isinstance(document, bool | str):
        yield name, document
    elif isinstance(document, int | float):
        yield name, _scalar(str(document))


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
