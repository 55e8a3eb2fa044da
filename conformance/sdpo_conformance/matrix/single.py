"""``run --html``: the matrix page of one implementation, and for each failing input its tensors beside the oracle's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from sdpo_conformance.matrix.cells import rows_of
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.page import page
from sdpo_conformance.matrix.provenance import version_of

MOST_SHOWN = 12
"""Failing inputs that are written out."""

MOST_VALUES = 16
"""Values of one tensor that are written out."""


def single_page(results: Mapping[str, Any], folder: Path) -> str:
    """The page of one run, whole; ``folder`` holds what was observed."""
    column = Column.judged(results, folder, version_of(results["implementation"]))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = page([column], rows_of([column], results["run"]["only"]), created)
    tables = "".join(tensors_of(results, folder))
    section = f"<section class='tensors'><h2>Tensors of the failing tokens</h2>{tables}</section>" if tables else ""
    return (
        text.replace("</main>", f"{section}</main>", 1)
        if "</main>" in text
        else text.replace("</body>", f"{section}</body>", 1)
    )


def tensors_of(results: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A table for each failing input: what went in, each intermediate of the oracle, and what came back beside it."""
    shown = 0
    for record in results["records"]:
        name = record["failure"].get("observed")
        if record["status"] != "failed" or not name or not (folder / name).is_file() or shown == MOST_SHOWN:
            continue
        shown += 1
        title = f"{record['requirement']} through {record['entry']}"
        rows = "".join(
            f"<tr><th>{escape(head)}</th><td>{escape(got)}</td><td>{escape(truth)}</td></tr>"
            for head, got, truth in beside(results, folder / name)
        )
        yield (
            f"<h3>{escape(title)}</h3><p>{escape(record['failure'].get('words', ''))}</p><div style='overflow-x:auto'>"
            f"<table><thead><tr><th>tensor</th><th>given or returned</th><th>oracle, float64</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )


def beside(results: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str, str]]:
    """(name, given or returned, truth): the inputs at the worst token, the oracle's intermediates there, the results
    and gradients."""
    import torch
    from safetensors.torch import load_file

    from sdpo_conformance.specs import find_spec

    parts = find_spec(results["spec"]["name"]).parts
    case = parts.load(path)
    got = {name.removeprefix("got."): value for name, value in load_file(path).items() if name.startswith("got.")}
    truth = parts.intermediates(case)
    gradient = next((value for name, value in got.items() if name.startswith("gradient.") and value.dim() == 3), None)
    token = (0, 0)
    true = truth.returned.get("gradient.student_logits")
    if gradient is not None and true is not None and gradient.shape == true.shape and gradient.numel():
        wrong = torch.nan_to_num(gradient - true, nan=torch.inf).abs().amax(-1)
        token = tuple(int(index) for index in torch.unravel_index(wrong.argmax(), wrong.shape))  # type: ignore[assignment]
    yield "token", f"row {token[0]}, position {token[1]}", ""
    shape = tuple(case.tensors()["response_ids"].shape)
    for name, tensor in case.tensors().items():
        local = tensor[token] if tuple(tensor.shape[:2]) == shape and tensor[..., :1].numel() else tensor
        yield name, values(local), ""
    for head, tensor in truth.per_token.items():
        if tensor.numel():
            yield head, "not returned", values(tensor[token])
    for name, value in got.items():
        expected = truth.returned.get(name)
        here = tuple(value.shape[:2]) == shape and value.dim() >= 2
        told = values(expected[token] if here else expected) if isinstance(expected, torch.Tensor) else ""
        yield name, values(value[token] if here else value), told


def values(tensor: Any) -> str:
    """The first values, and how many more there are."""
    flat = tensor.reshape(-1).tolist()
    text = ", ".join(f"{value:.7g}" for value in flat[:MOST_VALUES])
    return f"{text}, and {len(flat) - MOST_VALUES} more" if len(flat) > MOST_VALUES else text
