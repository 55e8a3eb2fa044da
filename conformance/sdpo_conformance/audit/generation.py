"""Does the model still stop? Greedy generation with the adapter before and after, within a token budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.model_loading import AFTER, BEFORE, AdaptedModel
from sdpo_conformance.audit.prompts import Prompt

if TYPE_CHECKING:
    import torch

_NGRAM = 4
_LONGEST_PERIOD = 32
_LOOP_TURNS = 4


@dataclass(frozen=True)
class Output:
    """One prompt's continuation.

    `repetition` is the share of 4-grams that occurred before in the same output; `loop` the period of the
    cycle
    that the output ends in, if it does.
    """

    tokens: tuple[int, ...]
    stopped: bool
    repetition: float
    loop: int | None


@dataclass(frozen=True)
class PromptResult:
    """Both outputs, and mean log-probs (nats per token) of the output *before*, under both adapters.

    `end_before` and `end_after` are the log-probs of the end token where the output before ended, None where
    it
    did not end.
    """

    outputs: Mapping[str, Output]
    logprob_before: float | None
    logprob_after: float | None
    end_before: float | None
    end_after: float | None


@dataclass(frozen=True)
class GenerationResult:
    """`before_is_base` says that no adapter from before the run was there and the bare model stood in."""

    prompts: tuple[PromptResult, ...]
    max_new_tokens: int
    before_is_base: bool

    def stopped(self, name: str) -> int:
        """How many outputs reached an end token within the budget."""
        return sum(result.outputs[name].stopped for result in self.prompts)

    def repetition(self, name: str) -> float:
        """Mean repetition over the prompts."""
        return math.fsum(r.outputs[name].repetition for r in self.prompts) / len(self.prompts)

    def loops(self, name: str) -> int:
        """How many outputs end in a cycle."""
        return sum(result.outputs[name].loop is not None for result in self.prompts)

    @property
    def drift(self) -> float | None:
        """Mean |change| of the mean log-prob, nats per token, over the outputs before."""
        moves = [
            abs(r.logprob_after - r.logprob_before)
            for r in self.prompts
            if r.logprob_before is not None and r.logprob_after is not None
        ]
        return math.fsum(moves) / len(moves) if moves else None


def generate(adapted: AdaptedModel, prompts: Sequence[Prompt], max_new_tokens: int) -> GenerationResult:
    """Generate greedily from every prompt, before and after. Never more than max_new_tokens per prompt and
    adapter.
    """
    if max_new_tokens < 1:
        raise AuditError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not adapted.end_tokens:
        raise AuditError("the model names no end token (eos_token_id), so whether it stops cannot be judged")
    results = []
    for number, prompt in enumerate(prompts, start=1):
        ids = _encode(adapted, prompt, number)
        outputs = {name: _continue(adapted, name, ids, max_new_tokens) for name in (BEFORE, AFTER)}
        reference = outputs[BEFORE].tokens
        before = response_logprobs(adapted, BEFORE, ids, reference)
        after = response_logprobs(adapted, AFTER, ids, reference)
        ended = outputs[BEFORE].stopped
        results.append(
            PromptResult(
                outputs=outputs,
                logprob_before=float(before.mean()) if len(reference) else None,
                logprob_after=float(after.mean()) if len(reference) else None,
                end_before=float(before[-1]) if ended else None,
                end_after=float(after[-1]) if ended else None,
            )
        )
    return GenerationResult(tuple(results), max_new_tokens, BEFORE not in adapted.adapters)


def response_logprobs(
    adapted: AdaptedModel, name: str | None, prompt: Sequence[int], response: Sequence[int]
) -> torch.Tensor:
    """Log-probs of the response's tokens, (T,) float64 on the CPU; `name` None is the bare model.

    The logits are those one position earlier: start - 1 .. -2 of prompt + response.
    """
    import torch

    logits = response_logits(adapted, name, prompt, response)
    ids = torch.tensor(list(response), device=logits.device)
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    chosen: torch.Tensor = logprobs.gather(-1, ids[:, None])[:, 0].cpu()
    return chosen


def response_logits(
    adapted: AdaptedModel, name: str | None, prompt: Sequence[int], response: Sequence[int]
) -> torch.Tensor:
    """Logits of the response's positions, (T, V) on the model's device; `name` None is the bare model."""
    import torch

    ids = torch.tensor([[*prompt, *response]], device=adapted.device)
    with torch.no_grad(), _adapter(adapted, name):
        logits: torch.Tensor = adapted.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits


def _adapter(adapted: AdaptedModel, name: str | None) -> Any:
    """The context in which the model carries that adapter; the bare model where it has none of that name."""
    import contextlib

    if name is None or name not in adapted.adapters:
        return adapted.model.disable_adapter()
    adapted.model.set_adapter(name)
    return contextlib.nullcontext()


def _encode(adapted: AdaptedModel, prompt: Prompt, number: int) -> tuple[int, ...]:
    if prompt.ids is not None:
        size = int(adapted.model.get_input_embeddings().weight.shape[0])
        if max(prompt.ids) >= size:
            raise AuditError(f"prompt {number}: token id {max(prompt.ids)} is outside the model's vocabulary of {size}")
        return prompt.ids
    if adapted.tokenizer is None:
        raise AuditError(f"prompt {number} is text but the model's folder has no tokenizer; give prompt_token_ids")
    try:
        if prompt.messages is not None:
            encoded = adapted.tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            encoded = adapted.tokenizer(prompt.text)["input_ids"]
    except Exception as error:
        raise AuditError(f"prompt {number} cannot be tokenised: {shown(error)}") from None
    if not encoded:
        raise AuditError(f"prompt {number} has no tokens")
    return tuple(int(i) for i in encoded)


def _continue(adapted: AdaptedModel, name: str, ids: Sequence[int], budget: int) -> Output:
    import torch

    device = adapted.device
    with torch.no_grad(), _adapter(adapted, name):
        produced = adapted.model.generate(
            input_ids=torch.tensor([list(ids)], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=sorted(adapted.end_tokens),
            pad_token_id=min(adapted.end_tokens),
        )
    tokens = tuple(int(i) for i in produced[0, len(ids) :])
    stopped = bool(tokens) and tokens[-1] in adapted.end_tokens
    return Output(tokens, stopped, repetition(tokens), loop_period(tokens))


def repetition(tokens: Sequence[int]) -> float:
    """1 - distinct 4-grams / 4-grams; 0 for an output of fewer than 5 tokens."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def loop_period(tokens: Sequence[int]) -> int | None:
    """The shortest period, up to 32 tokens, that the output's tail repeats at least four times."""
    for period in range(1, _LONGEST_PERIOD + 1):
        span = period * _LOOP_TURNS
        if len(tokens) < span:
            return None
        tail = tokens[-span:]
        if all(tail[i] == tail[i + period] for i in range(span - period)):
            return period
    return None
