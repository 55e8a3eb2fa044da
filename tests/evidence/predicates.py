"""Conditions under which right code may go wrong: what a loss, a head or a trainer is called with.

Each table maps words to a predicate; ``conditional_mutants`` makes a wrong implementation of every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import TrainingConfig

DEFAULTS = TrainingConfig()


def past(name: str, read: Callable[[Any], float], *thresholds: float) -> dict[str, Callable[[Any], bool]]:
    """One predicate per threshold."""
    return {f"{name} > {t:g}": (lambda x, t=t: read(x) > t) for t in thresholds}  # type: ignore[misc]


def equal(name: str, read: Callable[[Any], object], *values: object) -> dict[str, Callable[[Any], bool]]:
    """One predicate per value."""
    return {f"{name} == {v}": (lambda x, v=v: read(x) == v) for v in values}  # type: ignore[misc]


# --- a loss input ---


def counted(x: Any) -> Tensor:
    return x.response_mask.double() != 0


def leading(x: Any) -> Tensor:
    return x.student_logits if hasattr(x, "student_logits") else x.student_hidden


def vocabulary(x: Any) -> int:
    return x.student_logits.shape[-1] if hasattr(x, "student_logits") else x.lm_head_weight.shape[0]


def fraction(x: Any) -> Tensor:
    m = x.response_mask.double()
    return (m != 0) & (m != 1)


def between(name: str, read: Callable[[Any], float], *spans: tuple[float, float]) -> dict[str, Callable[[Any], bool]]:
    """One predicate per open span."""
    return {f"{low:g} < {name} < {high:g}": (lambda x, a=low, b=high: a < read(x) < b) for low, high in spans}  # type: ignore[misc]


def negative_zero(tensor: Tensor) -> bool:
    return bool(((tensor == 0) & tensor.signbit()).any())


LOSS: Mapping[str, Callable[[Any], bool]] = {
    **past("T", lambda x: x.response_ids.shape[1], 1, 16, 32, 64, 128, 256, 512, 1024),
    **past("B", lambda x: x.response_ids.shape[0], 1, 2, 8, 16, 32, 64),
    **past("K", lambda x: x.teacher_indices.shape[-1], 1, 8, 64, 128, 256, 512, 1024),
    **past("V", vocabulary, 64, 256, 1024, 4096, 8192, 32768, 65536),
    **equal("T", lambda x: x.response_ids.shape[1], 1, 2, 3, 4, 5),
    **equal("K", lambda x: x.teacher_indices.shape[-1], 1, 2),
    "K == V": lambda x: x.teacher_indices.shape[-1] == vocabulary(x),
    "B == T": lambda x: x.response_ids.shape[0] == x.response_ids.shape[1],
    "K == T": lambda x: x.teacher_indices.shape[-1] == x.response_ids.shape[1],
    **equal("alpha", lambda x: x.training.alpha, 0.0, 0.5, 1.0),
    "alpha < 0.05": lambda x: 0 < x.training.alpha < 0.05,
    "alpha > 0.95": lambda x: 0.95 < x.training.alpha < 1,
    **equal("is_clip", lambda x: x.training.is_clip, 1.0, 5.0),
    "is_clip < 1": lambda x: x.training.is_clip < 1,
    **past("is_clip", lambda x: x.training.is_clip, 50, 1e8),
    **equal("kl_reg_weight", lambda x: x.training.kl_reg_weight, 0.0, 1.0),
    "kl_reg_weight > 1": lambda x: x.training.kl_reg_weight > 1,
    "a response id is 0": lambda x: bool((x.response_ids == 0).any()),
    "a response id is V - 1": lambda x: bool((x.response_ids == vocabulary(x) - 1).any()),
    "two neighbouring ids are equal": lambda x: bool((x.response_ids[:, 1:] == x.response_ids[:, :-1]).any()),
    "two rows have equal ids": lambda x: (
        x.response_ids.shape[0] > 1 and bool((x.response_ids[-1] == x.response_ids[0]).all())
    ),
    "two rows are equal": lambda x: leading(x).shape[0] > 1 and bool((leading(x)[-1] == leading(x)[0]).all()),
    "two tokens are equal": lambda x: leading(x).shape[1] > 1 and bool((leading(x)[:, 1] == leading(x)[:, 0]).all()),
    "old is exactly 0 somewhere": lambda x: bool((x.old_student_logprobs == 0).any()),
    "old is exactly 0 everywhere": lambda x: bool((x.old_student_logprobs == 0).all()),
    "old is infinite": lambda x: bool(x.old_student_logprobs.isinf().any()),
    "old equals base": lambda x: bool((x.old_student_logprobs.double() == x.base_logprobs.double()).all()),
    "a teacher log-prob is below -20": lambda x: bool((x.teacher_logprobs < -20).any()),
    "the teacher's mass is above 1": lambda x: bool((x.teacher_logprobs.double().logsumexp(-1) > 0.01).any()),
    "the mask is empty": lambda x: not bool(counted(x).any()),
    "one token counts": lambda x: int(counted(x).sum()) == 1,
    "the mask sums to less than 1": lambda x: 0 < float(x.response_mask.double().sum()) < 1,
    "zeros among fractions": lambda x: bool(fraction(x).any()) and not bool(counted(x).all()),
    "fractions without zeros": lambda x: bool(fraction(x).any()) and bool(counted(x).all()),
    "a mask above 1": lambda x: bool((x.response_mask.double() > 1).any()),
    "the first token is masked": lambda x: not bool(counted(x)[:, :1].all()),
    "the last token is masked": lambda x: not bool(counted(x)[:, -1:].all()),
    "a row is masked": lambda x: not bool(counted(x).any(-1).all()),
    "the mask is bool": lambda x: x.response_mask.dtype == torch.bool,
    "the mask is uint8": lambda x: x.response_mask.dtype == torch.uint8,
    "the mask is int64": lambda x: x.response_mask.dtype == torch.int64,
    "ids are int32": lambda x: x.response_ids.dtype == torch.int32,
    "bfloat16": lambda x: leading(x).dtype == torch.bfloat16,
    "float16": lambda x: leading(x).dtype == torch.float16,
    "old wider than logits": lambda x: x.old_student_logprobs.element_size() > leading(x).element_size(),
    "logits are not contiguous": lambda x: not leading(x).is_contiguous(),
    "old is not contiguous": lambda x: not x.old_student_logprobs.is_contiguous(),
    "support is not contiguous": lambda x: not x.teacher_indices.is_contiguous(),
    "no gradient is asked for": lambda x: not leading(x).requires_grad,
    "grad mode is off": lambda x: not torch.is_grad_enabled(),
    "logits above 1000": lambda x: bool((leading(x).double().abs() > 1000).any()),
    **equal("B", lambda x: x.response_ids.shape[0], 4, 5, 7, 8),
    **equal("T", lambda x: x.response_ids.shape[1], 6, 8),
    **equal("K", lambda x: x.teacher_indices.shape[-1], 8, 20, 32, 100),
    **equal("V", vocabulary, 1, 2, 64, 100, 1000),
    **past("V", vocabulary, 100_000, 131_072),
    "K == V - 1": lambda x: x.teacher_indices.shape[-1] == vocabulary(x) - 1,
    **equal("alpha", lambda x: x.training.alpha, 0.25, 0.75, 1 / 3),
    **between("alpha", lambda x: x.training.alpha, (0.01, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)),
    **between("alpha", lambda x: x.training.alpha, (0.9, 0.99)),
    "alpha is an int": lambda x: isinstance(x.training.alpha, int),
    **between("is_clip", lambda x: x.training.is_clip, (0, 0.01), (0, 0.2), (1, 1.2), (1.5, 2.7), (2.7, 5), (5, 20)),
    "is_clip is an int": lambda x: isinstance(x.training.is_clip, int),
    "is_clip is infinite": lambda x: math.isinf(x.training.is_clip),
    **between("kl_reg_weight", lambda x: x.training.kl_reg_weight, (0, 1e-4), (0.01, 0.1), (0.1, 1)),
    "kl_reg_weight > 5": lambda x: x.training.kl_reg_weight > 5,
    "kl_reg_weight is an int": lambda x: isinstance(x.training.kl_reg_weight, int),
    "a base log-prob is -inf": lambda x: bool((x.base_logprobs == -math.inf).any()),
    "a base log-prob is below -50": lambda x: bool((x.base_logprobs < -50).any()),
    "old is -0.0": lambda x: negative_zero(x.old_student_logprobs),
    "base is -0.0": lambda x: negative_zero(x.base_logprobs),
    "the mask is float64": lambda x: x.response_mask.dtype == torch.float64,
    "the mask is bfloat16 and the logits are not": lambda x: (
        x.response_mask.dtype == torch.bfloat16 != leading(x).dtype
    ),
    "the mask is float16 and the logits are not": lambda x: x.response_mask.dtype == torch.float16 != leading(x).dtype,
    **equal("the mask's dtype", lambda x: x.response_mask.dtype, torch.int8, torch.int16, torch.int32),
    "only the responses are int32": lambda x: x.response_ids.dtype == torch.int32 != x.teacher_indices.dtype,
    "only the support is int32": lambda x: x.teacher_indices.dtype == torch.int32 != x.response_ids.dtype,
    "old is float64": lambda x: x.old_student_logprobs.dtype == torch.float64,
    "base is float64": lambda x: x.base_logprobs.dtype == torch.float64,
    "the teacher's log-probs are float64": lambda x: x.teacher_logprobs.dtype == torch.float64,
    "old asks for a gradient": lambda x: x.old_student_logprobs.requires_grad,
    "logits are no leaf": lambda x: not leading(x).is_leaf,
    "logits are a view": lambda x: leading(x)._base is not None,
    "inference mode is on": lambda x: torch.is_inference_mode_enabled(),
}

FUSED: Mapping[str, Callable[[Any], bool]] = {
    **equal("H", lambda x: x.student_hidden.shape[-1], 1, 2, 3, 8, 64, 128),
    **past("H", lambda x: x.student_hidden.shape[-1], 256, 1024, 2048, 4096),
    "H == V": lambda x: x.student_hidden.shape[-1] == vocabulary(x),
    "H > V": lambda x: x.student_hidden.shape[-1] > vocabulary(x),
    "two rows of the head are equal": lambda x: bool((x.lm_head_weight[1:] == x.lm_head_weight[:-1]).all(-1).any()),
    "a row of the head is 0": lambda x: bool((x.lm_head_weight == 0).all(-1).any()),
    "a hidden state is 0": lambda x: bool((x.student_hidden == 0).all(-1).any()),
    "the head is not contiguous": lambda x: not x.lm_head_weight.is_contiguous(),
    "the head is a parameter": lambda x: isinstance(x.lm_head_weight, torch.nn.Parameter),
    "the head asks for a gradient": lambda x: x.lm_head_weight.requires_grad,
    "the head alone asks for a gradient": lambda x: x.lm_head_weight.requires_grad > x.student_hidden.requires_grad,
    **{f"of the loss: {name}": p for name, p in LOSS.items() if name not in ("logits above 1000", "the mask is empty")},
}
"""A hidden state's own, and those of a loss."""

# --- a gradient that arrives at the loss ---

INCOMING: Mapping[str, Callable[[Tensor], bool]] = {
    "the incoming gradient is 0": lambda g: float(g) == 0,
    "the incoming gradient is negative": lambda g: float(g) < 0,
    "the incoming gradient is far above 1": lambda g: float(g) > 100,
    "the incoming gradient is tiny": lambda g: 0 < abs(float(g)) < 0.01,
    "the incoming gradient is next to 1": lambda g: 0 < abs(float(g) - 1) < 0.1,
    "the incoming gradient is between 0 and 1": lambda g: 0 < float(g) < 1,
    "the incoming gradient is 1": lambda g: float(g) == 1,
    "the incoming gradient is a third": lambda g: abs(float(g) - 1 / 3) < 0.01,
    "the incoming gradient is a tenth": lambda g: abs(float(g) - 0.1) < 0.01,
    "the incoming gradient is above 10000": lambda g: float(g) > 1e4,
    "the incoming gradient is 2": lambda g: float(g) == 2,
    **between("the incoming gradient", float, (0.5, 0.9), (4, 100), (-1e6, -100)),
}

# --- hidden states and a head ---

HEADS: Mapping[str, Callable[[tuple[Tensor, Tensor, Any]], bool]] = {
    **past("T", lambda x: x[0].shape[1], 1, 16, 64, 128, 256, 512, 1024),
    **past("B", lambda x: x[0].shape[0], 1, 2, 8, 32),
    **past("V", lambda x: x[1].shape[0], 64, 256, 1024, 4096, 8192, 32768, 65536),
    **past("H", lambda x: x[1].shape[1], 16, 64, 256, 1024, 4096),
    "H == 1": lambda x: x[1].shape[1] == 1,
    "V < 3": lambda x: x[1].shape[0] < 3,
    "a row of the head is 0": lambda x: bool((x[1] == 0).all(-1).any()),
    "a hidden state is 0": lambda x: bool((x[0] == 0).all(-1).any()),
    "two rows of the head are equal": lambda x: bool((x[1][1:] == x[1][:-1]).all(-1).any()),
    "all rows of the head are equal": lambda x: bool((x[1][1:] == x[1][:-1]).all()),
    "logits above 200": lambda x: bool(((x[0].double() @ x[1].double().T) > 200).any()),
    "logits below -200": lambda x: bool(((x[0].double() @ x[1].double().T) < -200).any()),
    "a token is certain": lambda x: bool(((x[0].double() @ x[1].double().T).log_softmax(-1) == 0).any()),
    "hidden states ask for a gradient": lambda x: x[0].requires_grad,
    "hidden states ask for none": lambda x: not x[0].requires_grad,
    "hidden states are not contiguous": lambda x: not x[0].is_contiguous(),
    "bfloat16": lambda x: x[0].dtype == torch.bfloat16,
    "float16": lambda x: x[0].dtype == torch.float16,
    **equal("T", lambda x: x[0].shape[1], 1, 2, 3, 4, 6, 8),
    **equal("B", lambda x: x[0].shape[0], 4, 5, 6, 7, 8),
    **equal("V", lambda x: x[1].shape[0], 1, 2, 3, 4, 8, 64, 100),
    **past("V", lambda x: x[1].shape[0], 100_000, 131_072),
    **equal("H", lambda x: x[1].shape[1], 2, 3, 128),
    "H == V": lambda x: x[1].shape[0] == x[1].shape[1],
    "H > V": lambda x: x[1].shape[0] < x[1].shape[1],
    "the head is not contiguous": lambda x: not x[1].is_contiguous(),
    "the head is a parameter": lambda x: isinstance(x[1], torch.nn.Parameter),
    "hidden states are no leaf": lambda x: not x[0].is_leaf,
    "the head alone asks for a gradient": lambda x: x[1].requires_grad > x[0].requires_grad,
    "inference mode is on": lambda x: torch.is_inference_mode_enabled(),
    "two rows are equal": lambda x: x[0].shape[0] > 1 and bool((x[0][-1] == x[0][0]).all()),
    "two tokens are equal": lambda x: x[0].shape[1] > 1 and bool((x[0][:, 1] == x[0][:, 0]).all()),
}

IDS: Mapping[str, Callable[[tuple[Tensor, Tensor, Tensor]], bool]] = {
    "ids are int32": lambda x: x[2].dtype == torch.int32,
    "an id is 0": lambda x: bool((x[2] == 0).any()),
    "the first id is 0": lambda x: bool((x[2][:, :1] == 0).any()),
    "the last id is 0": lambda x: bool((x[2][:, -1:] == 0).any()),
    "the first id is V - 1": lambda x: bool((x[2][:, :1] == x[1].shape[0] - 1).any()),
    "the last id is V - 1": lambda x: bool((x[2][:, -1:] == x[1].shape[0] - 1).any()),
    "all ids are equal": lambda x: x[2].numel() > 1 and bool((x[2] == x[2][0, 0]).all()),
    "two neighbouring ids are equal": lambda x: bool((x[2][:, 1:] == x[2][:, :-1]).any()),
    "ids are not contiguous": lambda x: not x[2].is_contiguous(),
}
"""What log-probs are asked of, beside the above."""


def best(x: tuple[Tensor, Tensor, int]) -> Tensor:
    """The likeliest token of each position."""
    return (x[0].double() @ x[1].double().T).argmax(-1)


def tie_at_the_edge(x: tuple[Tensor, Tensor, int]) -> bool:
    """The last token of the support is as likely as the next."""
    ordered = (x[0].double() @ x[1].double().T).sort(-1, descending=True).values
    k = min(max(1, x[2]), ordered.shape[-1])
    return k < ordered.shape[-1] and bool((ordered[..., k - 1] == ordered[..., k]).any())


K: Mapping[str, Callable[[tuple[Tensor, Tensor, int]], bool]] = {
    **equal("k", lambda x: x[2], 0, 1, 2, 3, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256),
    **past("k", lambda x: x[2], 64, 128, 256, 512, 1024, 100_000),
    "k < 0": lambda x: x[2] < 0,
    "k == V": lambda x: x[2] == x[1].shape[0],
    "k == V - 1": lambda x: x[2] == x[1].shape[0] - 1,
    "k == V + 1": lambda x: x[2] == x[1].shape[0] + 1,
    "k > 2 V": lambda x: x[2] > 2 * x[1].shape[0],
    "k == T": lambda x: x[2] == x[0].shape[1],
    "a tie at the edge of the support": tie_at_the_edge,
    "the likeliest is token 0": lambda x: bool((best(x) == 0).any()),
    "the likeliest is token V - 1": lambda x: bool((best(x) == x[1].shape[0] - 1).any()),
}
"""What a top-k is asked for, beside the above."""

# --- a trainer's sample and call ---


@dataclass(frozen=True)
class Call:
    """One call of ``distill``; ``before``: how often this very model was trained, ``since``: how often another one
    since then."""

    model: Any
    samples: tuple[Any, ...]
    training: Any
    before: int
    since: int


@dataclass(frozen=True)
class InBatch:
    """A sample with its call and its place."""

    sample: Any
    call: Call
    index: int

    @property
    def prompt(self) -> list[int]:
        return list(self.sample.prompt_token_ids)

    @property
    def teacher(self) -> list[int]:
        return list(self.sample.teacher_prompt_token_ids)

    @property
    def response(self) -> list[int]:
        return list(self.sample.response_token_ids)

    @property
    def recorded(self) -> list[float]:
        return list(self.sample.response_logprobs or ())

    def token(self, name: str) -> int:
        """The last one, where there are several."""
        found = getattr(self.call.model.config, f"{name}_token_id", None)
        return -1 if found is None else int(found[-1] if isinstance(found, list) else found)

    def differs_from_an_earlier_one_in(self, *fields: str) -> bool:
        """In these fields and in no other."""
        return any(
            {name for name, value in vars(self.sample).items() if vars(one)[name] != value} == set(fields)
            for one in self.earlier
        )

    @property
    def earlier(self) -> tuple[Any, ...]:
        return self.call.samples[: self.index]


def holds_token(name: str) -> dict[str, Callable[[InBatch], bool]]:
    """Where a special token may stand."""
    return {
        f"the prompt begins with {name}": lambda x: x.prompt[0] == x.token(name),
        f"the prompt ends with {name}": lambda x: x.prompt[-1] == x.token(name),
        f"{name} inside the prompt": lambda x: x.token(name) in x.prompt[1:-1],
        f"{name} in the teacher's prompt": lambda x: x.token(name) in x.teacher,
        f"the response begins with {name}": lambda x: x.response[0] == x.token(name),
        f"the response ends with {name}": lambda x: x.response[-1] == x.token(name),
        f"{name} inside the response": lambda x: x.token(name) in x.response[1:-1],
    }


SAMPLES: Mapping[str, Callable[[InBatch], bool]] = {
    **past("prompt", lambda x: len(x.prompt), 4, 8, 16, 32, 64, 128, 256),
    **past("teacher prompt", lambda x: len(x.teacher), 9, 16, 64, 128, 256),
    **past("response", lambda x: len(x.response), 1, 16, 32, 64, 80, 128, 200, 256),
    **past("prompt + response", lambda x: len(x.prompt) + len(x.response), 32, 128, 256, 512),
    **equal("prompt", lambda x: len(x.prompt), 1, 2, 3, 4, 5),
    **equal("response", lambda x: len(x.response), 1, 2, 3, 4, 5, 8, 128),
    "prompt and response alike in length": lambda x: len(x.prompt) == len(x.response),
    "both prompts alike in length": lambda x: len(x.prompt) == len(x.teacher),
    "the teacher's prompt is the shorter": lambda x: len(x.teacher) < len(x.prompt),
    "shares its prompt": lambda x: any(list(o.prompt_token_ids) == x.prompt for o in x.earlier),
    "shares its teacher prompt": lambda x: any(list(o.teacher_prompt_token_ids) == x.teacher for o in x.earlier),
    "shares its response": lambda x: any(list(o.response_token_ids) == x.response for o in x.earlier),
    "is a duplicate": lambda x: any(o == x.sample for o in x.earlier),
    "is another but for the feedback": lambda x: x.differs_from_an_earlier_one_in("teacher_prompt_token_ids"),
    "is another but for the log-probs": lambda x: x.differs_from_an_earlier_one_in("response_logprobs"),
    "has another's response and both ends of its prompt": lambda x: any(
        x.prompt != list(o.prompt_token_ids)
        and len(x.prompt) == len(o.prompt_token_ids) > 4
        and x.prompt[:2] == list(o.prompt_token_ids[:2])
        and x.prompt[-2:] == list(o.prompt_token_ids[-2:])
        and x.response == list(o.response_token_ids)
        for o in x.earlier
    ),
    "as many response tokens as V": lambda x: len(x.response) == x.call.model.config.vocab_size,
    "bos twice at the start of the prompt": lambda x: x.prompt[:2] == [x.token("bos")] * 2,
    "bos twice at the start of the teacher's": lambda x: x.teacher[:2] == [x.token("bos")] * 2,
    "as long as the one before": lambda x: bool(x.earlier) and len(x.earlier[-1].response_token_ids) == len(x.response),
    **holds_token("eos"),
    **holds_token("pad"),
    **holds_token("bos"),
    "token 0 in the response": lambda x: 0 in x.response,
    "token 0 in the prompt": lambda x: 0 in x.prompt,
    "V - 1 in the response": lambda x: x.call.model.config.vocab_size - 1 in x.response,
    "V - 1 in the prompt": lambda x: x.call.model.config.vocab_size - 1 in x.prompt,
    "two neighbouring tokens are equal": lambda x: any(
        a == b for a, b in zip(x.response, x.response[1:], strict=False)
    ),
    "a log-prob of exactly 0": lambda x: 0.0 in x.recorded,
    "the last log-prob is 0": lambda x: x.recorded[-1:] == [0.0],
    "every log-prob is 0": lambda x: bool(x.recorded) and not any(x.recorded),
    "a log-prob of -inf": lambda x: -math.inf in x.recorded,
    "both prompts are the same": lambda x: x.prompt == x.teacher,
    "none recorded for the first of the batch": lambda x: x.call.samples[0].response_logprobs is None,
    "a log-prob above -0.01": lambda x: any(r > -0.01 for r in x.recorded),
    "a log-prob below -15": lambda x: any(r <= -15 for r in x.recorded),
    **{f"sample {n} of the batch": (lambda x, n=n: x.index == n) for n in (1, 2, 3, 4, 5, 7, 11, 16)},  # type: ignore[misc]
}


def lengths(sample: Any) -> tuple[int, int, int]:
    """Of prompt, teacher prompt and response."""
    return len(sample.prompt_token_ids), len(sample.teacher_prompt_token_ids), len(sample.response_token_ids)


def names(call: Call) -> str:
    return " ".join(name for name, p in call.model.named_parameters() if p.requires_grad)


def config(call: Call, key: str) -> Any:
    return getattr(call.model.config, key, None)


CALLS: Mapping[str, Callable[[Call], bool]] = {
    **equal("samples", lambda c: len(c.samples), 1, 2, 3, 4, 5, 6, 7, 9),
    **past("samples", lambda c: len(c.samples), 3, 8, 10, 12, 16),
    **equal("steps_per_batch", lambda c: c.training.steps_per_batch, 1, 2, 3, 4, 5, 6),
    **past("steps_per_batch", lambda c: c.training.steps_per_batch, 4, 6, 8, 10, 20),
    **equal("learning_rate", lambda c: c.training.learning_rate, 3e-5, 0.1),
    "learning_rate < 1e-4": lambda c: c.training.learning_rate < 1e-4,
    "learning_rate > 0.01": lambda c: c.training.learning_rate > 0.01,
    **equal("alpha", lambda c: c.training.alpha, 0.0, 0.5, 1.0),
    "alpha > 0.95": lambda c: 0.95 < c.training.alpha < 1,
    "alpha < 0.05": lambda c: 0 < c.training.alpha < 0.05,
    "alpha > 0.8": lambda c: 0.8 < c.training.alpha < 1,
    "alpha < 0.4": lambda c: 0 < c.training.alpha < 0.4,
    "is_clip == 5": lambda c: c.training.is_clip == 5,
    "is_clip < 1e-4": lambda c: c.training.is_clip < 1e-4,
    "is_clip < 1": lambda c: c.training.is_clip < 1,
    "is_clip > 10": lambda c: c.training.is_clip > 10,
    "is_clip > 100000": lambda c: c.training.is_clip > 1e5,
    "kl_reg_weight == 0": lambda c: c.training.kl_reg_weight == 0,
    "kl_reg_weight < 0.01": lambda c: 0 < c.training.kl_reg_weight < 0.01,
    "kl_reg_weight >= 1": lambda c: c.training.kl_reg_weight >= 1,
    "max_grad_norm == 1": lambda c: c.training.max_grad_norm == 1,
    "max_grad_norm < 0.05": lambda c: c.training.max_grad_norm < 0.05,
    "max_grad_norm > 5": lambda c: c.training.max_grad_norm > 5,
    **equal("teacher_top_k", lambda c: c.training.teacher_top_k, 0, 1, 100),
    "teacher_top_k == V": lambda c: c.training.teacher_top_k == config(c, "vocab_size"),
    "teacher_top_k > V": lambda c: c.training.teacher_top_k > config(c, "vocab_size"),
    "teacher_top_k < 10": lambda c: c.training.teacher_top_k < 10,
    "everything at its default": lambda c: c.training == DEFAULTS,
    "eos is set": lambda c: config(c, "eos_token_id") is not None,
    "pad equals eos": lambda c: (
        config(c, "pad_token_id") is not None and config(c, "pad_token_id") == config(c, "eos_token_id")
    ),
    "pad is 0": lambda c: config(c, "pad_token_id") == 0,
    "pad is set in generation_config": lambda c: c.model.generation_config.pad_token_id is not None,
    "the head is tied": lambda c: bool(config(c, "tie_word_embeddings")),
    "logits are capped": lambda c: config(c, "final_logit_softcapping") is not None,
    "logits are scaled": lambda c: config(c, "logit_scale") is not None,
    "the head has a bias": lambda c: getattr(c.model.get_output_embeddings(), "bias", None) is not None,
    "modules_to_save": lambda c: "modules_to_save" in names(c),
    "DoRA": lambda c: "magnitude" in names(c),
    "LoRA on the head": lambda c: "lm_head.lora_A" in names(c),
    **equal("model_type", lambda c: config(c, "model_type"), "llama", "qwen3", "gpt2", "gemma2", "cohere", "phi"),
    "one layer": lambda c: config(c, "num_hidden_layers") == 1,
    "the base is bfloat16": lambda c: next(c.model.parameters()).dtype == torch.bfloat16,
    "LoRA on the embedding": lambda c: "lora_embedding_A" in names(c),
    "trainable token rows": lambda c: "trainable_tokens" in names(c),
    "another adapter beside": lambda c: len(c.model.peft_config) > 1,
    "gradient checkpointing is on": lambda c: any(
        getattr(module, "gradient_checkpointing", False) for module in c.model.modules()
    ),
    "several tokens end a response": lambda c: isinstance(config(c, "eos_token_id"), list),
    "B is next to 0": lambda c: all(
        bool((p.abs() < 1e-15).all()) for name, p in c.model.named_parameters() if "lora_B" in name
    ),
    "a third call on one model": lambda c: c.before == 2,
    "nothing recorded": lambda c: all(s.response_logprobs is None for s in c.samples),
    "each response is shorter than the one before": lambda c: (
        len(c.samples) > 2
        and all(len(a.response_token_ids) > len(b.response_token_ids) for a, b in pairwise(c.samples))
    ),
    "a second call on one model": lambda c: c.before == 1,
    "a later call on one model": lambda c: c.before > 0,
    "one token of the teacher at alpha = 1": lambda c: c.training.alpha == 1 and c.training.teacher_top_k == 1,
    "another model between": lambda c: c.before > 0 and c.since > 0,
    "log-probs of None mixed with others": lambda c: len({s.response_logprobs is None for s in c.samples}) > 1,
    "responses alike in length": lambda c: (
        len(c.samples) > 1 and len({len(s.response_token_ids) for s in c.samples}) == 1
    ),
    "everything alike in length": lambda c: len(c.samples) > 1 and len({lengths(s) for s in c.samples}) == 1,
}
