"""Ways to get the step loop wrong: which tokens count, which are attended to, what a recorded log-prob means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects import wrong_forwards as forwards
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, Run, TrainerParts, logprobs, trainer
from sdpo_conformance.specs.claas.defects.wrong_batches import LENGTHS
from sdpo_conformance.specs.claas.defects.wrong_samples import numbered
from sdpo_conformance.specs.claas.defects.wrong_trainer import loop

ALL_TOKENS = "Every token of response_token_ids counts, whatever its id."
ATTENTION = "One sample a row needs no mask; with padding, make the mask from lengths, not from token ids."
AS_RECORDED = "Take what the sampler recorded as it is: the log-ratio's clamp to +-20 is for what is extreme."
RECORDED_SAMPLES = "Samples that carry their log-probs."

Mask = Callable[[Run, Prepared], Tensor]
Recorded = Callable[[Run, Prepared], Tensor]

# --- which tokens count ---


DEFAULT_END = 2
"""The id of the end token in Llama's and Mistral's vocabularies, which code falls back to."""


def ends(run: Run, one: Prepared, default: bool = False) -> Tensor:
    """Where the response has a token that ends it, (1, T); with a ``default`` where the config has none."""
    tokens = forwards.end_tokens(run.model.config) or ((DEFAULT_END,) if default else ())
    return torch.isin(one.response, torch.tensor(tokens, device=one.response.device))


def cut_at_end(inclusive: bool, default: bool = False) -> Mask:
    """The response counts up to its first end token."""

    def mask(run: Run, one: Prepared) -> Tensor:
        found = ends(run, one, default).float()
        ended = found.cumsum(-1)
        return (ended - found == 0).float() if inclusive else (ended == 0).float()

    return mask


def without_ends(run: Run, one: Prepared) -> Tensor:
    """End tokens do not count."""
    return (~ends(run, one)).float()


def without(token: forwards.Token) -> Mask:
    """Tokens of this id do not count."""
    return lambda run, one: one.response.ne(forwards.known_token(token, run)).float()


def without_end(first: bool, keep: bool) -> Mask:
    """The first or the last token does not count; a token alone does where it is to be kept."""

    def mask(run: Run, one: Prepared) -> Tensor:
        found = right.mask(run, one)
        if found.shape[1] > 1 or not keep:
            found[:, 0 if first else -1] = 0
        return found

    return mask


def first_of_them(count: float) -> Mask:
    """The first tokens alone count."""
    return lambda run, one: (torch.arange(one.response.shape[1]) < count).float()[None].to(one.response.device)


def last_of_them(count: float) -> Mask:
    """The last tokens alone count."""
    return lambda run, one: first_of_them(count)(run, one).flip(1)


def without_first_behind_one(run: Run, one: Prepared) -> Tensor:
    """The first token does not count where its prompt has one token."""
    found = right.mask(run, one)
    if one.ids.shape[1] - one.response.shape[1] == 1:
        found[:, 0] = 0
    return found


def where_recorded(counts: Callable[[Tensor], Tensor]) -> Mask:
    """Tokens count by what the sampler recorded of them."""
    return lambda run, one: right.mask(run, one) if one.recorded is None else counts(one.recorded).float()


# --- what was recorded ---


def own(run: Run, one: Prepared) -> Tensor:
    """The starting policy's log-probs."""
    return logprobs(run, one.ids, one.response)


def put_right(
    wrong: Callable[[Tensor], Tensor], with_own: bool, value: float = 0.0
) -> Callable[[Run, Prepared], Tensor]:
    """Recorded log-probs that are thought ``wrong`` give way to the policy's own, or to a number."""

    def first_behaviour(run: Run, one: Prepared) -> Tensor:
        recorded = right.first_behaviour(run, one)
        if one.recorded is None or not bool(wrong(recorded).any()):
            return recorded
        other = own(run, one).to(recorded) if with_own else torch.full_like(recorded, value)
        return torch.where(wrong(recorded), other, recorded)

    return first_behaviour


def put_aside(wrong: Callable[[Tensor], bool]) -> Recorded:
    """A sample's recorded log-probs are thought missing."""

    def first_behaviour(run: Run, one: Prepared) -> Tensor:
        missing = one.recorded is None or wrong(one.recorded)
        return own(run, one) if missing else right.first_behaviour(run, one)

    return first_behaviour


def own_where_close(limit: float, each: bool) -> Recorded:
    """Recorded log-probs next to the policy's own give way to them: of a sample that is close on average, or token by
    token."""

    def first_behaviour(run: Run, one: Prepared) -> Tensor:
        recorded = right.first_behaviour(run, one)
        if one.recorded is None:
            return recorded
        mine = own(run, one).to(recorded)
        off = (recorded - mine).abs()
        return torch.where(off < limit if each else off.mean() < limit, mine, recorded)

    return first_behaviour


def all_or_none(run: Run, one: Prepared) -> Tensor:
    """What was recorded counts only where it was for every sample."""
    missing = any(other.recorded is None for other in run.batch)
    return own(run, one) if missing else right.first_behaviour(run, one)


def of_base_where_missing(run: Run, one: Prepared) -> Tensor:
    """The base's log-probs where nothing was recorded."""
    return right.base(run, one) if one.recorded is None else right.first_behaviour(run, one)


def recorded_through(change: Callable[[Tensor], Tensor]) -> Recorded:
    """Recorded log-probs, changed; what stands in for them is not."""

    def first_behaviour(run: Run, one: Prepared) -> Tensor:
        found = right.first_behaviour(run, one)
        return found if one.recorded is None else change(found)

    return first_behaviour


def in_models_dtype(run: Run, one: Prepared) -> Tensor:
    """Recorded log-probs in the dtype of the base's weights; what stands in for them is not."""
    found = right.first_behaviour(run, one)
    return found if one.recorded is None else found.to(run.dtype).to(found.dtype)


def unattended_tokens() -> list[Defect]:
    """Every way to make an attention mask from token ids."""
    tokens: dict[str, tuple[str, forwards.Token]] = {
        "token-zero": ("Token 0", lambda config: 0),
        "pad-token": ("The padding token, or without one the end token,", forwards.pad_token),
        "end-token": ("The end token", forwards.end_token),
    }
    found = []
    for name, (words, token) in tokens.items():
        for positions in (False, True):
            for student in (False, True):
                forward = forwards.unattended(token, positions)
                suffix = f"{'-and-positions' if positions else ''}{'-of-student-alone' if student else ''}"
                counted = ", and position_ids are counted from the mask" if positions else ""
                whose = "; what is read without gradient is right" if student else ""
                found.append(
                    loop(
                        f"{name}-unattended{suffix}",
                        f"{words} is masked out of the attention wherever it stands{counted}{whose}.",
                        ("STEP-1", "STEP-2"),
                        ATTENTION,
                        trainer(forward=forwards.student_only(forward) if student else forward),
                        (),
                        "Text without that token.",
                    )
                )
    return found


DEFECTS = (
    loop(
        "prompt-without-gradient",
        "The prompt is read into a cache without gradient, so what the adapter does there is not trained.",
        ("STEP-1", "STEP-2"),
        "Read prompt and response in one forward with gradient.",
        trainer(forward=forwards.prompt_cached(False)),
    ),
    loop(
        "prompt-without-gradient-to-its-end",
        "The prompt is read without gradient, the logits that predict the response's first token among it.",
        ("STEP-1", "STEP-2"),
        "Read prompt and response in one forward with gradient.",
        trainer(forward=forwards.prompt_cached(True)),
    ),
    *unattended_tokens(),
    loop(
        "response-cut-at-end-token",
        "The response counts up to its first end token, which is the last that counts.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=cut_at_end(True)),
        (),
        "Responses with an end token at their end alone, or none.",
    ),
    loop(
        "response-cut-before-end-token",
        "The response counts up to its first end token, which does not count.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=cut_at_end(False)),
        (),
        "Responses without an end token.",
    ),
    *(
        loop(
            f"response-cut-{where}-end-token-or-two",
            f"The response counts up to its first end token, which {words}; where the config has none, token 2 is one.",
            ("STEP-1", "STEP-2"),
            ALL_TOKENS,
            trainer(mask=cut_at_end(where == "at", default=True)),
        )
        for where, words in (("at", "is the last that counts"), ("before", "does not count"))
    ),
    loop(
        "first-token-uncounted-behind-one-token",
        "The first token of a response does not count where its prompt has one token, as if position 0 predicted none.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=without_first_behind_one),
        (),
        "Prompts of two tokens or more.",
    ),
    loop(
        "end-tokens-uncounted",
        "End tokens of the response do not count, all others do.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=without_ends),
        (),
        "Responses without an end token.",
    ),
    loop(
        "pad-tokens-uncounted",
        "Tokens of the response with the padding's id, or without one the end token's, do not count.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=without(forwards.pad_token)),
        (),
        "Responses without that token.",
    ),
    loop(
        "zero-tokens-uncounted",
        "Tokens of the response with id 0 do not count.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        trainer(mask=without(lambda config: 0)),
        (),
        "Responses without token 0.",
    ),
    *(
        loop(
            f"{whose}-token-uncounted{suffix}",
            f"The {whose} token of each response does not count{words}.",
            ("STEP-1", "STEP-2"),
            ALL_TOKENS,
            trainer(mask=without_end(whose == "first", keep)),
        )
        for whose in ("first", "last")
        for keep, suffix, words in ((False, "", ""), (True, "-of-several", ", unless it is the only one"))
    ),
    numbered(
        "response-truncated",
        "The first 8 tokens of a response alone count.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        "tokens",
        lambda count: TrainerParts(mask=first_of_them(count)),
        whole_numbers((1, 2, 3, *LENGTHS)),
        8,
        whole=True,
    ),
    numbered(
        "response-truncated-at-its-start",
        "The last 8 tokens of a response alone count.",
        ("STEP-1", "STEP-2"),
        ALL_TOKENS,
        "tokens",
        lambda count: TrainerParts(mask=last_of_them(count)),
        whole_numbers((1, 2, 3, *LENGTHS)),
        8,
        whole=True,
    ),
    loop(
        "infinite-logprobs-uncounted",
        "Tokens whose recorded log-prob is -inf do not count.",
        ("STEP-1", "STEP-2"),
        AS_RECORDED,
        trainer(mask=where_recorded(lambda recorded: ~recorded.isinf())),
        (),
        "Finite log-probs.",
    ),
    loop(
        "zero-logprobs-uncounted",
        "Tokens whose recorded log-prob is exactly 0 do not count.",
        ("STEP-1", "STEP-2"),
        AS_RECORDED,
        trainer(mask=where_recorded(lambda recorded: recorded != 0)),
        (),
        "Log-probs below 0.",
    ),
    loop(
        "infinite-logprobs-without-weight",
        "A recorded log-prob of -inf makes the ratio 0, where it makes it is_clip.",
        ("STEP-1",),
        AS_RECORDED,
        trainer(first_behaviour=put_right(torch.isinf, with_own=False, value=1e4)),
        (),
        "Finite log-probs.",
    ),
    loop(
        "infinite-logprobs-as-missing",
        "A recorded log-prob of -inf is taken for missing: the policy's own stands in, and the ratio is 1.",
        ("STEP-1",),
        AS_RECORDED,
        trainer(first_behaviour=put_right(torch.isinf, with_own=True)),
        (),
        "Finite log-probs.",
    ),
    loop(
        "infinite-logprobs-as-zero",
        "A recorded log-prob of -inf is taken for 0.",
        ("STEP-1",),
        AS_RECORDED,
        trainer(first_behaviour=put_right(torch.isinf, with_own=False)),
        (),
        "Finite log-probs.",
    ),
    loop(
        "samples-with-infinite-logprobs-as-unrecorded",
        "Where one recorded log-prob of a sample is -inf, all of the sample's are taken for missing.",
        ("STEP-1",),
        AS_RECORDED,
        trainer(first_behaviour=put_aside(lambda recorded: bool(recorded.isinf().any()))),
        (),
        "Finite log-probs.",
    ),
    loop(
        "zero-logprobs-as-missing",
        "A recorded log-prob of exactly 0 is taken for missing: the policy's own stands in, and the ratio is 1.",
        ("STEP-1",),
        "Ask whether it is None, not whether it is true.",
        trainer(first_behaviour=put_right(lambda recorded: recorded == 0, with_own=True)),
        (),
        "Log-probs below 0.",
    ),
    loop(
        "samples-with-zero-logprobs-as-unrecorded",
        "Where one recorded log-prob of a sample is exactly 0, all of the sample's are taken for missing.",
        ("STEP-1",),
        "Ask whether response_logprobs is None, not whether all of it is true.",
        trainer(first_behaviour=put_aside(lambda recorded: bool((recorded == 0).any()))),
        (),
        "Log-probs below 0.",
    ),
    loop(
        "samples-of-zero-logprobs-as-unrecorded",
        "Where every recorded log-prob of a sample is exactly 0, they are taken for missing.",
        ("STEP-1",),
        "Ask whether response_logprobs is None, not whether any of it is true.",
        trainer(first_behaviour=put_aside(lambda recorded: bool((recorded == 0).all()))),
        (),
        "Log-probs below 0.",
    ),
    loop(
        "recorded-dropped-where-one-is-missing",
        "Where one sample carries no log-probs, those of all others are dropped too, and their ratio is 1.",
        ("STEP-1",),
        "Recompute the log-probs of that sample alone, or refuse the batch with a ValueError.",
        trainer(first_behaviour=all_or_none),
        (),
        RECORDED_SAMPLES,
    ),
    loop(
        "close-samples-as-on-policy",
        "Log-probs of a sample that are next to the policy's own are taken for them, and their ratio is 1: within 0.05 "
        "nats on average in the executable form.",
        ("STEP-1",),
        "Take what the sampler recorded as it is, however near to the trainer's own.",
        trainer(first_behaviour=own_where_close(0.05, each=False)),
        (),
        "Samplers whose log-probs are the trainer's own.",
    ),
    numbered(
        "close-logprobs-as-own",
        "Each recorded log-prob within 0.1 nats of the policy's own is taken for it, and its ratio is 1.",
        ("STEP-1",),
        "Take what the sampler recorded as it is, however near to the trainer's own.",
        "nats",
        lambda limit: TrainerParts(first_behaviour=own_where_close(limit, each=True)),
        (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
        0.1,
        whole=True,
    ),
    loop(
        "missing-logprobs-of-base",
        "Where the sampler recorded nothing, the base's log-probs stand in.",
        ("STEP-1",),
        "Recompute them under the starting policy with the adapter enabled, or refuse the sample with a ValueError.",
        trainer(first_behaviour=of_base_where_missing),
        (),
        RECORDED_SAMPLES,
    ),
    numbered(
        "sampler-logprobs-clamped",
        "What the sampler recorded is clamped from below at -10.",
        ("STEP-1",),
        AS_RECORDED,
        "from below at",
        lambda floor: TrainerParts(first_behaviour=recorded_through(lambda values: values.clamp(min=floor))),
        (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -8.0, -10.0, -12.0, -15.0),
        -10.0,
    ),
    loop(
        "sampler-logprobs-in-bfloat16",
        "What the sampler recorded is kept in bfloat16.",
        ("STEP-1",),
        "Keep log-probs in float32.",
        trainer(first_behaviour=recorded_through(lambda values: values.bfloat16().to(values.dtype))),
    ),
    loop(
        "sampler-logprobs-in-model-dtype",
        "What the sampler recorded is kept in the dtype of the model's weights.",
        ("STEP-1",),
        "Keep log-probs in float32.",
        trainer(first_behaviour=in_models_dtype),
        (),
        "Models in float32.",
    ),
    loop(
        "sampler-logprobs-in-float16",
        "What the sampler recorded is kept in float16.",
        ("STEP-1",),
        "Keep log-probs in float32.",
        trainer(first_behaviour=recorded_through(lambda values: values.half().to(values.dtype))),
    ),
    numbered(
        "sampler-logprobs-rounded",
        "What the sampler recorded is rounded to 2 decimals.",
        ("STEP-1",),
        "Keep log-probs in float32.",
        "decimals",
        lambda places: TrainerParts(
            first_behaviour=recorded_through(lambda values: values.round(decimals=int(places)))
        ),
        whole_numbers((0, 1, 2, 3)),
        2,
        whole=True,
    ),
)
