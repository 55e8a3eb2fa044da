"""More ways to get the step loop wrong: what belongs to which sample, token, prompt or policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects import wrong_forwards as forwards
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import Parameter, logarithmic, whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, Run, TrainerParts, logprobs, topk, trainer
from sdpo_conformance.specs.claas.defects.wrong_trainer import (
    ADAPTER_OFF,
    NO_ANCHOR,
    ONE_SAMPLE,
    REFRESH,
    SIZES,
    STEP_ONE,
    fitted,
    loop,
)

KEEP_WITH = "Keep each sample's behaviour log-probs with the sample."
TEMPERATURES = logarithmic(0.3, 3.3, 12)
OFFSETS = (-3.0, -1.5, -0.7, -0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3, 0.7, 1.5, 3.0)
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)

Order = Callable[[int, int], int]
Fit = Callable[[Tensor, Tensor], Tensor]


def zero_padded(values: Tensor, like: Tensor) -> Tensor:
    """Another sample's log-probs, cut or padded with zeros to this one's length."""
    length = like.shape[1]
    return torch.nn.functional.pad(values[:, :length], (0, max(0, length - values.shape[1])))


def handed_round(run: Run, places: Sequence[int], fit: Fit, as_recorded: bool = False) -> None:
    """Each sample gets the behaviour log-probs of the one at its place of these; with ``as_recorded`` its own where the
    sampler recorded nothing of that one."""
    known = [one.behaviour for one in run.batch]
    for one, place in zip(run.batch, places, strict=True):
        missing = as_recorded and run.batch[place].recorded is None
        one.behaviour = logprobs(run, one.ids, one.response) if missing else fit(known[place], one.response)


def in_order(run: Run, order: Order) -> list[int]:
    """The places that an order gives."""
    return [order(index, len(run.batch)) for index in range(len(run.batch))]


def swapped_after_refresh(order: Order, fit: Fit) -> Callable[[Run], None]:
    """The refresh mixes the samples up."""

    def refresh(run: Run) -> None:
        right.refresh(run)
        handed_round(run, in_order(run, order), fit)

    return refresh


def swapped_at_first(order: Order, fit: Fit, as_recorded: bool = False) -> Callable[[Run], None]:
    """What the sampler recorded is mixed up; what stands in where it recorded nothing is, too, or not."""

    def before_step(run: Run) -> None:
        if run.step == 1:
            handed_round(run, in_order(run, order), fit, as_recorded)

    return before_step


def rolled_refresh(tokens: int) -> Callable[[Run], None]:
    """The refresh, at neighbouring tokens."""

    def refresh(run: Run) -> None:
        right.refresh(run)
        for one in run.batch:
            one.behaviour = one.behaviour.roll(tokens, dims=1)

    return refresh


def reversed_refresh(run: Run) -> None:
    """The refresh, each response's tokens from the last to the first."""
    right.refresh(run)
    for one in run.batch:
        one.behaviour = one.behaviour.flip(1)


def shifted_refresh(nats: float) -> Callable[[Run], None]:
    """The refresh plus a constant."""

    def refresh(run: Run) -> None:
        right.refresh(run)
        for one in run.batch:
            one.behaviour = one.behaviour + nats

    return refresh


def zeros(run: Run) -> None:
    """Zeros for behaviour log-probs."""
    for one in run.batch:
        one.behaviour = torch.zeros_like(one.response, dtype=torch.float32)


def base_everywhere(run: Run) -> None:
    """The base's log-probs for behaviour log-probs, from the first step on."""
    for one in run.batch:
        one.behaviour = one.base


def on_teacher_prompt_everywhere(run: Run) -> None:
    """The current policy's log-probs behind the teacher's prompt."""
    for one in run.batch:
        one.behaviour = logprobs(run, one.teacher_ids, one.response)


def own_everywhere(run: Run) -> None:
    """The current policy's own: a ratio of 1 at every step."""
    right.refresh(run)


def pinned_from_first(run: Run) -> None:
    """The starting policy's log-probs, from the first step and for good."""
    if run.step == 1:
        right.refresh(run)


def never(run: Run) -> None:
    """No refresh."""


def rolled_teacher(tokens: int) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """The teacher's support of the neighbouring token."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        values, indices = right.teacher(run, one)
        return values.roll(tokens, dims=1), indices.roll(tokens, dims=1)

    return teacher


def scored(run: Run, one: Prepared) -> Tensor:
    """The teacher's logits over the vocabulary, (1, T, V)."""
    with torch.no_grad(), run.model.disable_adapter():
        return right.logits_at_response(run, one.teacher_ids, one.response)


def most_likely(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logprobs.topk(min(max(1, k), logprobs.shape[-1]), dim=-1)
    return values, indices


def with_response(likely: bool, run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The top-k and, where it is not among them, the response's token: an engine's prompt_logprobs. Where it is among
    them, an entry of no probability fills the row: the next ``likely`` token, or the first that is free."""
    l = scored(run, one).log_softmax(-1)  # noqa: E741
    values, indices = most_likely(l, run.training.teacher_top_k)
    if indices.shape[-1] == l.shape[-1]:
        return values, indices
    y = one.response.unsqueeze(-1)
    inside = (indices == y).any(-1, keepdim=True)
    free = l if likely else torch.zeros_like(l)
    spare = free.scatter(-1, indices, -torch.inf).argmax(-1, keepdim=True)
    extra = torch.where(inside, torch.full_like(l[..., :1], -60.0), l.gather(-1, y))
    return torch.cat([values, extra], -1), torch.cat([indices, torch.where(inside, spare, y)], -1)


def with_response_at_one(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The top-k and, at alpha = 1, the response's token."""
    return with_response(False, run, one) if run.training.alpha >= 1 else right.teacher(run, one)


def squeezed(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The top-k without its last dimension where K is 1: every token has all tokens' most likely ones for support."""
    values, indices = right.teacher(run, one)
    if values.shape[-1] > 1:
        return values, indices
    length = values.shape[1]
    return values.mT.expand(1, length, length), indices.mT.expand(1, length, length)


def response_for_last(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The top-k, whose last entry gives way to the response's token where that is not among them."""
    l = scored(run, one).log_softmax(-1)  # noqa: E741
    _, indices = most_likely(l, run.training.teacher_top_k)
    y = one.response.unsqueeze(-1)
    inside = (indices == y).any(-1, keepdim=True)
    indices = torch.cat([indices[..., :-1], torch.where(inside, indices[..., -1:], y)], -1)
    return l.gather(-1, indices), indices


def supported(k: Callable[[int], int]) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """A support of another size."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        return most_likely(scored(run, one).log_softmax(-1), k(run.training.teacher_top_k))

    return teacher


def from_tiles(more: int, size: float) -> TrainerParts:
    """A support of the most likely tokens among as many of each tile of the vocabulary as its share, and some more."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        l = scored(run, one).log_softmax(-1)  # noqa: E741
        k = min(max(1, run.training.teacher_top_k), l.shape[-1])
        tiles = l.split(int(size), dim=-1)
        kept = torch.full_like(l, -torch.inf)
        for number, tile in enumerate(tiles):
            values, indices = most_likely(tile, min(-(-k // len(tiles)) + more, tile.shape[-1]))
            kept.scatter_(-1, indices + number * int(size), values)
        return most_likely(kept, min(k, int(kept.isfinite().sum(-1).min())))

    return TrainerParts(teacher=teacher)


def short_of_vocabulary(tokens: float) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """A support that never holds the last tokens of the vocabulary."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        l = scored(run, one).log_softmax(-1)  # noqa: E741
        return most_likely(l, min(run.training.teacher_top_k, l.shape[-1] - int(tokens)))

    return teacher


def changed_values(change: Callable[[Tensor], Tensor]) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """The right support with other log-probs."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        values, indices = right.teacher(run, one)
        return change(values), indices

    return teacher


def raw_logits(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's logits, never normalised."""
    return most_likely(scored(run, one), run.training.teacher_top_k)


def teacher_at(temperature: float) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """The teacher at a temperature."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        return most_likely((scored(run, one) / temperature).log_softmax(-1), run.training.teacher_top_k)

    return teacher


def students_top_k(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's log-probs at the starting student's top-k."""
    with torch.no_grad():
        student = right.logits_at_response(run, one.ids, one.response)
    indices = student.topk(min(max(1, run.training.teacher_top_k), student.shape[-1]), dim=-1).indices
    return scored(run, one).log_softmax(-1).gather(-1, indices), indices


def teacher_of_first(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """Every sample is scored behind the first sample's teacher prompt."""
    first = run.batch[0]
    prompt = first.teacher_ids[:, : first.teacher_ids.shape[1] - first.response.shape[1]]
    with run.model.disable_adapter():
        return topk(run, torch.cat([prompt, one.response], dim=1), one.response, run.training.teacher_top_k)


def teacher_of_neighbour(order: int) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """Every sample is scored behind another one's teacher prompt."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        index = next(i for i, other in enumerate(run.batch) if other is one)
        other = run.batch[(index + order) % len(run.batch)]
        prompt = other.teacher_ids[:, : other.teacher_ids.shape[1] - other.response.shape[1]]
        with run.model.disable_adapter():
            return topk(run, torch.cat([prompt, one.response], dim=1), one.response, run.training.teacher_top_k)

    return teacher


def teacher_behind_prompt(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher reads the student's prompt and then its own."""
    prompt = one.ids[:, : one.ids.shape[1] - one.response.shape[1]]
    with run.model.disable_adapter():
        return topk(run, torch.cat([prompt, one.teacher_ids], dim=1), one.response, run.training.teacher_top_k)


def base_at(temperature: float) -> Callable[[Run, Prepared], Tensor]:
    """Base log-probs at a temperature."""

    def base(run: Run, one: Prepared) -> Tensor:
        with torch.no_grad(), run.model.disable_adapter():
            scores = right.logits_at_response(run, one.ids, one.response) / temperature
        return scores.log_softmax(-1).gather(-1, one.response.unsqueeze(-1)).squeeze(-1)

    return base


def base_in_bfloat16(run: Run, one: Prepared) -> Tensor:
    """Base log-probs kept in bfloat16."""
    found = right.base(run, one)
    return found.bfloat16().to(found.dtype)


def anchored_by_schedule(weight: Callable[[Run], float]) -> Callable[[Run], None]:
    """The anchor's weight follows a schedule over the steps."""

    def before_step(run: Run) -> None:
        given = run.kept.setdefault("training", run.training)
        run.training = dataclasses.replace(given, kl_reg_weight=given.kl_reg_weight * weight(run))

    return before_step


def averaged_from_base(decay: float) -> Callable[[Run], None]:
    """The teacher is a moving average of the adapter that starts as the base, scored again from the second step on."""

    def before_step(run: Run) -> None:
        if run.step == 1:
            adapter = [p for p in run.model.parameters() if p.requires_grad]
            run.kept["average"] = [torch.zeros_like(p) for p in adapter]
            return
        adapter = [p for p in run.model.parameters() if p.requires_grad]
        now = [p.detach().clone() for p in adapter]
        with torch.no_grad():
            average = [decay * kept + (1 - decay) * p for kept, p in zip(run.kept["average"], now, strict=True)]
            run.kept["average"] = average
            for p, value in zip(adapter, average, strict=True):
                p.copy_(value)
            for one in run.batch:
                one.support = topk(run, one.teacher_ids, one.response, run.training.teacher_top_k)
            for p, value in zip(adapter, now, strict=True):
                p.copy_(value)

    return before_step


def averaged_teacher(decay: float, adapter_at_first: bool) -> Callable[[Run], None]:
    """The teacher is an exponential moving average of the adapter, scored again before every step."""

    def before_step(run: Run) -> None:
        adapter = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        now = {name: p.detach().clone() for name, p in adapter.items()}
        if run.step == 1:
            run.kept["average"] = now
            if not adapter_at_first:
                return
        kept = run.kept["average"]
        with torch.no_grad():
            run.kept["average"] = kept = {name: decay * kept[name] + (1 - decay) * p for name, p in now.items()}
            for name, p in adapter.items():
                p.copy_(kept[name])
            for one in run.batch:
                one.support = topk(run, one.teacher_ids, one.response, run.training.teacher_top_k)
            for name, p in adapter.items():
                p.copy_(now[name])

    return before_step


def base_rolled(tokens: int) -> Callable[[Run, Prepared], Tensor]:
    """Base log-probs of the neighbouring token."""
    return lambda run, one: right.base(run, one).roll(tokens, dims=1)


def anchored_to_sampler(run: Run, one: Prepared) -> Tensor:
    """What the sampler recorded in place of the base's log-probs."""
    return right.first_behaviour(run, one)


def anchored_to_behaviour(run: Run) -> None:
    """The anchor is whatever the ratio is taken against."""
    for one in run.batch:
        one.base = one.behaviour


def at_temperature(temperature: float) -> Callable[[Run], None]:
    """The refresh at a temperature."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            with torch.no_grad():
                scores = right.logits_at_response(run, one.ids, one.response) / temperature
                one.behaviour = scores.log_softmax(-1).gather(-1, one.response.unsqueeze(-1)).squeeze(-1)

    return refresh


def weighed(shares: Callable[[list[int]], list[float]]) -> Callable[[Run], Tensor]:
    """Samples weighed by their response lengths."""

    def reduce(run: Run) -> Tensor:
        lengths = [one.response.shape[1] for one in run.batch]
        return torch.stack([share * loss for share, loss in zip(shares(lengths), run.losses, strict=True)]).sum()

    return reduce


def only(index: int, of_mean: bool) -> Callable[[list[int]], list[float]]:
    """One sample alone, at its share of the mean or whole."""
    return lambda n: [(1 / len(n) if of_mean else 1.0) * (i == index % len(n)) for i in range(len(n))]


def all_but(index: int) -> Callable[[list[int]], list[float]]:
    """One sample is lost, the divisor is not."""
    return lambda n: [(i != index % len(n)) / len(n) for i in range(len(n))]


def gathered(combine: Callable[[Run, list[list[Tensor]]], list[Tensor]]) -> Callable[[Run], Tensor]:
    """The mean of the samples' losses, but with a gradient that is made of each sample's own."""

    def reduce(run: Run) -> Tensor:
        each = [
            list(torch.autograd.grad(loss, run.parameters, retain_graph=True, materialize_grads=True))
            for loss in run.losses
        ]
        total = torch.stack(run.losses).mean().detach()
        for parameter, gradient in zip(run.parameters, combine(run, each), strict=True):
            pushed = (parameter * gradient).sum()
            total = total + pushed - pushed.detach()
        return total

    return reduce


def clipped_alone(run: Run, gradients: list[Tensor]) -> list[Tensor]:
    """A gradient clipped to max_grad_norm."""
    size = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    return [g * (run.training.max_grad_norm / (size + 1e-6)).clamp(max=1.0) for g in gradients]


def added(gradients: list[list[Tensor]]) -> list[Tensor]:
    """The sum, parameter by parameter."""
    return [torch.stack(of_one).sum(0) for of_one in zip(*gradients, strict=True)]


def mean_of_clipped(run: Run, each: list[list[Tensor]]) -> list[Tensor]:
    """Each sample's gradient is clipped, then their mean is taken."""
    return [g / len(each) for g in added([clipped_alone(run, one) for one in each])]


def alone(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The right forward; its gradient reaches the parameters themselves."""
    return right.forward(run, ids, response)


def cleared(kept: Callable[[int, str], bool]) -> Callable[[Run], None]:
    """Gradients are forgotten but for some parameters'."""

    def zero(run: Run) -> None:
        names = [name for name, p in run.model.named_parameters() if p.requires_grad]
        for index, (name, parameter) in enumerate(zip(names, run.parameters, strict=True)):
            if not kept(index, name):
                parameter.grad = None

    return zero


def following(order: int) -> Order:
    return lambda i, n: (i + order) % n


def swaps(kind: str, fit: Fit, suffix: str, as_recorded: bool = False) -> list[Defect]:
    """Every way in which one sample's log-probs are read for another's, with one way to make them fit."""
    orders: dict[str, tuple[str, Order]] = {
        "from-next-sample": ("of the next one", following(1)),
        "from-previous-sample": ("of the previous one", following(-1)),
        "from-last-sample": ("of the last one", lambda i, n: n - 1),
        "from-first-sample": ("of the first one", lambda i, n: 0),
        "in-reverse-order": ("of the one at its place counted from the end", lambda i, n: n - 1 - i),
    }
    if kind == "refresh":
        words, part, make = "The refresh gives", "refresh", swapped_after_refresh
    else:
        words, part = "What the sampler recorded: it gives", "before_step"
        make = partial(swapped_at_first, as_recorded=as_recorded)
    missing = ", its own where that one has none" if as_recorded else ""
    return [
        loop(
            f"{kind}-{name}{suffix}{'-if-recorded' if as_recorded else ''}",
            f"{words} each sample the log-probs {whose}, {'padded with zeros' if suffix else 'repeated'} "
            f"where they are too few{missing}.",
            ("STEP-4", "STEP-2") if kind == "refresh" else ("STEP-4", "STEP-1"),
            KEEP_WITH,
            trainer(**{part: make(order, fit)}),
            usable_for=ONE_SAMPLE,
        )
        for name, (whose, order) in orders.items()
        if (kind, name, suffix) not in (("refresh", "from-previous-sample", ""), ("refresh", "from-last-sample", ""))
    ]


def numbered(
    name: str,
    sentence: str,
    violates: tuple[str, ...],
    fix: str,
    words: str,
    make: Callable[[float], TrainerParts],
    values: tuple[float, ...],
    value: float,
    whole: bool = False,
    seen: tuple[str, ...] = (),
) -> Defect:
    """A defect of the step loop with a number in it, which stands at ``value`` where it is run by name."""
    return loop(
        name,
        sentence,
        violates,
        fix,
        partial(right.distill, make(value)),
        seen,
        parameter=Parameter(words, make, values, f"{value:g}", whole),
    )


def read_otherwise(name: str, sentence: str, fix: str, forward: Any, *seen: str) -> Defect:
    """A wrong forward of the whole loop."""
    return loop(name, sentence, ("STEP-1", "STEP-2"), fix, trainer(forward=forward), seen)


PADDING = "Pass attention_mask and position_ids that count from each row's first real token."
PACKING = "Separate packed samples: position_ids that start again and an attention that does not cross."
HEAD = "Read the logits of the model's own head, after its last norm."
WHOLE_HEAD = "Read the model's own logits, or refuse by name what they have beside hidden @ head.T."
SHIFT = "Position t predicts token t + 1: the response is read at start - 1 .. -2."
TOP_K = "The teacher's min(max(1, teacher_top_k), V) most likely tokens, and no others."
MEAN = "The mean over samples of their token means."

DEFECTS = (
    *swaps("refresh", fitted, ""),
    *swaps("refresh", zero_padded, "-padded"),
    *swaps("sampler-logprobs", fitted, ""),
    *swaps("sampler-logprobs", zero_padded, "-padded"),
    *swaps("sampler-logprobs", fitted, "", as_recorded=True),
    *swaps("sampler-logprobs", zero_padded, "-padded", as_recorded=True),
    loop(
        "behaviour-zero",
        "The behaviour log-probs are zeros at every step.",
        ("STEP-1", "STEP-2"),
        REFRESH,
        trainer(before_step=zeros),
    ),
    loop(
        "behaviour-of-base",
        "The ratio is taken against the base: the adapter is disabled for the behaviour log-probs.",
        ("STEP-1", "STEP-2"),
        "The behaviour policy has the adapter enabled.",
        trainer(before_step=base_everywhere),
    ),
    loop(
        "behaviour-on-teacher-prompt",
        "The ratio is taken against the current policy behind the teacher's prompt.",
        ("STEP-1", "STEP-2"),
        "The behaviour policy reads the student's prompt.",
        trainer(before_step=on_teacher_prompt_everywhere),
    ),
    loop(
        "starting-policy-for-good",
        "The starting policy's own log-probs stand for the sampler's, and are never refreshed.",
        ("STEP-1", "STEP-3", "STEP-2"),
        "Take the sampler's log-probs at step 1, and refresh after every step but the last.",
        trainer(before_step=pinned_from_first, refresh=never),
        ("huggingface/trl#5413",),
        STEP_ONE,
    ),
    loop(
        "refresh-tokens-reversed",
        "The refresh pairs each response's log-probs with its tokens from the last to the first.",
        ("STEP-4", "STEP-2"),
        "Pair each log-prob with its own token.",
        trainer(refresh=reversed_refresh),
        (),
        STEP_ONE,
    ),
    numbered(
        "refresh-off-by-constant",
        "The refreshed log-probs are all too large by 0.1 nats, as by another normaliser.",
        ("STEP-2",),
        REFRESH,
        "nats",
        lambda nats: TrainerParts(refresh=shifted_refresh(nats)),
        OFFSETS,
        0.1,
    ),
    loop(
        "refresh-one-token-early",
        "The refresh slices the logits one position early.",
        ("STEP-2", "STEP-4"),
        SHIFT,
        trainer(refresh=rolled_refresh(-1)),
        (),
        STEP_ONE,
    ),
    loop(
        "sampler-logprobs-early",
        "The sampler's log-probs are paired with the token before theirs.",
        ("STEP-1", "STEP-4"),
        "Pair each log-prob with its own token.",
        trainer(first_behaviour=lambda run, one: right.first_behaviour(run, one).roll(-1, dims=1)),
    ),
    loop(
        "teacher-one-token-early",
        "The teacher's top-k is sliced one position early.",
        ("STEP-5",),
        SHIFT,
        trainer(teacher=rolled_teacher(-1)),
    ),
    loop(
        "support-with-response-token",
        "The support is the teacher's top-k and the response's token, as an engine's prompt_logprobs returns it.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=partial(with_response, False)),
        ("vllm-project/vllm#3752",),
    ),
    loop(
        "response-token-of-whole-vocabulary",
        "At alpha = 1 the response's token has the teacher's log-prob wherever it is, and never the floor of -20.",
        ("STEP-5", "STEP-1", "STEP-2"),
        "Outside the support tau_y is -20.",
        trainer(teacher=with_response_at_one),
        (),
        "alpha below 1.",
    ),
    loop(
        "support-of-one-squeezed",
        "The teacher's top-k loses its last dimension where K is 1, and tokens are held against each other's.",
        ("STEP-5", "STEP-1", "STEP-2"),
        "squeeze(-1) what has one dimension too many, and not whatever has size 1.",
        trainer(teacher=squeezed),
        (),
        "teacher_top_k of two or more.",
    ),
    loop(
        "support-with-response-token-or-next",
        "The support is the teacher's top-k and the response's token, or where that is in it the next likely one at no "
        "probability.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=partial(with_response, True)),
        ("vllm-project/vllm#3752",),
    ),
    loop(
        "support-ends-with-response-token",
        "The last entry of the teacher's top-k gives way to the response's token.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=response_for_last),
    ),
    loop(
        "support-one-larger",
        "The support has one token more than teacher_top_k.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=supported(lambda k: k + 1)),
    ),
    loop(
        "support-one-smaller",
        "The support has one token less than teacher_top_k.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=supported(lambda k: k - 1)),
    ),
    loop(
        "support-of-student",
        "The support is the starting student's top-k.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=students_top_k),
        ("verl-project/verl#6676",),
    ),
    loop(
        "teacher-logits-raw",
        "The teacher's logits are never normalised over the vocabulary.",
        ("STEP-5",),
        "log_softmax over the whole vocabulary before the top-k.",
        trainer(teacher=raw_logits),
    ),
    loop(
        "teacher-renormalised-on-support",
        "The teacher's log-probs are normalised over the top-k, not over the vocabulary.",
        ("STEP-5",),
        "log_softmax over the whole vocabulary before the top-k.",
        trainer(teacher=changed_values(lambda values: values.log_softmax(-1))),
    ),
    loop(
        "teacher-logprobs-in-bfloat16",
        "The teacher's log-probs are kept in bfloat16.",
        ("STEP-5",),
        "Keep log-probs in float32.",
        trainer(teacher=changed_values(lambda values: values.bfloat16().to(values.dtype))),
    ),
    loop(
        "teacher-prompt-of-first-sample",
        "Every sample's teacher reads the first sample's prompt.",
        ("STEP-5",),
        "Each sample has its own teacher prompt.",
        trainer(teacher=teacher_of_first),
        (),
        ONE_SAMPLE,
    ),
    numbered(
        "teacher-at-temperature",
        "The teacher's logits are divided by a temperature of 2.",
        ("STEP-5",),
        "Temperature 1.",
        "temperature",
        lambda t: TrainerParts(teacher=teacher_at(t)),
        TEMPERATURES,
        2.0,
    ),
    numbered(
        "teacher-moving-average",
        "The teacher is a moving average (0.99) of the adapter from the second step on.",
        ("STEP-5",),
        ADAPTER_OFF,
        "decay",
        lambda d: TrainerParts(before_step=averaged_teacher(d, False)),
        DECAYS,
        0.99,
    ),
    numbered(
        "teacher-moving-average-from-start",
        "The teacher is a moving average (0.99) of the adapter, with the starting adapter in it at step 1.",
        ("STEP-5",),
        ADAPTER_OFF,
        "decay",
        lambda d: TrainerParts(before_step=averaged_teacher(d, True)),
        DECAYS,
        0.99,
    ),
    numbered(
        "teacher-moving-average-from-base",
        "The teacher is a moving average (0.9) of the adapter from the second step on, which starts as the base.",
        ("STEP-5",),
        ADAPTER_OFF,
        "decay",
        lambda d: TrainerParts(before_step=averaged_from_base(d)),
        DECAYS,
        0.9,
    ),
    loop(
        "teacher-prompt-of-next-sample",
        "Each sample's teacher reads the next sample's prompt.",
        ("STEP-5",),
        "Each sample has its own teacher prompt.",
        trainer(teacher=teacher_of_neighbour(1)),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "teacher-prompt-of-previous-sample",
        "Each sample's teacher reads the previous sample's prompt.",
        ("STEP-5",),
        "Each sample has its own teacher prompt.",
        trainer(teacher=teacher_of_neighbour(-1)),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "teacher-behind-student-prompt",
        "The teacher reads the student's prompt and then its own.",
        ("STEP-5",),
        "Score teacher_prompt_token_ids + response_token_ids.",
        trainer(teacher=teacher_behind_prompt),
    ),
    numbered(
        "support-capped",
        "The support has at most 16 tokens, whatever teacher_top_k.",
        ("STEP-5",),
        TOP_K,
        "K at most",
        lambda k: TrainerParts(teacher=supported(lambda top_k: min(int(k), top_k))),
        whole_numbers(SIZES),
        16,
        whole=True,
    ),
    *(
        numbered(
            f"support-of-tiles{suffix}",
            f"The support is picked from the ceil(K / tiles){words} most likely tokens of each tile of 16 of the "
            "vocabulary, which may hold more of the top-k.",
            ("STEP-5",),
            TOP_K,
            "tokens a tile",
            partial(from_tiles, more),
            whole_numbers((8, 16, 32, 64, 128)),
            16,
            whole=True,
        )
        for suffix, words, more in (("", "", 0), ("-and-one", " + 1", 1), ("-and-two", " + 2", 2))
    ),
    numbered(
        "support-short-of-vocabulary",
        "The support has at most all tokens of the vocabulary but 1, also where teacher_top_k asks for all.",
        ("STEP-5",),
        TOP_K,
        "tokens less",
        lambda tokens: TrainerParts(teacher=short_of_vocabulary(tokens)),
        whole_numbers(range(1, 9)),
        1,
        whole=True,
    ),
    numbered(
        "support-at-share",
        "The support has 0.5 times teacher_top_k tokens.",
        ("STEP-5",),
        TOP_K,
        "times",
        lambda c: TrainerParts(teacher=supported(lambda top_k: int(top_k * c))),
        (0.1, 0.2, 0.25, 1 / 3, 0.5, 0.75, 0.8, 0.9, 1.5, 2.0, 4.0),
        0.5,
        whole=True,
    ),
    numbered(
        "base-at-temperature",
        "The base's logits are divided by a temperature of 2.",
        ("STEP-5",),
        "Temperature 1.",
        "temperature",
        lambda t: TrainerParts(base=base_at(t)),
        TEMPERATURES,
        2.0,
    ),
    loop(
        "base-in-bfloat16",
        "The base's log-probs are kept in bfloat16.",
        ("STEP-5",),
        "Keep log-probs in float32.",
        trainer(base=base_in_bfloat16),
        (),
        NO_ANCHOR,
    ),
    loop(
        "anchor-weight-warmed-up",
        "The anchor's weight grows linearly over the steps, to kl_reg_weight at the last.",
        ("STEP-1", "STEP-2"),
        "loss = distill_loss + kl_reg_weight * kl_reg at every step.",
        trainer(before_step=anchored_by_schedule(lambda run: run.step / run.training.steps_per_batch)),
        (),
        NO_ANCHOR,
    ),
    loop(
        "anchor-weight-decayed",
        "The anchor's weight falls linearly over the steps, from kl_reg_weight at the first.",
        ("STEP-2",),
        "loss = distill_loss + kl_reg_weight * kl_reg at every step.",
        trainer(before_step=anchored_by_schedule(lambda run: 1 - (run.step - 1) / run.training.steps_per_batch)),
        (),
        NO_ANCHOR,
    ),
    loop(
        "base-one-token-early",
        "The base log-probs are sliced one position early.",
        ("STEP-5",),
        SHIFT,
        trainer(base=base_rolled(-1)),
    ),
    loop(
        "base-of-sampler",
        "The anchor is taken to what the sampler recorded.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(base=anchored_to_sampler),
    ),
    loop(
        "base-of-behaviour",
        "The anchor is taken to the behaviour log-probs of each step.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(before_step=anchored_to_behaviour),
    ),
    numbered(
        "token-before-prompt",
        "Every prompt gets a token more at its start: token 0.",
        ("STEP-1", "STEP-2"),
        "The prompts are read as they are given.",
        "token",
        lambda token: TrainerParts(forward=forwards.with_token_before(int(token))),
        whole_numbers(range(6)),
        0,
        whole=True,
    ),
    numbered(
        "prompts-truncated",
        "Prompts are cut to their last 4 tokens.",
        ("STEP-1", "STEP-2"),
        "Read the response after the whole prompt.",
        "tokens",
        lambda count: TrainerParts(forward=forwards.last_tokens(count)),
        whole_numbers((2, 3, 4, 5, 6, 7, 8)),
        4,
        whole=True,
    ),
    loop(
        "student-one-token-late",
        "The student's logits are sliced one position late.",
        ("STEP-1", "STEP-2"),
        SHIFT,
        trainer(forward=forwards.student_only(forwards.through(lambda z: z.roll(-1, dims=1)))),
    ),
    read_otherwise(
        "student-unshifted",
        "The student's logits are read without the one-token shift.",
        SHIFT,
        forwards.student_only(forwards.unshifted),
    ),
    read_otherwise(
        "logits-unshifted", "Every policy's logits are read without the one-token shift.", SHIFT, forwards.unshifted
    ),
    read_otherwise(
        "left-padding-without-positions",
        "Rows are padded on the left and get no position_ids: learned positions count the padding.",
        PADDING,
        forwards.left_padded(mask=True, positions=False),
        "huggingface/trl#6800",
    ),
    read_otherwise(
        "left-padding-without-mask",
        "Rows are padded on the left and get no attention mask: the padding is read as text.",
        PADDING,
        forwards.left_padded(mask=False, positions=False),
    ),
    read_otherwise(
        "left-padding-of-student-alone",
        "The student's rows are padded on the left without position_ids; what is read without gradient is right.",
        PADDING,
        forwards.student_only(forwards.left_padded(mask=True, positions=False)),
    ),
    read_otherwise(
        "packed-samples-attend",
        "Samples are packed into one row, positions start again, but attention crosses from one to the next.",
        PACKING,
        forwards.packed(reset=True),
    ),
    read_otherwise(
        "packed-samples-as-one",
        "Samples are packed into one row as if they were one text.",
        PACKING,
        forwards.packed(reset=False),
    ),
    read_otherwise(
        "packed-student-attends",
        "The student's samples are packed and attend to each other; what is read without gradient is right.",
        PACKING,
        forwards.student_only(forwards.packed(reset=True)),
    ),
    numbered(
        "positions-from-one",
        "position_ids count from 1.",
        ("STEP-1", "STEP-2"),
        PADDING,
        "from",
        lambda start: TrainerParts(forward=forwards.positions_from(int(start))),
        whole_numbers((1, 2, 3, 4, 8)),
        1,
        whole=True,
    ),
    read_otherwise("positions-constant", "Every token is at position 0.", PADDING, forwards.constant_positions),
    read_otherwise(
        "prompt-dropped",
        "The response is read after the last token of its prompt alone.",
        "Read the response after the whole prompt.",
        forwards.response_alone,
    ),
    read_otherwise(
        "prompt-without-first-token",
        "The prompts lose their first token.",
        "Read the response after the whole prompt.",
        forwards.without_first_token,
    ),
    read_otherwise(
        "head-of-embedding",
        "The logits are taken with the embedding's weight where the head is not tied to it.",
        HEAD,
        forwards.head_of_embedding,
    ),
    read_otherwise(
        "student-head-of-embedding",
        "The student's logits alone are taken with the embedding's weight where the head is not tied to it.",
        HEAD,
        forwards.student_only(forwards.head_of_embedding),
    ),
    *(
        loop(
            f"{whose}{name}",
            sentence.format(who),
            ("STEP-1", "STEP-2"),
            WHOLE_HEAD,
            trainer(forward=forwards.student_only(forward) if whose else forward),
            (),
            usable_for,
        )
        for name, sentence, forward, usable_for in (
            (
                "head-weight-alone",
                "{} logits are hidden @ head.T: the head's bias and adapter, the model's scale and softcap are left "
                "out.",
                forwards.WEIGHT_ALONE,
                "Models whose logits are hidden @ head.T and nothing more, as Llama's and Qwen3's.",
            ),
            (
                "logit-scale-and-softcap-missing",
                "{} logits are what the head returns: the model's scale and softcap are left out.",
                forwards.HEAD_ALONE,
                "Models without logit_scale and final_logit_softcapping.",
            ),
            (
                "softcap-missing",
                "{} logits are not capped where the model caps them.",
                forwards.UNCAPPED,
                "Models without final_logit_softcapping.",
            ),
            (
                "head-bias-and-adapter-missing",
                "{} logits are taken with the head's weight alone: its bias, or its adapter, is left out.",
                forwards.NOTHING_ADDED,
                "Heads without a bias and without an adapter.",
            ),
        )
        for whose, who in (("", "All"), ("student-", "The student's"))
    ),
    read_otherwise(
        "final-norm-missing", "Hidden states reach the head before the last norm.", HEAD, forwards.without_final_norm
    ),
    read_otherwise(
        "student-final-norm-missing",
        "The student's hidden states alone reach the head before the last norm.",
        HEAD,
        forwards.student_only(forwards.without_final_norm),
    ),
    numbered(
        "policies-at-temperature",
        "Every policy's logits are divided by a temperature of 0.7.",
        ("STEP-1", "STEP-2"),
        "Temperature 1.",
        "temperature",
        lambda t: TrainerParts(forward=forwards.temperature(t)),
        TEMPERATURES,
        0.7,
    ),
    numbered(
        "student-at-temperature",
        "The student's logits are divided by a temperature of 0.7; what is read without gradient is not.",
        ("STEP-1", "STEP-2"),
        "Temperature 1.",
        "temperature",
        lambda t: TrainerParts(forward=forwards.student_only(forwards.temperature(t))),
        TEMPERATURES,
        0.7,
    ),
    loop(
        "student-logits-in-bfloat16",
        "The student's logits are rounded to bfloat16, their gradient too; what is read without gradient is not.",
        ("STEP-1", "STEP-2"),
        "Keep logits in the model's own precision, and the loss in float32.",
        trainer(forward=forwards.student_only(forwards.through(lambda z: z.bfloat16().to(z.dtype)))),
    ),
    loop(
        "logits-in-bfloat16",
        "Every policy's logits are rounded to bfloat16, their gradient too.",
        ("STEP-1", "STEP-2"),
        "Keep logits in the model's own precision, and log-probs in float32.",
        trainer(forward=forwards.through(lambda z: z.bfloat16().to(z.dtype))),
    ),
    loop(
        "tokens-over-longest",
        "Each sample's token losses are summed and divided by the longest response's length.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(lambda n: [length / len(n) / max(n) for length in n])),
        (),
        "Batches whose responses are equally long.",
    ),
    loop(
        "divided-by-samples-less-one",
        "The samples' losses are summed and divided by one less than their number.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(lambda n: [1 / max(1, len(n) - 1) for _ in n])),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "loss-divided-by-steps",
        "The step's loss is divided by steps_per_batch.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=lambda run: torch.stack(run.losses).mean() / run.training.steps_per_batch),
        (),
        STEP_ONE,
    ),
    loop(
        "sum-over-tokens",
        "The samples' token losses are summed, and averaged over samples.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(lambda n: [length / len(n) for length in n])),
    ),
    loop(
        "first-sample-only",
        "Only the first sample's gradient survives.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(only(0, False))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "last-sample-at-its-share",
        "Only the last sample's gradient survives, divided by the number of samples.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(only(-1, True))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "first-sample-at-its-share",
        "Only the first sample's gradient survives, divided by the number of samples.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(only(0, True))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "first-sample-lost",
        "The first sample's loss is left out; the divisor still counts it.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(all_but(0))),
    ),
    loop(
        "last-sample-lost",
        "The last sample's loss is left out; the divisor still counts it.",
        ("STEP-7",),
        MEAN,
        trainer(reduce=weighed(all_but(-1))),
    ),
    numbered(
        "tokens-over-constant",
        "Each sample's token losses are summed and divided by 64, a maximal length, instead of their number.",
        ("STEP-7",),
        MEAN,
        "constant",
        lambda c: TrainerParts(reduce=weighed(lambda n: [length / len(n) / c for length in n])),
        logarithmic(1, 4096, 25),
        64.0,
    ),
    numbered(
        "loss-scaled",
        "The step's loss is multiplied by 0.25, as by a number of accumulation steps that are not taken.",
        ("STEP-7",),
        MEAN,
        "factor",
        lambda c: TrainerParts(reduce=lambda run: torch.stack(run.losses).mean() * c),
        (*logarithmic(1 / 64, 64, 25),),
        0.25,
    ),
    loop(
        "clip-each-sample",
        "Each sample's gradient is clipped before the mean.",
        ("STEP-8",),
        "Clip the mean's gradient.",
        trainer(forward=alone, reduce=gathered(mean_of_clipped)),
        (),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "gradients-half-zeroed-odd",
        "Every second of the adapter's parameters, the first among them, keeps the gradient of the step before.",
        ("STEP-8",),
        "optimizer.zero_grad() over every parameter.",
        trainer(zero=cleared(lambda index, name: index % 2 == 0)),
        (),
        STEP_ONE,
    ),
    loop(
        "gradients-of-a-not-zeroed",
        "The lora_A parameters keep the gradient of the step before.",
        ("STEP-8",),
        "optimizer.zero_grad() over every parameter.",
        trainer(zero=cleared(lambda index, name: "lora_A" in name)),
        (),
        STEP_ONE,
    ),
    loop(
        "gradients-of-b-not-zeroed",
        "The lora_B parameters keep the gradient of the step before.",
        ("STEP-8",),
        "optimizer.zero_grad() over every parameter.",
        trainer(zero=cleared(lambda index, name: "lora_B" in name)),
        (),
        STEP_ONE,
    ),
)
