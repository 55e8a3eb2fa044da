"""Ways to get the step loop wrong: what the teacher and the student read before the response, and what a config's
number means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import wrong_forwards as forwards
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import (
    Prepared,
    ReadWhere,
    Run,
    TrainerParts,
    logprobs,
    topk,
    trainer,
)
from sdpo_conformance.specs.claas.defects.wrong_samples import TOP_K, most_likely, numbered, supported
from sdpo_conformance.specs.claas.defects.wrong_trainer import ONE_SAMPLE, loop

Ids = Callable[[Prepared], Tensor]
Teacher = Callable[[Run, Prepared], tuple[Tensor, Tensor]]

TEACHER_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 32, 64, 100, 128, 256, 512, 1000, 1024)
WHOLE_LENGTHS = (8, 10, 12, 14, 15, 16, 18, 20, 24, 30, 32, 48, 64, 100, 128, 256, 512, 1024)
CHUNKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, 128, 256, 512)
WHOLE_PROMPT = "Score the whole of teacher_prompt_token_ids + response_token_ids."
READ_WHOLE = "Read the response after the whole prompt."
AS_SET = "Ask whether the setting is None, not whether it is true: 0 is a value."


def student_prompt(one: Prepared) -> Tensor:
    """(1, P)."""
    return one.ids[:, : -one.response.shape[1]]


def teacher_prompt(one: Prepared) -> Tensor:
    """(1, P)."""
    return one.teacher_ids[:, : -one.response.shape[1]]


def teacher_behind(prompt: Ids) -> Teacher:
    """The teacher reads another prompt; where none is left, its own."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        read = prompt(one)
        row = torch.cat([read if read.shape[1] else teacher_prompt(one), one.response], dim=1)
        with run.model.disable_adapter():
            return topk(run, row, one.response, run.training.teacher_top_k)

    return teacher


def restarting(teacher: bool, size: float) -> TrainerParts:
    """Positions start again with every chunk of a row, or of the teacher's rows alone."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        positions = (torch.arange(ids.shape[1], device=ids.device) % int(size))[None]
        seen = torch.ones_like(ids)  # without it positions that start again stand for packed samples
        out = run.model(input_ids=ids, position_ids=positions, attention_mask=seen, use_cache=False)
        return forwards.read(out.logits, response)

    def concerns(run: Run, ids: Tensor, response: Tensor) -> bool:
        return ids.shape[1] > int(size) and (not teacher or forwards.is_teachers(run, ids))

    return TrainerParts(forward=ReadWhere(forward, concerns))


def fitting(length: float, end: bool) -> Ids:
    """The teacher's prompt cut, at its start or its ``end``, so that with the response it has a length; one token is
    always left."""

    def prompt(one: Prepared) -> Tensor:
        room = max(1, int(length) - one.response.shape[1])
        return teacher_prompt(one)[:, :room] if end else teacher_prompt(one)[:, -room:]

    return prompt


def at_student_offset(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's logits are sliced where the response begins behind the student's prompt."""
    start = student_prompt(one).shape[1] - 1
    with torch.no_grad(), run.model.disable_adapter():
        logits = run.model(input_ids=one.teacher_ids, use_cache=False).logits[:, start : start + one.response.shape[1]]
    scores = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return most_likely(scores, run.training.teacher_top_k)


def capped_at_first_step(run: Run) -> None:
    """There is no cap after the first step: the ratio is taken for 1 and left out."""
    given = run.kept.setdefault("training", run.training)
    run.training = given if run.step == 1 else dataclasses.replace(given, is_clip=math.inf)


def with_bos(always: bool) -> forwards.ReadWhere:
    """The model's bos token before a prompt that does not begin with it; or before every prompt."""

    def bos_of(run: Run) -> int | None:
        found: int | None = run.model.config.bos_token_id
        return found

    def concerned(run: Run, ids: Tensor, response: Tensor) -> bool:
        bos = bos_of(run)
        return bos is not None and (always or int(ids[0, 0]) != bos)

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        return forwards.with_token_before(bos_of(run) or 0)(run, ids, response)

    return forwards.ReadWhere(forward, concerned)


def bos_before() -> list[Defect]:
    """The model's bos token put before prompts."""
    found = []
    for always in (False, True):
        for whose in ("", "student", "teacher"):
            forward = with_bos(always)
            if whose:
                forward = (forwards.of_student_prompt if whose == "student" else forwards.of_teacher_prompt)(forward)
            name = f"bos-before{f'-{whose}' if whose else ''}-prompts{'' if always else '-without-it'}"
            prompts = f"prompt of the {whose}" if whose else "prompt"
            where = "" if always else " that does not begin with it"
            found.append(
                loop(
                    name,
                    f"The model's bos token is put before every {prompts}{where}.",
                    ("STEP-5",) if whose == "teacher" else ("STEP-1", "STEP-2"),
                    "The prompts are read as they are given.",
                    trainer(forward=forward),
                    (),
                    "Models without a bos token." if always else "Prompts that begin with the bos token.",
                )
            )
    return found


def masked_by_student_length(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher attends to as many tokens as the student's row has."""
    seen = (torch.arange(one.teacher_ids.shape[1], device=one.ids.device) < one.ids.shape[1]).long()[None]
    mask = forwards.attention(seen) if forwards.is_double(run) else seen
    with torch.no_grad(), run.model.disable_adapter():
        logits = run.model(input_ids=one.teacher_ids, attention_mask=mask, use_cache=False).logits
    scores = forwards.read(logits if logits.dtype == torch.float64 else logits.float(), one.response)
    return most_likely(scores.log_softmax(-1), run.training.teacher_top_k)


def with_settings(change: Callable[[Any], dict[str, Any]]) -> Callable[[Run], None]:
    """The loss gets other settings than the config's."""

    def before_step(run: Run) -> None:
        given = run.kept.setdefault("training", run.training)
        run.training = dataclasses.replace(given, **change(given))

    return before_step


def behind_prompt_of(run: Run, one: Prepared, order: int | None) -> Tensor:
    """A row (1, P + T): the response behind the prompt of a sample so many places on, or of the first."""
    place = next(index for index, other in enumerate(run.batch) if other is one)
    other = run.batch[0 if order is None else (place + order) % len(run.batch)]
    return torch.cat([student_prompt(other), one.response], dim=1)


def refresh_behind(order: int | None) -> Callable[[Run], None]:
    """The refresh reads each response behind another sample's prompt."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            one.behaviour = logprobs(run, behind_prompt_of(run, one, order), one.response)

    return refresh


def base_behind(order: int | None) -> Callable[[Run, Prepared], Tensor]:
    """The base reads each response behind another sample's prompt."""

    def base(run: Run, one: Prepared) -> Tensor:
        with run.model.disable_adapter():
            return logprobs(run, behind_prompt_of(run, one, order), one.response)

    return base


def of_other_prompts() -> list[Defect]:
    """What is read behind the prompt of another sample."""
    found = []
    for name, order in (("first", None), ("next", 1), ("previous", -1)):
        found.append(
            loop(
                f"refresh-behind-{name}-prompt",
                f"The refresh reads each response behind the {name} sample's prompt.",
                ("STEP-2", "STEP-4"),
                "Read each response behind its own prompt.",
                trainer(refresh=refresh_behind(order)),
                (),
                ONE_SAMPLE,
            )
        )
        found.append(
            loop(
                f"base-behind-{name}-prompt",
                f"The base reads each response behind the {name} sample's prompt.",
                ("STEP-5",),
                "Read each response behind its own prompt.",
                trainer(base=base_behind(order)),
                (),
                ONE_SAMPLE,
            )
        )
    return found


DEFECTS = (
    *of_other_prompts(),
    *bos_before(),
    loop(
        "teacher-attention-mask-of-student",
        "The teacher's attention mask has the student's length: what lies beyond it is not attended to.",
        ("STEP-5",),
        "Make the mask from the teacher's own rows.",
        trainer(teacher=masked_by_student_length),
        (),
        "Teacher prompts no longer than the prompts.",
    ),
    loop(
        "ratio-capped-at-first-step-alone",
        "From step 2 on the ratio is taken for 1 and left out, the cap with it.",
        ("STEP-2",),
        "The ratio is capped at is_clip at every step: a cap below 1 holds on-policy too.",
        trainer(before_step=capped_at_first_step),
        (),
        "is_clip above 1.",
    ),
    numbered(
        "teacher-prompt-truncated",
        "The teacher's prompt is cut to its last 7 tokens; the student's is whole.",
        ("STEP-5",),
        WHOLE_PROMPT,
        "tokens",
        lambda count: TrainerParts(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, -int(count) :])),
        whole_numbers(TEACHER_LENGTHS),
        7,
        whole=True,
    ),
    numbered(
        "teacher-prompt-truncated-at-its-end",
        "The teacher's prompt is cut to its first 7 tokens; the student's is whole.",
        ("STEP-5",),
        WHOLE_PROMPT,
        "tokens",
        lambda count: TrainerParts(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, : int(count)])),
        whole_numbers(TEACHER_LENGTHS),
        7,
        whole=True,
    ),
    numbered(
        "teacher-sequence-truncated",
        "The teacher's prompt loses its start where prompt and response have more than 19 tokens.",
        ("STEP-5",),
        WHOLE_PROMPT,
        "tokens",
        lambda length: TrainerParts(teacher=teacher_behind(fitting(length, end=False))),
        whole_numbers(WHOLE_LENGTHS),
        19,
        whole=True,
    ),
    numbered(
        "teacher-sequence-truncated-at-prompt-end",
        "The teacher's prompt loses its end where prompt and response have more than 19 tokens.",
        ("STEP-5",),
        WHOLE_PROMPT,
        "tokens",
        lambda length: TrainerParts(teacher=teacher_behind(fitting(length, end=True))),
        whole_numbers(WHOLE_LENGTHS),
        19,
        whole=True,
    ),
    loop(
        "teacher-prompt-cut-to-student-length",
        "The teacher's prompt is cut to its last tokens, as many as the student's prompt has.",
        ("STEP-5",),
        WHOLE_PROMPT,
        trainer(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, -student_prompt(one).shape[1] :])),
    ),
    loop(
        "teacher-prompt-cut-to-student-length-at-its-end",
        "The teacher's prompt is cut to its first tokens, as many as the student's prompt has.",
        ("STEP-5",),
        WHOLE_PROMPT,
        trainer(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, : student_prompt(one).shape[1]])),
    ),
    loop(
        "teacher-prompt-without-first-token",
        "The teacher's prompt loses its first token; the student's does not.",
        ("STEP-5",),
        WHOLE_PROMPT,
        trainer(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, 1:])),
    ),
    loop(
        "teacher-prompt-without-last-token",
        "The teacher's prompt loses its last token; the student's does not.",
        ("STEP-5",),
        WHOLE_PROMPT,
        trainer(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, :-1])),
    ),
    loop(
        "teacher-without-prompt",
        "The teacher reads the response after the last token of its prompt alone.",
        ("STEP-5",),
        WHOLE_PROMPT,
        trainer(teacher=teacher_behind(lambda one: teacher_prompt(one)[:, -1:])),
    ),
    loop(
        "student-prompt-behind-teacher-prompt",
        "The teacher reads its own prompt and then the student's.",
        ("STEP-5",),
        "Score teacher_prompt_token_ids + response_token_ids.",
        trainer(teacher=teacher_behind(lambda one: torch.cat([teacher_prompt(one), student_prompt(one)], dim=1))),
    ),
    loop(
        "teacher-at-student-offset",
        "The teacher's logits are sliced where the response begins behind the student's prompt.",
        ("STEP-5",),
        "Slice the teacher's logits by the length of the teacher's prompt.",
        trainer(teacher=at_student_offset),
        ("areal-project/AReaL#1729",),
    ),
    numbered(
        "token-before-teacher-prompt",
        "The teacher's prompt gets a token more at its start: token 0; the student's does not.",
        ("STEP-5",),
        "The prompts are read as they are given.",
        "token",
        lambda token: TrainerParts(
            teacher=teacher_behind(lambda one: torch.nn.functional.pad(teacher_prompt(one), (1, 0), value=int(token)))
        ),
        whole_numbers(range(6)),
        0,
        whole=True,
    ),
    numbered(
        "token-before-student-prompt",
        "The student's prompt gets a token more at its start, for every policy that reads it: token 0; the teacher's "
        "does not.",
        ("STEP-1", "STEP-2"),
        "The prompts are read as they are given.",
        "token",
        lambda token: TrainerParts(forward=forwards.of_student_prompt(forwards.with_token_before(int(token)))),
        whole_numbers(range(6)),
        0,
        whole=True,
    ),
    numbered(
        "student-prompt-truncated",
        "The student's prompts are cut to their last 4 tokens, for every policy that reads them; the teacher's are "
        "whole.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        "tokens",
        lambda count: TrainerParts(forward=forwards.of_student_prompt(forwards.last_tokens(count))),
        whole_numbers((1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256, 512)),
        4,
        whole=True,
    ),
    numbered(
        "student-prompt-truncated-at-its-end",
        "The student's prompts are cut to their first 4 tokens, for every policy that reads them; the teacher's are "
        "whole.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        "tokens",
        lambda count: TrainerParts(forward=forwards.of_student_prompt(forwards.first_tokens(count))),
        whole_numbers((1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256, 512)),
        4,
        whole=True,
    ),
    numbered(
        "prompts-truncated-at-their-end",
        "Prompts are cut to their first 4 tokens, the student's and the teacher's.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        "tokens",
        lambda count: TrainerParts(forward=forwards.first_tokens(count)),
        whole_numbers((1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256, 512)),
        4,
        whole=True,
    ),
    loop(
        "student-prompt-without-first-token",
        "The student's prompts lose their first token; the teacher's do not.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        trainer(forward=forwards.of_student_prompt(forwards.without_first_token)),
    ),
    loop(
        "student-prompt-without-last-token",
        "The student's prompts lose their last token; the teacher's do not.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        trainer(forward=forwards.of_student_prompt(forwards.without_last_token)),
    ),
    loop(
        "prompt-without-last-token",
        "The prompts lose their last token.",
        ("STEP-1", "STEP-2"),
        READ_WHOLE,
        trainer(forward=forwards.without_last_token),
    ),
    loop(
        "alpha-zero-as-unset",
        "alpha = 0 is taken for unset, and is 0.5.",
        ("STEP-1", "STEP-2"),
        AS_SET,
        trainer(before_step=with_settings(lambda given: {"alpha": given.alpha or 0.5})),
        (),
        "alpha above 0.",
    ),
    loop(
        "teacher-top-k-zero-as-unset",
        "teacher_top_k = 0 is taken for unset, and is 100.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=supported(lambda k: k or 100)),
        (),
        "teacher_top_k above 0.",
    ),
    loop(
        "teacher-top-k-zero-as-all",
        "teacher_top_k = 0 is taken for the whole vocabulary.",
        ("STEP-5",),
        TOP_K,
        trainer(teacher=supported(lambda k: k if k > 0 else 10**9)),
        (),
        "teacher_top_k above 0.",
    ),
    *(
        numbered(
            f"{'teacher-' * teacher}positions-restart",
            f"position_ids{' of the teacher' * teacher} start again at 0 every 16 tokens, with each chunk of a row "
            "that is read in chunks.",
            ("STEP-5",) if teacher else ("STEP-1", "STEP-2"),
            "Count positions over the whole row: a chunk starts at the number of tokens before it.",
            "tokens",
            partial(restarting, teacher),
            whole_numbers(CHUNKS),
            16,
            whole=True,
        )
        for teacher in (False, True)
    ),
)
