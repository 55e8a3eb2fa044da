"""Ways to get the step loop wrong: keys and values, and whole answers, that are kept where they no longer hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, ReadWhere, Run, TrainerParts, trainer
from sdpo_conformance.specs.claas.defects.wrong_forwards import Forward, is_teachers, rows_with
from sdpo_conformance.specs.claas.defects.wrong_trainer import ADAPTER_OFF, NO_ANCHOR, ONE_SAMPLE, STEP_ONE, loop

OWN_CACHE = "Keys and values hold for the weights that made them: read the prompt again after every step."
ONE_POLICY = "Read prompt and response by one policy: keys and values of another are another model's."
COPY = "Give each sample a copy of its prompt's keys and values: a forward adds to those it is handed."
FORGET = "Forget what was kept when a call ends, or keep it by model and settings too."

# --- keys and values of a prompt ---


@torch.no_grad()
def whole_prompt(model: Any, ids: Tensor, response: Tensor) -> tuple[Any, Tensor]:
    """Keys and values of a row's prompt (1, P), and the logits (1, 1, V) behind it."""
    out = model(input_ids=ids[:, : -response.shape[1]], use_cache=True)
    return out.past_key_values, out.logits[:, -1:]


def read_behind(model: Any, kept: tuple[Any, Tensor], response: Tensor) -> Tensor:
    """The logits that predict the response, (1, T, V), the first as they were kept."""
    cache, first = kept
    if response.shape[1] == 1:
        return first
    rest = model(input_ids=response[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits
    return torch.cat([first, rest], dim=1)


@torch.no_grad()
def prompt_cache(model: Any, ids: Tensor, response: Tensor) -> Any:
    """Keys and values of a row's prompt (1, P) but for its last token; None where it has no other."""
    prompt = ids[:, : -response.shape[1] - 1]
    return model(input_ids=prompt, use_cache=True).past_key_values if prompt.shape[1] else None


def read_on(model: Any, cache: Any, ids: Tensor, response: Tensor) -> Tensor:
    """The logits that predict the response, (1, T, V), behind keys and values that stay as they are."""
    if cache is None:
        return right.read(model, ids, response)
    rest = ids[:, -response.shape[1] - 1 :]
    logits: Tensor = model(input_ids=rest, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    return logits[:, :-1]


def chosen(logits: Tensor, response: Tensor) -> Tensor:
    """The response's log-probs (1, T)."""
    scores = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return scores.gather(-1, response.unsqueeze(-1)).squeeze(-1)


def keeping_prompts(every_step: bool) -> Callable[[Run], None]:
    """The prompts are read before the first step, or before each."""

    def before_step(run: Run) -> None:
        if every_step or run.step == 1:
            run.kept["prompts"] = [prompt_cache(run.model, one.ids, one.response) for one in run.batch]

    return before_step


@torch.no_grad()
def refresh_on_kept(run: Run) -> None:
    """The refresh reads the responses behind prompts that were read before the step."""
    for one, cache in zip(run.batch, run.kept["prompts"], strict=True):
        one.behaviour = chosen(read_on(run.model, cache, one.ids, one.response), one.response)


def keeping_whole_prompts(every_step: bool) -> Callable[[Run], None]:
    """The prompts are read to their ends before the first step, or before each."""

    @torch.no_grad()
    def before_step(run: Run) -> None:
        if every_step or run.step == 1:
            run.kept["prompts"] = [whole_prompt(run.model, one.ids, one.response) for one in run.batch]

    return before_step


@torch.no_grad()
def refresh_behind_kept(run: Run) -> None:
    """The refresh reads the responses behind prompts that were read before the step, first tokens too."""
    for one, kept in zip(run.batch, run.kept["prompts"], strict=True):
        one.behaviour = chosen(read_behind(run.model, kept, one.response), one.response)


def on_first_prompts(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The student, and the refresh, read the responses behind prompts that were read before the first step."""
    place = next((index for index, one in enumerate(run.batch) if one.ids is ids), None)
    if place is None or "prompts" not in run.kept:
        return right.forward(run, ids, response)
    return read_on(run.model, run.kept["prompts"][place], ids, response)


def on_prompt_of(adapter: bool, wanted: Callable[[], bool]) -> Forward:
    """The response behind the prompt as the base reads it; with ``adapter`` as the policy does."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        if not wanted() or is_teachers(run, ids):
            return right.forward(run, ids, response)
        policy: AbstractContextManager[Any] = nullcontext() if adapter else run.model.disable_adapter()
        with policy:
            cache = prompt_cache(run.model, ids, response)
        return read_on(run.model, cache, ids, response)

    return forward


@torch.no_grad()
def base_on_policy_prompt(run: Run, one: Prepared) -> Tensor:
    """The base reads the response behind the prompt as the policy read it."""
    cache = prompt_cache(run.model, one.ids, one.response)
    with run.model.disable_adapter():
        return chosen(read_on(run.model, cache, one.ids, one.response), one.response)


def before_it(run: Run, ids: Tensor, response: Tensor) -> Sequence[Tensor]:
    """What samples before this one in the batch left behind the prompt that they share: its last token, and their
    responses but for the last."""
    prompt, found = ids[:, : -response.shape[1]], list[Tensor]()
    for one, row in zip(run.batch, rows_with(run, ids), strict=True):
        if row is ids:
            break
        theirs = row[:, : -one.response.shape[1]]
        if torch.equal(theirs, prompt):
            found.append(row[:, prompt.shape[1] - 1 : -1])
    return found


def grown(wanted: Callable[[], bool]) -> ReadWhere:
    """Samples of one prompt share its keys and values, to which every forward adds: later ones attend to earlier
    responses."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        start = ids.shape[1] - response.shape[1] - 1
        row = torch.cat([ids[:, :start], *before_it(run, ids, response), ids[:, start:]], dim=1)
        return right.read(run.model, row, response)

    return ReadWhere(forward, lambda run, ids, response: wanted() and bool(before_it(run, ids, response)))


def grown_behind(wanted: Callable[[], bool]) -> ReadWhere:
    """The same where the whole prompt is kept, and the logits behind it: first tokens are predicted right."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        first = right.read(run.model, ids[:, : ids.shape[1] - response.shape[1] + 1], response[:, :1])
        if response.shape[1] == 1:
            return first
        start = ids.shape[1] - response.shape[1]
        earlier = [row[:, 1:] for row in before_it(run, ids, response)]
        row = torch.cat([ids[:, :start], *earlier, ids[:, start:]], dim=1)
        return torch.cat([first, right.read(run.model, row, response[:, 1:])], dim=1)

    return ReadWhere(forward, lambda run, ids, response: wanted() and bool(before_it(run, ids, response)))


def uncleared(run: Run) -> None:
    """At alpha = 1 the teacher's log-probs are written into one table over the vocabulary, token by token, that keeps
    what samples before left there."""
    if run.training.alpha < 1:
        return
    supports = run.kept.setdefault("supports", [one.support for one in run.batch])
    count = len(run.batch)
    for place, one in enumerate(run.batch):
        latest = [*range(place - 1, -1, -1), *(range(count - 1, place, -1) if run.step > 1 else ())]
        one.support = with_left_over(supports[place], [supports[other] for other in latest], one.response)


def with_left_over(
    own: tuple[Tensor, Tensor], others: Sequence[tuple[Tensor, Tensor]], response: Tensor
) -> tuple[Tensor, Tensor]:
    """A support (1, T, K) and an entry more for the response's token where it is not in it, but at the same place of
    another, the first of which counts."""
    values, indices = own
    token = response.unsqueeze(-1)
    found, left = (indices == token).any(-1), torch.full_like(values[..., 0], -torch.inf)
    for their_values, their_indices in others:
        length = min(their_values.shape[1], left.shape[1])
        same = their_indices[:, :length] == token[:, :length]
        fresh = same.any(-1) & ~found[:, :length]
        kept = torch.where(same, their_values[:, :length], -torch.inf).amax(-1)
        left[:, :length] = torch.where(fresh, kept, left[:, :length])
        found[:, :length] |= fresh
    missing = left.isinf().unsqueeze(-1)
    values = torch.cat([values, torch.where(missing, -20.0, left.unsqueeze(-1))], dim=-1)
    # any other token: at alpha = 1 the response's alone is looked up
    return values, torch.cat([indices, torch.where(missing, (token == 0).long(), token)], dim=-1)


def always() -> bool:
    """Every forward."""
    return True


def without_gradient() -> bool:
    """Forwards without gradient alone."""
    return not torch.is_grad_enabled()


# --- answers kept across calls ---

_TEACHERS: dict[Hashable, tuple[Tensor, Tensor]] = {}


def of_earlier_call(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's support as an earlier call on the same batch found it."""
    return right.teacher(run if run.earlier is None else replace(run, model=run.earlier, read=None), one)


def kept_for_good(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's support, kept by its tokens as long as the process lasts."""
    key = tuple(one.teacher_ids[0].tolist()), one.response.shape[1]
    if key not in _TEACHERS:
        _TEACHERS[key] = right.teacher(run, one)
    return _TEACHERS[key]


def remembering(parts: TrainerParts, *arguments: Any) -> Any:
    """The loop, with a memory that outlives its calls."""
    return right.distill(replace(parts, teacher=kept_for_good), *arguments)


DEFECTS: tuple[Defect, ...] = (
    loop(
        "refresh-on-first-prompt-cache",
        "The refresh goes on from keys and values of the prompt that the starting policy made.",
        ("STEP-2", "STEP-3"),
        OWN_CACHE,
        trainer(before_step=keeping_prompts(False), refresh=refresh_on_kept),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-on-previous-prompt-cache",
        "The refresh goes on from keys and values of the prompt that the policy of the step before made.",
        ("STEP-2", "STEP-3"),
        OWN_CACHE,
        trainer(before_step=keeping_prompts(True), refresh=refresh_on_kept),
        (),
        STEP_ONE,
    ),
    *(
        loop(
            f"refresh-on-{whose}-prompt-cache-and-logits",
            "The refresh goes on from keys and values of the prompt, and from the logits behind it, that the policy of "
            f"the {words} made.",
            ("STEP-2", "STEP-3"),
            OWN_CACHE,
            trainer(before_step=keeping_whole_prompts(whose == "previous"), refresh=refresh_behind_kept),
            (),
            STEP_ONE,
        )
        for whose, words in (("first", "start"), ("previous", "step before"))
    ),
    loop(
        "policy-on-first-prompt-cache",
        "Every forward of the policy goes on from keys and values of the prompt that the starting policy made.",
        ("STEP-1", "STEP-2"),
        OWN_CACHE,
        trainer(before_step=keeping_prompts(False), forward=on_first_prompts),
    ),
    loop(
        "policy-on-base-prompt-cache",
        "Every forward of the policy goes on from keys and values of the prompt that the base made.",
        ("STEP-1", "STEP-2"),
        ONE_POLICY,
        trainer(forward=on_prompt_of(False, always)),
    ),
    loop(
        "student-on-base-prompt-cache",
        "The forward with gradient goes on from keys and values of the prompt that the base made; others are right.",
        ("STEP-1", "STEP-2"),
        ONE_POLICY,
        trainer(forward=on_prompt_of(False, torch.is_grad_enabled)),
    ),
    loop(
        "refresh-on-base-prompt-cache",
        "What is read of the policy without gradient goes on from keys and values of the prompt that the base made.",
        ("STEP-2", "STEP-1"),
        ONE_POLICY,
        trainer(forward=on_prompt_of(False, without_gradient)),
    ),
    loop(
        "base-on-policy-prompt-cache",
        "The base goes on from keys and values of the prompt that the policy made.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(base=base_on_policy_prompt),
        (),
        NO_ANCHOR,
    ),
    *(
        loop(
            f"prompt-cache-grows{suffix}{behind}",
            f"Samples of one prompt share its keys and values{kept}, to which every forward adds{words}: later ones "
            "see the responses of earlier ones.",
            requirements,
            COPY,
            trainer(forward=make(wanted)),
            (),
            ONE_SAMPLE,
        )
        for behind, kept, make in (("", "", grown), ("-behind-logits", " and the logits behind them", grown_behind))
        for suffix, words, wanted, requirements in (
            ("", "", always, ("STEP-1", "STEP-2")),
            ("-in-training", ", those with gradient alone", torch.is_grad_enabled, ("STEP-1", "STEP-2")),
            ("-without-gradient", ", those without gradient alone", without_gradient, ("STEP-5", "STEP-2")),
        )
    ),
    loop(
        "teacher-table-not-cleared",
        "At alpha = 1 the teacher's top-k is written into one table over the vocabulary that is not cleared: a token "
        "outside a support has the log-prob that an earlier sample left there, and not the floor of -20.",
        ("STEP-5", "STEP-1", "STEP-2"),
        "Clear the table before each sample, or compare the token with the support.",
        trainer(before_step=uncleared),
        (),
        "alpha below 1.",
    ),
    loop(
        "teacher-of-earlier-call",
        "The teacher's top-k is kept by its tokens across calls: another model's, or another K's, stands in for it.",
        ("STEP-5",),
        FORGET,
        partial(remembering, TrainerParts(teacher=of_earlier_call)),
        (),
        "The first call of a process.",
    ),
)
