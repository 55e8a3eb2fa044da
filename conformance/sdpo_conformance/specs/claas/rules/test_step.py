"""STEP: the step loop, judged step by step at the trainer's own weights.

Every requirement looks at the same runs: a scenario is run once per process, and what it did wrong is sorted
under the requirement that names it (``trainer.findings``).
"""

from __future__ import annotations

from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.rules.trainer_checks import judge_refusals, judge_runs, needs_steps
from sdpo_conformance.specs.requirement import UPSTREAM_TRAINER, Level, requirement

DISTILL = (Capability.DISTILL,)
SOURCE = f"{UPSTREAM_TRAINER} DistillationTrainer.distill"


@requirement(
    "STEP-1",
    Level.MUST,
    "the first step's gradient is that of the loss on the logits that predict the response, the ratio taken "
    "against the log-probs that the sampler recorded, or the starting policy's own where it recorded none",
    source=f"{SOURCE}: behavior_logprobs = sample.response_logprobs",
    why="a sampler such as vLLM does not reproduce the trainer's log-probs: the ratio is what corrects that",
    capabilities=DISTILL,
)
def test_step_1(subject: Subject) -> None:
    judge_runs(subject, "STEP-1")


@requirement(
    "STEP-2",
    Level.MUST,
    "from the second step on, the behaviour log-probs are those of the weights before that step",
    source=f"{SOURCE}: the refresh at the end of every step but the last",
    why="each step is on-policy again: measured against an older policy the ratio drifts away from 1",
    capabilities=DISTILL,
)
def test_step_2(subject: Subject) -> None:
    needs_steps(subject, 2)
    judge_runs(subject, "STEP-2")


@requirement(
    "STEP-3",
    Level.MUST,
    "the behaviour log-probs change when the weights have moved: they are not kept from an earlier step",
    source=f"{SOURCE}: _compute_student_response_logprobs between steps",
    why="without the refresh steps 2 and later are silently off-policy, the incident this suite began with",
    capabilities=DISTILL,
)
def test_step_3(subject: Subject) -> None:
    needs_steps(subject, 2)
    judge_runs(subject, "STEP-3")


@requirement(
    "STEP-4",
    Level.MUST,
    "each sample's ratio is taken against its own behaviour log-probs",
    source=f"{SOURCE}: sample_state['behavior_logprobs']",
    why="a cache with the wrong key gives every sample but one a meaningless ratio",
    capabilities=DISTILL,
)
def test_step_4(subject: Subject) -> None:
    judge_runs(subject, "STEP-4")


@requirement(
    "STEP-5",
    Level.MUST,
    "teacher and base are the model with its adapter disabled: they do not move; the teacher reads its own "
    "prompt and gives its min(max(1, teacher_top_k), V) most likely tokens",
    source=f"{SOURCE} and _build_self_teacher_topk: disable_adapter()",
    why="a teacher or an anchor that follows the student no longer holds it anywhere",
    capabilities=DISTILL,
)
def test_step_5(subject: Subject) -> None:
    judge_runs(subject, "STEP-5")


@requirement(
    "STEP-6",
    Level.MUST,
    "per_step_metrics has one entry per step, counted from 1: the means over samples at the weights before "
    "the update, grad_norm before clipping",
    source=f"{SOURCE}: step_metrics",
    why="identical metrics under moving weights look like convergence",
    capabilities=DISTILL,
)
def test_step_6(subject: Subject) -> None:
    judge_runs(subject, "STEP-6")


@requirement(
    "STEP-7",
    Level.MUST,
    "the loss of a step is the mean over samples of their token means",
    source=f"{SOURCE}: torch.stack(batch_loss_tensors).mean()",
    why="one mean over all tokens lets long responses outvote short ones; a sum scales with the batch",
    capabilities=DISTILL,
)
def test_step_7(subject: Subject) -> None:
    judge_runs(subject, "STEP-7")


@requirement(
    "STEP-8",
    Level.MUST,
    "each step's gradient is its own: the norm over all parameters clipped to max_grad_norm, nothing left "
    "over from the step before",
    source=f"{SOURCE}: clip_grad_norm_, optimizer.zero_grad",
    why="left-over gradients are momentum nobody asked for; other clipping bends the direction",
    capabilities=DISTILL,
)
def test_step_8(subject: Subject) -> None:
    judge_runs(subject, "STEP-8")


@requirement(
    "STEP-9",
    Level.MUST,
    "the samples and the base's weights are untouched, and the adapter is left enabled, active and unmerged",
    source=f"{SOURCE}: only parameters that require grad are optimised; disable_adapter() as a context",
    why="whoever samples from the model next would sample from another one",
    capabilities=DISTILL,
)
def test_step_9(subject: Subject) -> None:
    judge_runs(subject, "STEP-9")


@requirement(
    "STEP-10",
    Level.MUST,
    "the model ends with the adapter that steps_per_batch AdamW updates (betas 0.9 and 0.999, weight decay "
    "0.01, the configured learning rate, moments kept) lead to, every adapter parameter among them",
    source=f"{SOURCE}: optimizer_cls(lora_params, lr, betas, weight_decay)",
    why="metrics say nothing about what was saved",
    capabilities=DISTILL,
)
def test_step_10(subject: Subject) -> None:
    judge_runs(subject, "STEP-10")


@requirement(
    "STEP-11",
    Level.MUST,
    "a batch without samples, log-probs of another length than the response, and more steps than claimed are "
    "refused with an error, nothing changed; log-probs of None are refused so, or stood in for",
    source=f"{SOURCE}: raises ValueError",
    why="a batch that is half applied cannot be taken back",
    capabilities=DISTILL,
)
def test_step_11(subject: Subject) -> None:
    judge_refusals(subject, Level.MUST)


@requirement(
    "STEP-12",
    Level.SHOULD,
    "an empty prompt or response, a token outside the vocabulary, a NaN log-prob and fewer than one step are "
    "refused with a ValueError, nothing changed; so is what STEP-11 asks to refuse",
    source="this project: upstream trains on some of these and fails late on others",
    why="a NaN log-prob makes the whole adapter NaN at the first step",
    capabilities=DISTILL,
)
def test_step_12(subject: Subject) -> None:
    judge_refusals(subject, Level.SHOULD)
