"""Whose log-probs these are: recorded by samplers of every kind, on a tiny model with two adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings import Finding, Severity

from .training import tiny_model, with_adapter

PROMPT = [10, 20, 30, 40]
TOKENS = 48


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, before/, after/: the adapters well apart from one another."""
    folder = tmp_path_factory.mktemp("sampled")
    torch.set_num_threads(1)
    base = tiny_model()
    base.save_pretrained(folder / "base")
    model = with_adapter(base)
    with torch.no_grad():
        for name in ("before", "after"):
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))))
            model.save_pretrained(folder / name)
    return folder


def sampled(
    run: Path,
    recorded: str = "before",
    temperature: float = 1.0,
    top_p: float = 1.0,
    shift: int = 0,
    raw: bool = False,
    tokens: Sequence[int] = (),
) -> list[Finding]:
    """Sample from the starting adapter (or take the tokens given), record as told, and audit."""
    import peft
    from transformers import AutoModelForCausalLM

    def scaled(logits: torch.Tensor, *, plain: bool) -> torch.Tensor:
        if plain:
            return torch.log_softmax(logits, -1)
        logprobs = torch.log_softmax(logits / temperature, -1)
        ordered, order = logprobs.exp().sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        mask = torch.zeros_like(logprobs, dtype=torch.bool).scatter(0, order, kept)
        return torch.log_softmax(logprobs.masked_fill(~mask, -torch.inf), -1)

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), run / "before")
    model.load_adapter(run / "after", "after")
    generator = torch.Generator().manual_seed(3)
    ids = [*PROMPT, *tokens]
    with torch.no_grad():
        for _ in range(TOKENS - len(tokens)):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            ids.append(int(torch.multinomial(scaled(logits, plain=False).exp(), 1, generator=generator)))
        if recorded == "base":
            with model.disable_adapter():
                rows = model(input_ids=torch.tensor([ids])).logits[0].double()
        else:
            model.set_adapter("after" if recorded == "after" else "default")
            rows = model(input_ids=torch.tensor([ids])).logits[0].double()
    response = ids[len(PROMPT) :]
    values = [
        float(scaled(row, plain=raw or recorded != "before")[token])
        for row, token in zip(rows[len(PROMPT) - 1 : -1], response, strict=True)
    ]
    if shift:
        values = [*values[1:], values[-1]]
    request = {
        "training": {"steps_per_batch": 1},
        "samples": [{"prompt_token_ids": PROMPT, "response_token_ids": response, "response_logprobs": values}],
    }
    (run / "distill_request.json").write_text(json.dumps(request))
    report = audit_run(run, model=run / "base", max_new_tokens=1, device="cpu")
    return [finding for finding in report.findings if finding.id == "recorded-logprobs"]


def test_a_sound_sampler_is_not_accused(run: Path) -> None:
    assert sampled(run) == []


@pytest.mark.parametrize(
    ("recorded", "says"), [("base", "ran without the adapter"), ("after", "the finished adapter's")]
)
def test_another_policy_is_named(run: Path, recorded: str, says: str) -> None:
    (finding,) = sampled(run, recorded)
    assert finding.severity is Severity.ERROR
    assert says in finding.statement


def test_a_shift_by_one_is_named(run: Path) -> None:
    (finding,) = sampled(run, shift=1)
    assert finding.severity is Severity.ERROR
    assert "shifted by one: each belongs to the next token" in finding.statement


def test_processed_temperature_is_named(run: Path) -> None:
    (finding,) = sampled(run, temperature=0.7)
    assert (finding.data["temperature"], finding.data["top_p"]) == (0.7, 1.0)


def test_processed_top_p_is_named(run: Path) -> None:
    (finding,) = sampled(run, top_p=0.7)
    assert (finding.data["temperature"], finding.data["top_p"]) == (1.0, 0.7)


def test_raw_logprobs_under_top_p_are_named(run: Path) -> None:
    (finding,) = sampled(run, top_p=0.6, raw=True)
    assert "off by the kept mass" in finding.statement


def test_raw_logprobs_of_a_temperature_and_a_nucleus_are_named(run: Path) -> None:
    (finding,) = sampled(run, temperature=0.6, top_p=0.8, raw=True)
    assert finding.data["temperature"] == pytest.approx(0.6, abs=0.11)
    assert "sampled at a temperature of about" in finding.statement


def test_tokens_that_no_model_sampled_say_nothing_of_a_temperature(run: Path) -> None:
    ids = torch.randint(2, 64, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    assert sampled(run, tokens=ids) == []
