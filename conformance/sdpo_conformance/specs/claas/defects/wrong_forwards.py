"""Ways to get a forward of the step loop wrong: padding, packing, positions, the head; each as the part ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.step_loop_variants import ChangedLogits, ReadWhere, Run

Forward = Callable[[Run, Tensor, Tensor], Tensor]


def rows_with(run: Run, ids: Tensor) -> list[Tensor]:
    """The batch that a row is in: the teacher's sequences, or the student's."""
    teacher = any(one.teacher_ids is ids for one in run.batch)
    return [one.teacher_ids if teacher else one.ids for one in run.batch]


def read(logits: Tensor, response: Tensor) -> Tensor:
    """What predicts the response, which ends the sequence."""
    return logits[:, -response.shape[1] - 1 : -1]


def left_padded(mask: bool, positions: bool) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """Padded on the left to the longest of the batch, with the attention mask or without, with positions that start
    at each row's first token or without."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        width = max(row.shape[1] for row in rows_with(run, ids))
        short = width - ids.shape[1]
        padded = torch.nn.functional.pad(ids, (short, 0))
        seen = torch.nn.functional.pad(torch.ones_like(ids), (short, 0))
        options: dict[str, Tensor] = {}
        if mask:
            options["attention_mask"] = attention(seen) if is_double(run) else seen
        if positions:
            options["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
        return read(run.model(input_ids=padded, use_cache=False, **options).logits, response)

    return forward


def packed(reset: bool) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """All samples in one row whose attention crosses from one to the next; positions start again or run on."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        before: list[Tensor] = []
        for row in rows_with(run, ids):
            if row is ids:
                break
            before.append(row)
        together = torch.cat([*before, ids], dim=1)
        lengths = [row.shape[1] for row in (*before, ids)]
        positions = torch.cat([torch.arange(n) for n in lengths]) if reset else torch.arange(sum(lengths))
        return read(
            run.model(
                input_ids=together,
                position_ids=positions[None].to(ids.device),
                attention_mask=torch.ones_like(together),
                use_cache=False,
            ).logits,
            response,
        )

    return forward


def positions_from(start: int) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """Positions counted from another number."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        positions = (torch.arange(ids.shape[1], device=ids.device) + start)[None]
        return read(run.model(input_ids=ids, position_ids=positions, use_cache=False).logits, response)

    return forward


def with_token_before(token: int) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """Another token before every prompt."""
    return lambda run, ids, response: right.read(run.model, torch.nn.functional.pad(ids, (1, 0), value=token), response)


def last_tokens(count: float) -> ReadWhere:
    """Prompts cut to their last tokens."""
    return ReadWhere(
        lambda run, ids, response: right.read(run.model, ids[:, -int(count) - response.shape[1] :], response),
        lambda run, ids, response: ids.shape[1] - response.shape[1] > int(count),
    )


def first_tokens(count: float) -> ReadWhere:
    """Prompts cut to their first tokens."""

    def cut(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        return right.read(run.model, torch.cat([ids[:, : int(count)], response], dim=1), response)

    return ReadWhere(cut, lambda run, ids, response: ids.shape[1] - response.shape[1] > int(count))


def without_last_token(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The prompt has lost its last token, unless it has no other."""
    prompt = ids[:, : -response.shape[1]]
    if prompt.shape[1] < 2:
        return right.forward(run, ids, response)
    return right.read(run.model, torch.cat([prompt[:, :-1], response], dim=1), response)


def is_teachers(run: Run, ids: Tensor) -> bool:
    """Whether a row is the teacher's."""
    return any(one.teacher_ids is ids for one in run.batch)


def of_student_prompt(forward: Forward) -> ReadWhere:
    """A wrong forward for the rows behind the student's prompt, of whichever policy; the teacher's are right."""
    concerns = forward.concerns if isinstance(forward, ReadWhere) else always
    return ReadWhere(forward, lambda run, ids, response: not is_teachers(run, ids) and concerns(run, ids, response))


def of_teacher_prompt(forward: Forward) -> ReadWhere:
    """A wrong forward for the rows behind the teacher's prompt alone."""
    return ReadWhere(forward, lambda run, ids, response: is_teachers(run, ids))


def always(run: Run, ids: Tensor, response: Tensor) -> bool:
    """Every row."""
    return True


Token = Callable[[Any], int | None]
"""The id of a special token, by the model's config; None where it has none."""


def end_tokens(config: Any) -> tuple[int, ...]:
    """The tokens that end a response, by the model's config."""
    found = config.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)


def end_token(config: Any) -> int | None:
    """The first token that ends a response."""
    return next(iter(end_tokens(config)), None)


def pad_token(config: Any) -> int | None:
    """The padding token, or where there is none the one that ends a response."""
    return end_token(config) if config.pad_token_id is None else int(config.pad_token_id)


def known_token(token: Token, run: Run) -> int:
    """The token of this run's model; -1, which no row has, where there is none."""
    found = token(run.model.config)
    return -1 if found is None else found


def is_double(run: Run) -> bool:
    """Whether the model is in float64."""
    return bool(next(run.model.parameters()).dtype == torch.float64)


def attention(seen: Tensor) -> Tensor:
    """The causal mask (1, 1, L, L) of a float64 model whose rows that see nothing come out as a float32 model's: the
    least float64 number would be -inf in the float32 that softmax is taken in."""
    length = seen.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril() & seen.bool()
    least = torch.finfo(torch.float32).min
    return torch.zeros(length, length, dtype=torch.float64, device=seen.device).masked_fill(~allowed, least)[None, None]


def unattended(token: Token, positions: bool) -> ReadWhere:
    """Tokens of this id are masked out of the attention wherever they stand, and where ``positions`` are counted from
    the mask, not counted either."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        seen = ids.ne(known_token(token, run)).long()
        options = {"position_ids": (seen.cumsum(-1) - 1).clamp(min=0)} if positions else {}
        mask = attention(seen) if is_double(run) else seen
        return read(run.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits, response)

    return ReadWhere(forward, lambda run, ids, response: bool(ids.eq(known_token(token, run)).any()))


def prompt_cached(whole: bool) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """The prompt is read into a cache without gradient: but for its last token, or ``whole``, so that what predicts
    the first token of the response has no gradient either."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        start = ids.shape[1] - response.shape[1] - (not whole)
        if start < 1 or not torch.is_grad_enabled():
            return right.forward(run, ids, response)
        with torch.no_grad():
            kept = run.model(input_ids=ids[:, :start], use_cache=True)
        rest = run.model(input_ids=ids[:, start:], past_key_values=kept.past_key_values, use_cache=True).logits
        return torch.cat([kept.logits[:, -1:], rest[:, :-1]], dim=1) if whole else rest[:, :-1]

    return forward


def constant_positions(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """Every token at position 0."""
    return read(run.model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits, response)


def response_alone(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The response is read after the last token of its prompt alone."""
    return right.forward(run, ids[:, -response.shape[1] - 1 :], response)


def without_first_token(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The prompt has lost its first token."""
    return right.forward(run, ids[:, 1:] if ids.shape[1] > response.shape[1] + 1 else ids, response)


def unshifted(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits at the response's own positions, each predicting the token after."""
    return run.model(input_ids=ids, use_cache=False).logits[:, -response.shape[1] :]


def head_of_embedding(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits are taken with the embedding's weight, which an untied head does not have."""
    hidden = run.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return read(hidden @ run.model.get_input_embeddings().weight.T, response)


def bends(run: Run) -> bool:
    """Whether the model caps its logits."""
    return bool(getattr(run.model.config, "final_logit_softcapping", None))


def scales(run: Run) -> bool:
    """Whether the model multiplies its logits."""
    return getattr(run.model.config, "logit_scale", None) is not None


def adds_to_head(run: Run) -> bool:
    """Whether the head has a bias or an adapter."""
    head = run.model.get_output_embeddings()
    return not isinstance(head, torch.nn.Linear) or head.bias is not None


def by_head(weight: bool, scaled: bool, capped: bool) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """The logits made from the last hidden states by the head, or by its ``weight`` alone, and of what the model does
    with them ``scaled`` and ``capped``."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        hidden = run.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        head = run.model.get_output_embeddings()
        logits = hidden @ head.weight.T if weight else head(hidden)
        if scaled and scales(run):
            logits = logits * run.model.config.logit_scale
        if capped and bends(run):
            cap = run.model.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        return read(logits, response)

    return forward


WEIGHT_ALONE = ReadWhere(
    by_head(weight=True, scaled=False, capped=False),
    lambda run, ids, response: bends(run) or scales(run) or adds_to_head(run),
)
HEAD_ALONE = ReadWhere(
    by_head(weight=False, scaled=False, capped=False), lambda run, ids, response: bends(run) or scales(run)
)
UNCAPPED = ReadWhere(by_head(weight=False, scaled=True, capped=False), lambda run, ids, response: bends(run))
NOTHING_ADDED = ReadWhere(by_head(weight=True, scaled=True, capped=True), lambda run, ids, response: adds_to_head(run))


def without_final_norm(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The hidden states reach the head before the model's last norm."""
    norms = [part for name, part in run.model.named_modules() if name.endswith((".model.norm", ".transformer.ln_f"))]
    handle = norms[-1].register_forward_hook(lambda part, given, out: given[0])
    try:
        return right.forward(run, ids, response)
    finally:
        handle.remove()


def through(change: Callable[[Tensor], Tensor]) -> ChangedLogits:
    """The right logits, changed."""
    return ChangedLogits(change)


def student_only(forward: Callable[[Run, Tensor, Tensor], Tensor]) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """A wrong forward for the student with gradient alone: what is read without gradient is right."""
    if isinstance(forward, ChangedLogits):
        return replace(forward, of_student=True)
    if isinstance(forward, ReadWhere):
        where = forward.concerns
        return replace(forward, concerns=lambda run, ids, y: torch.is_grad_enabled() and where(run, ids, y))

    def either(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        return (forward if torch.is_grad_enabled() else right.forward)(run, ids, response)

    return either


def temperature(value: float) -> Callable[[Run, Tensor, Tensor], Tensor]:
    """The logits divided by a temperature."""
    return through(lambda logits: logits / value)
