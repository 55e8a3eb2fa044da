"""Which name of which tool means what.

The algorithm's own names are CLaaS's (claas/training/distillation.py at e2331f7, per_step_metrics). Other tools'
names are read as far as they mean the same; the rules that hold for CLaaS's values to the letter are not held
against them. `sampler_ratio` is exp(trainer - sampler) of the sampled tokens, averaged: unlike `mean_is_ratio` it
is not 1 after a refresh, since every batch is sampled anew. `sampler_gap` is the mean |log-prob difference|.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FIELDS = (
    "total_loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "grad_norm", "learning_rate",
)  # fmt: skip
#: Fields that move whenever the weights do: the ratio sits at 1 and the clip fraction at 0 in a sound run.
CONTINUOUS_FIELDS = ("total_loss", "distill_loss", "kl_reg", "grad_norm")

_OWN = frozenset(FIELDS) - {"learning_rate", "grad_norm"}
_EVALUATION = re.compile(
    r"^(eval|val|valid|validation|test|dev|critic|ref|reference|reward|val-core|val-aux)([/_.-]|$)"
)
#: Full names, lower case, of the tools that are known, and what they mean here.
_MEANINGS: Mapping[str, str] = {
    "loss": "total_loss", "train_loss": "total_loss", "reduced_train_loss": "total_loss", "lr": "learning_rate",
    "gradient_norm": "grad_norm", "global_grad_norm": "grad_norm", "response_tokens": "tokens",
    # loops of one's own: clip_grad_norm_ returns the norm before, so what is measured after it says so
    "grad_norm_clipped": "clipped_norm", "clipped_grad_norm": "clipped_norm", "grad_norm_after_clip": "clipped_norm",
    "grad_norm_after_clipping": "clipped_norm", "grad_norm_post_clip": "clipped_norm",
    "post_clip_grad_norm": "clipped_norm",
    # TRL: trainer/grpo_trainer.py and the SDPO trainers of its experimental part
    "sampling/importance_sampling_ratio/mean": "sampler_ratio",
    "sampling/sampling_logp_difference/mean": "sampler_gap",
    "sdpo/distillation_loss": "distill_loss", "sdft/distillation_loss": "distill_loss",
    "self_distillation/distillation_loss": "distill_loss", "distillation_loss": "distill_loss",
    "kl": "kl_reg", "objective/kl": "kl_reg", "loss/policy_avg": "total_loss",
    "completions/clipped_ratio": "completions_cut", "response_length/clip_ratio": "completions_cut",
    # verl: trainer/ppo/metric_utils.py, workers/actor, rollout correction
    "actor/pg_loss": "total_loss", "actor/loss": "total_loss", "actor/kl_loss": "kl_reg",
    "actor/grad_norm": "grad_norm", "actor/lr": "learning_rate",
    "rollout_corr/rollout_is_mean": "sampler_ratio", "mismatch/rollout_is_mean": "sampler_ratio",
    "actor/rollout_is_mean": "sampler_ratio", "training/rollout_probs_diff_mean": "sampler_gap_probability",
    "rollout_corr/k3_kl": "sampler_kl", "mismatch/mismatch_k3_kl": "sampler_kl", "mismatch/k3_kl": "sampler_kl",
    "rollout_corr/kl": "sampler_kl", "mismatch/mismatch_kl": "sampler_kl",
    # NeMo-RL: algorithms/loss_functions.py, grpo.py
    "sampling_importance_ratio": "sampler_ratio", "kl_penalty": "kl_reg",
    "probs_ratio": "policy_ratio", "probs_ratio_clamped": "policy_ratio",
    # tinker-cookbook: rl/train.py, supervised/train.py
    "optim/lr": "learning_rate", "train_mean_nll": "total_loss", "kl_policy_base": "kl_reg",
    "optim/kl_sample_train_v2": "sampler_kl", "optim/kl_sample_train_v1": "sampler_kl",
    # prime-rl, SkyRL, slime and miles, OpenRLHF, AReaL, levanter
    "loss/mean": "total_loss", "optim/grad_norm": "grad_norm", "importance_ratio/mean": "sampler_ratio",
    "mismatch_kl/mean": "sampler_kl", "policy/policy_loss": "total_loss", "policy_loss": "total_loss",
    "policy/final_loss": "total_loss", "policy/grad_norm": "grad_norm", "policy/raw_grad_norm": "grad_norm",
    "policy/policy_lr": "learning_rate", "pg_loss": "total_loss", "kl_loss": "kl_reg",
    "train_rollout_logprob_abs_diff": "sampler_gap", "actor_lr": "learning_rate", "actor_grad_norm": "grad_norm",
    "ppo_actor/update/grad_norm": "grad_norm", "ppo_actor/update/lr": "learning_rate",
    "ppo_actor/update/loss/avg": "total_loss", "ppo_actor/update/importance_weight/avg": "policy_ratio",
    "rollout_train_logprobs_abs_diff_mean": "sampler_gap", "policy_kl": "kl_reg", "tis": "sampler_ratio",
    "ois": "policy_ratio", "lr-pg_0": "learning_rate", "mismatch_kl/all/mean": "sampler_kl", "vllm_kl": "sampler_kl",
    "ppo_actor/update/behave_imp_weight/avg": "sampler_ratio", "policy_lr": "learning_rate",
    "raw_grad_norm": "grad_norm", "grad/norm/total": "grad_norm", "optim/learning_rate": "learning_rate",
}  # fmt: skip
#: Prefixes that say where a value was logged, not what it is.
_PLACES = ("train/", "training/", "train_", "trainer/", "actor/", "policy/", "metrics/")
_BOOKKEEPING = re.compile(
    r"^(_step|_runtime|_timestamp|_wandb|step|step_idx|global_step|epoch|iteration|iter|index|wall.?time|time|timestamp|"
    r"sample(_id|_idx|_index)?|samples|per_sample|per_sample_metrics|current_steps|total_steps|max_steps|percentage|"
    r"elapsed_time|remaining_time|num_tokens|total_flos|total_tokens|throughput|memory.*|train_speed.*|model_info|"
    r"completions?|completion_length|completion|prompts?|rewards?|reward_std|frac_reward_zero_std|clip_ratio|entropy|"
    r"mean_token_accuracy|accuracy|lora_id|metadata|tokens_trained|steps_per_batch|steps_per_batch_applied|"
    r"_?notes?|cfg|config|tags?|token_acc|ppl|perplexity|mem|tps|num_label_tokens|num_sequences|num_loss_tokens|loss:sum|"
    r"tokens_per_second.*|model_parameter_info|last_model_checkpoint|best_model_checkpoint|best_metric|log_history|"
    r"progress|gen_kl_error|token_mult_prob_error|global_valid_\w+|mean_(prompt|gen|total|gen_tokens)\w*|tis_\w+|"
    r"pg_clipfrac\w*|ppo_kl|ppo_clip_ratio|entropy_loss|policy_entropy|clipfrac\w*|approx_kl\w*|num_\w+|advantages?|"
    r"train_(runtime|samples_per_second|steps_per_second|loss|tokens_per_second)|"
    r"(eval|val|valid|validation|test|env|critic|response_length|prompt_length|response|prompt|perf|timing_s|timing_per_"
    r"token_ms|timing|time|progress|global_seqlen|rewards?|completions?|profiling|system|num_turns|rollout|rollout_corr|"
    r"mismatch|sampling|self_distillation|sdpo|sdft|clip_ratio|tools?|logps|logits|actor|optim|optimizer|generation|"
    r"ppo_actor|grpo_actor|timeperf|generate|ray|entropy|is_masked|tokens|rewards?|memory|perf_stats|trainer|stop|"
    r"performance|data|objective|policy|loss|importance_ratio|mismatch_kl|kl|val-core|val-aux|debug)[/_-].*)$"
)
_SUMMARY = ("train_runtime", "train_samples_per_second")
_RATIO_NAMES = re.compile(
    r"importance_sampling_ratio|rollout_is_mean|sampling_importance_ratio|probs_ratio|importance_ratio|importance_weight|"
    r"ppo_kl|pg_clipfrac|clip_ratio|kl_sample_train|mismatch_kl|approx_kl|mean_is_ratio|\bis_ratio"
)
#: TRL's rewards/NAME/mean and reward, NAME_reward of loops of one's own, verl's critic/rewards/mean.
_REWARD = re.compile(
    r"(?:train/|critic/)?(?:rewards?(?:/(?P<component>(?!(?:mean|std|min|max)$)[^/]{1,80}))?|"
    r"(?P<bare>(?!eval|val|test)[^/]{1,80}_reward))(?:/mean)?"
)
_RANK = {name: index for index, name in enumerate(_MEANINGS)}


def field_of(key: object) -> str | None:
    """The field that a name means, None where it means none of them (an evaluation's loss is none)."""
    if not isinstance(key, str) or len(key) > 200:
        return None
    if key in FIELDS:
        return key
    name = key.lower()
    if _EVALUATION.match(name):
        return None
    if name in _MEANINGS:
        return _MEANINGS[name]
    for place in _PLACES:
        if name.startswith(place):
            inner = field_of(name[len(place) :])
            if inner is not None:
                return inner
    bare = name.rsplit("/", 1)[-1]
    return bare if bare in _OWN or bare in ("grad_norm", "learning_rate") else None


def reward_of(key: object) -> str | None:
    """Of a training reward's mean the component's name, "reward" for the sum of all; None for any other field."""
    match = _REWARD.fullmatch(key.lower()) if isinstance(key, str) else None
    return (match["component"] or match["bare"] or "reward") if match else None


def preference(key: str) -> int:
    """Of two names that mean the same field the lower one wins: the field's own name first."""
    return -1 if key.rsplit("/", 1)[-1] in FIELDS else _RANK.get(key.lower(), 0)


def is_bookkeeping(key: str) -> bool:
    """Whether a known tool writes the name, for something that the audit has no use for."""
    name = key.lower()
    bare = next((name[len(place) :] for place in _PLACES if name.startswith(place)), name)
    return bool(_BOOKKEEPING.match(name) or _BOOKKEEPING.match(bare)) or key == "global_step/max_steps"


def names_ratio(key: str) -> bool:
    """Whether any known tool uses the name for an importance ratio, or for what follows from one."""
    return bool(_RATIO_NAMES.search(key.lower()))


def is_evaluation_name(key: str) -> bool:
    """Whether the name is of an evaluation's number."""
    return bool(_EVALUATION.match(key.lower()))


def is_summary(row: Mapping[str, Any]) -> bool:
    """The row that transformers adds at the end, whose train_loss is the mean of the run."""
    return any(str(key).rsplit("/", 1)[-1] in _SUMMARY for key in row)


def tool_of(keys: frozenset[str]) -> str:
    """Whose names these are. "CLaaS" where the algorithm's own fields are there and nobody else's marks."""
    marks = (
        ("verl", ("actor/pg_loss", "training/global_step", "actor/grad_norm", "actor/ppo_kl")),
        ("ms-swift", ("global_step/max_steps",)),
        ("LLaMA-Factory", ("current_steps",)),
        ("NeMo-RL", ("train/probs_ratio", "train/token_mult_prob_error", "token_mult_prob_error", "probs_ratio")),
        ("tinker", ("progress/batch", "optim/kl_sample_train_v1", "progress/done_frac", "train_mean_nll")),
        ("TRL", ("sampling/importance_sampling_ratio/mean", "sdpo/distillation_loss", "clip_ratio/region_mean",
                 "frac_reward_zero_std", "completions/mean_length", "train/completions/mean_length",
                 "train/sampling/importance_sampling_ratio/mean", "self_distillation/distillation_loss")),
        ("prime-rl", ("mismatch_kl/mean", "loss/mean")),
        ("SkyRL", ("policy/policy_loss",)),
        ("slime", ("train/train_rollout_logprob_abs_diff", "train/pg_loss")),
        ("AReaL", ("ppo_actor/update/grad_norm",)),
    )  # fmt: skip
    for tool, names in marks:
        if any(name in keys for name in names):
            return tool
    bare = {key.rsplit("/", 1)[-1] for key in keys}
    if bare & {"distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "total_loss"}:
        return "CLaaS"
    return "transformers" if "epoch" in bare else "wandb" if "_step" in keys else "another tool"
