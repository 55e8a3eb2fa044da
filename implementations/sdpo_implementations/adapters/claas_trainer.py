"""CLaaS's step loop, ``claas.training.distillation.DistillationTrainer.distill``, on a PEFT model in memory.

The trainer reads its adapter from a LoRA store (a Modal volume) and renders the teacher's prompt with a
tokenizer. Neither belongs to the step loop, so plain objects stand in for both: the store hands over the
model that the caller brought and keeps nothing, the tokenizer hands over the recorded teacher prompt.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sdpo_implementations.adapters.availability import NotInstalled, require

CONFIGURED = (
    "learning_rate",
    "alpha",
    "is_clip",
    "max_grad_norm",
    "kl_reg_weight",
    "teacher_top_k",
    "steps_per_batch",
)
INSTALL = "pip install git+https://github.com/kfallah/CLaaS@e2331f7"


class RecordedPrompts:
    """Stands in for the tokenizer: a sample's user prompt is its index, and renders to its recorded teacher
    prompt (1, P) on the CPU."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> torch.Tensor:
        index = int(messages[-1]["content"])
        return torch.tensor([list(self.samples[index].teacher_prompt_token_ids)], dtype=torch.int64)

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, token_ids))


def in_memory_store() -> ModuleType:
    """Stands in for ``claas.training.storage``: nothing is loaded, nothing kept, temporary folders go."""
    store = ModuleType("claas.training.storage")
    store.__dict__.update(
        load_lora=lambda lora_id: "",
        has_optimizer_state=lambda path: False,
        load_optimizer_state=lambda path: {},
        save_optimizer_state=lambda path, state: None,
        save_lora=lambda path, lora_id: lora_id,
        save_lora_inplace=lambda path, lora_id: lora_id,
        cleanup_local_lora=lambda path: shutil.rmtree(path, ignore_errors=True) if path else None,
    )
    return store


@cache
def distillation() -> ModuleType:
    """A private copy of ``claas.training.distillation`` bound to the in-memory store.

    Private, so that the module a user imports keeps its real store; raises ``NotInstalled``.
    """
    name = "claas.training.distillation"
    require("claas.training", "__path__", INSTALL)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise NotInstalled(f"not installed: {name} (this CLaaS has no shared trainer): {INSTALL}")
    module = importlib.util.module_from_spec(spec)
    storage = "claas.training.storage"
    real = sys.modules.get(storage)
    sys.modules[storage] = in_memory_store()
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NotInstalled(f"not installed: {name} ({error}): {INSTALL}") from error
    finally:
        if real is None:
            del sys.modules[storage]
        else:
            sys.modules[storage] = real
    return module


def distill(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> dict[str, Any]:
    """Upstream's loop on ``model`` (a ``PeftModel``), which carries the updated adapter afterwards.

    Raises ValueError for what upstream refuses: no samples, a sample without recorded log-probs (its request
    type wants them) or with a different number of them than response tokens.
    """
    config_type = require("claas.core.types", "TrainingConfig", INSTALL)
    item_type = require("claas.core.types", "DistillBatchItem", INSTALL)
    if not hasattr(config_type, "steps_per_batch"):
        raise NotInstalled(f"not installed: claas (this version takes one step per batch): {INSTALL}")
    config = config_type(**{key: getattr(training, key) for key in CONFIGURED})
    batch = [
        item_type(
            prompt="",
            response="",
            feedback="",
            response_logprobs=sample.response_logprobs,
            prompt_token_ids=list(sample.prompt_token_ids),
            response_token_ids=list(sample.response_token_ids),
            user_prompt=str(index),
            system_prompt="",
        )
        for index, sample in enumerate(samples)
    ]
    trainer = distillation().DistillationTrainer(base_model_id="", attn_implementation="")
    trainer.device = next(model.parameters()).device
    trainer.tokenizer = RecordedPrompts(samples)
    trainer.base_model = model.get_base_model()
    trainer.optimizer_cls = optimizer_cls
    trainer.functional = torch.nn.functional
    trainer._load_or_create_lora = lambda path: model
    trainer._load_optimizer_state = lambda path, optimizer: None
    payload = SimpleNamespace(lora_id="in-memory", training=config, samples=batch, save_in_place=False)
    return {"per_step_metrics": trainer.distill(payload).metadata["per_step_metrics"]}
