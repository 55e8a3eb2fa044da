"""Does the model still stop? On a tiny model whose adapters were taught to, and to forget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sdpo_conformance.audit import AuditError, audit_run  # noqa: E402
from sdpo_conformance.audit.findings import Severity  # noqa: E402
from sdpo_conformance.audit.generation import loop_period, repetition  # noqa: E402

from .training import tiny_model, with_adapter  # noqa: E402

END = 1
PROMPTS = [[10 + i, 20 + i, 30 + i, 40 + i] for i in range(8)]


def teach(model: Any, answer: Sequence[int]) -> None:
    """Fit the adapter until it gives this answer to every prompt."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[*prompt, *answer] for prompt in PROMPTS])
    labels = ids.clone()
    labels[:, : len(PROMPTS[0])] = -100
    for _ in range(1000):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            return
    pytest.fail(f"the tiny model does not learn its answer: loss {loss.item()}")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, stops/ (answers with three tokens and an end) and loops/ (says one token for ever)."""
    folder = tmp_path_factory.mktemp("taught")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = tiny_model()
    with torch.no_grad():
        base.lm_head.weight.mul_(5)  # its logits are bounded by its rows; smaller ones cannot be sure of a token
    base.save_pretrained(folder / "base")
    model = with_adapter(base)
    teach(model, [5, 6, 7, END])
    model.save_pretrained(folder / "stops")
    teach(model, [9] * 24)
    model.save_pretrained(folder / "loops")
    (folder / "prompts.json").write_text(json.dumps([{"prompt_token_ids": prompt} for prompt in PROMPTS]))
    return folder


def audit(taught: Path, before: str | None, after: str, **named: Any) -> Any:
    return audit_run(
        None,
        before=taught / before if before else None,
        after=taught / after,
        model=taught / "base",
        **{"prompts": taught / "prompts.json", "max_new_tokens": 24, "device": "cpu", **named},
    )


def test_the_hang_is_named(taught: Path) -> None:
    report = audit(taught, "stops", "loops")
    found = {finding.id: finding for finding in report.findings}
    assert found["stopping-lost"].severity is Severity.ERROR
    assert "before 8/8 stopped, after 0/8" in found["stopping-lost"].statement
    assert "log-prob of the end token" in found["stopping-lost"].evidence[1]
    assert "8 of 8 outputs end in a cycle, before 0" in found["stopping-lost"].evidence[2]
    assert found["repetitive"].severity is Severity.WARNING
    assert found["logprob-drift"].data["drift"] > 2
    assert report.exit_status == 1


def test_an_adapter_that_still_stops(taught: Path) -> None:
    report = audit(taught, "stops", "stops")
    assert {f.id for f in report.findings} == {"weights-unchanged"}  # the same adapter twice
    assert report.evidence.generation.stopped("after") == 8
    assert report.evidence.generation.drift == 0


def test_learning_to_stop_is_no_fault(taught: Path) -> None:
    report = audit(taught, "loops", "stops")
    assert {"stopping-lost", "repetitive"}.isdisjoint(f.id for f in report.findings)
    assert "stopping-lost" in {item.id for item in report.not_judged}  # nothing stopped before


def test_the_base_model_stands_in_for_a_missing_before(taught: Path) -> None:
    report = audit(taught, None, "stops")
    assert report.evidence.generation.before_is_base
    assert report.evidence.generation.stopped("after") == 8


def test_a_fresh_before_equals_the_base_model(taught: Path, tmp_path: Path) -> None:
    shutil.copy(taught / "stops" / "adapter_config.json", tmp_path)
    fresh = audit_run(
        None, before=tmp_path, after=taught / "stops", model=taught / "base", prompts=taught / "prompts.json",
        max_new_tokens=6, device="cpu",
    )  # fmt: skip
    base = audit(taught, None, "stops", max_new_tokens=6)
    tokens = [r.outputs["before"].tokens for r in fresh.evidence.generation.prompts]
    assert tokens == [r.outputs["before"].tokens for r in base.evidence.generation.prompts]


def test_the_budget_holds(taught: Path) -> None:
    report = audit(taught, "stops", "loops", max_new_tokens=5)
    assert all(len(r.outputs["after"].tokens) == 5 for r in report.evidence.generation.prompts)


@pytest.mark.parametrize("target", ["q_proj", ["q_proj", "v_proj", "down_proj", "up_proj"]])
def test_an_adapter_for_another_model_is_refused(taught: Path, tmp_path: Path, target: Any) -> None:
    shutil.copytree(taught / "stops", tmp_path / "after")
    config = json.loads((tmp_path / "after" / "adapter_config.json").read_text())
    config["target_modules"] = target
    config["r"] = 2
    (tmp_path / "after" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AuditError, match="does not fit"):
        audit_run(None, after=tmp_path / "after", model=taught / "base", prompts=taught / "prompts.json")


def test_what_generation_refuses(taught: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Hello\n")
    with pytest.raises(AuditError, match="no tokenizer; give prompt_token_ids"):
        audit(taught, "stops", "loops", prompts=tmp_path / "words.txt")
    (tmp_path / "far.jsonl").write_text('{"prompt_token_ids": [99999]}\n')
    with pytest.raises(AuditError, match="outside the model's vocabulary of 64"):
        audit(taught, "stops", "loops", prompts=tmp_path / "far.jsonl")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(AuditError, match="expected a list of prompts"):
        audit(taught, "stops", "loops", prompts=tmp_path / "none.json")
    with pytest.raises(AuditError, match="--model needs prompts"):
        audit(taught, "stops", "loops", prompts=None)
    with pytest.raises(AuditError, match="--model takes a model that is on this machine"):
        audit_run(None, after=taught / "loops", model=Path("Qwen/Qwen3-8B"), prompts=taught / "prompts.json")
    with pytest.raises(AuditError, match="cannot be loaded as a causal language model"):
        audit_run(None, after=taught / "loops", model=tmp_path, prompts=taught / "prompts.json")
    with pytest.raises(AuditError, match="--prompts without --model"):
        audit_run(None, after=taught / "loops", prompts=taught / "prompts.json")
    shutil.copy(taught / "loops" / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(AuditError, match=r"needs adapter_config\.json beside the weights"):
        audit_run(None, after=tmp_path / "bare.safetensors", model=taught / "base", prompts=taught / "prompts.json")


def test_text_prompts_through_a_tokenizer(taught: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    shutil.copytree(taught / "base", tmp_path / "base")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"<{i}>": i for i in range(64)}, unk_token="<0>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("<10> <20> <30> <40>\n\n<11> <21> <31> <41>\n")
    report = audit_run(
        None, before=taught / "stops", after=taught / "loops", model=tmp_path / "base",
        prompts=tmp_path / "prompts.txt", max_new_tokens=24, device="cpu",
    )  # fmt: skip
    assert "before 2/2 stopped, after 0/2" in {f.id: f for f in report.findings}["stopping-lost"].statement


@given(st.lists(st.integers(0, 50), max_size=40), st.lists(st.integers(0, 50), min_size=1, max_size=32))
def test_a_cycle_is_found_after_any_start(start: list[int], cycle: list[int]) -> None:
    period = loop_period([*start, *cycle * 8])
    assert period is not None
    assert period <= len(cycle)


@given(st.integers(0, 200))
def test_tokens_that_never_repeat(length: int) -> None:
    assert loop_period(range(length)) is None
    assert repetition(range(length)) == 0
    assert length < 5 or repetition([3] * length) == pytest.approx(1 - 1 / (length - 3))
