"""Prompts to generate from: text, chat messages or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.config import token_ids
from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import parse_json, read_text


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the three is set."""

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """A .json array, .jsonl lines ({"prompt"}, {"messages"} or {"prompt_token_ids"}), or text, a prompt per
    line.
    """
    where, text = shown(path), read_text(path)
    if path.suffix == ".json":
        rows = parse_json(text, where)
    elif path.suffix == ".jsonl":
        rows = [parse_json(line, f"{where}: line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        rows = [line for line in text.splitlines() if line.strip()]
    if not isinstance(rows, list) or not rows:
        raise AuditError(f"{where}: expected a list of prompts")
    return tuple(_prompt(row, f"{where}: prompt {number}") for number, row in enumerate(rows, 1))


def _prompt(row: object, where: str) -> Prompt:
    if isinstance(row, str) and row:
        return Prompt(text=row)
    if isinstance(row, Mapping):
        if isinstance(row.get("prompt"), str) and row["prompt"]:
            return Prompt(text=row["prompt"])
        messages = row.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages):
            return Prompt(messages=tuple(messages))
        if "prompt_token_ids" in row:
            return Prompt(ids=token_ids(row["prompt_token_ids"], f"{where}: prompt_token_ids"))
    raise AuditError(f"{where}: expected text, or an object with prompt, messages or prompt_token_ids")
