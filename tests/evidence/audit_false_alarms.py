"""False alarms of the audit, counted: every PEFT kind that installs, under three loggers, trained for a few steps.

python -m tests.evidence.audit_false_alarms [SEEDS [KIND ...]]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings import Severity

TARGETS = ["q_proj", "v_proj"]


def kinds() -> dict[str, Callable[[], Any]]:
    """A config of every kind, by name."""
    import peft

    made: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
        "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
        "lora_bias": lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=TARGETS),
        "rank_pattern": lambda: peft.LoraConfig(
            r=4, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 2}, target_modules=TARGETS
        ),
        "saved_head": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
        "embedding": lambda: peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
        "all_linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
        "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS),
        "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=100, target_modules=TARGETS),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
        "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
        "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS),
        "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=4, topk=2, target_modules=TARGETS),
        "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "shira": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
        "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
        "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=TARGETS),
        "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
        "delora": lambda: peft.DeloraConfig(r=4, target_modules=TARGETS),
        "waveft": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=TARGETS),
        "gralora": lambda: peft.GraloraConfig(r=4, target_modules=TARGETS),
        "road": lambda: peft.RoadConfig(group_size=16, target_modules=TARGETS),
        "poly": lambda: peft.PolyConfig(r=4, target_modules=TARGETS, n_tasks=1, n_skills=1),
        "osf": lambda: peft.OSFConfig(target_modules=TARGETS),
        "tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(2, 64))),
        "lora_tokens": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=list(range(2, 64))),
        "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", target_modules=TARGETS),
        "bias_all": lambda: peft.LoraConfig(r=4, bias="all", target_modules=TARGETS),
        "loha_rank_pattern": lambda: peft.LoHaConfig(r=4, rank_pattern={"v_proj": 8}, target_modules=TARGETS),
        "target_parameters": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
        "exclude": lambda: peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["k_proj"]),
        "layers": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=[0]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    return made


def train(
    folder: Path, config: Any, seed: int, *, layout: str = "before-after", steps: int = 6
) -> list[dict[str, float]]:
    """Train a tiny model by plain AdamW, save before and after (or checkpoints), and return the log."""
    import peft

    from ..audit.training import tiny_model

    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny_model(seed), config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = []
    if layout == "before-after":
        model.save_pretrained(folder / "before")
    for step in range(1, steps + 1):
        ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(100 * seed + step))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        rows.append({"step": step, "loss": loss.item(), "grad_norm": norm.item(), "learning_rate": 1e-3})
        if layout == "checkpoints" and step % 2 == 0:
            model.save_pretrained(folder / f"checkpoint-{step}")
    if layout == "before-after":
        model.save_pretrained(folder / "after")
    return rows


def write_log(folder: Path, rows: list[dict[str, float]], logger: str) -> None:
    """The log as transformers, verl's file logger or a wandb export leaves it."""
    text: dict[str, Callable[[Mapping[str, float]], dict[str, Any]]] = {
        "verl": lambda r: {"step": r["step"], "data": {"actor/pg_loss": r["loss"], "actor/grad_norm": r["grad_norm"]}},
        "wandb": lambda r: {"_step": r["step"], "train/loss": r["loss"], "train/grad_norm": r["grad_norm"],
                            "train/global_step": r["step"]},
    }  # fmt: skip
    if logger == "transformers":
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows, "logging_steps": 1}))
    else:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(text[logger](row)) + "\n" for row in rows))


def runs(seeds: int, only: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str], str]]:
    """(name, the ids of errors and warnings, why there was no verdict) of each sound run."""
    for kind, make in kinds().items():
        if only and kind not in only:
            continue
        for seed in range(seeds):
            layout = "checkpoints" if seed % 2 else "before-after"
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                try:
                    rows = train(folder, make(), seed, layout=layout)
                except Exception as error:  # a kind that this PEFT or this model does not take is no run
                    yield f"{kind}/{seed}", [], f"not trained: {type(error).__name__}: {str(error)[:80]}"
                    continue
                for logger in ("transformers", "verl", "wandb"):
                    for old in (folder / "trainer_state.json", folder / "metrics.jsonl"):
                        old.unlink(missing_ok=True)
                    write_log(folder, rows, logger)
                    try:
                        report = audit_run(folder)
                    except Exception as error:
                        yield f"{kind}/{seed}/{logger}", ["refused"], f"{type(error).__name__}: {str(error)[:150]}"
                        continue
                    told = [
                        f"{f.severity} {f.id}: {f.statement}" for f in report.findings if f.severity != Severity.NOTE
                    ]
                    yield f"{kind}/{seed}/{logger}", told, ""


if __name__ == "__main__":
    total = accused = 0
    for name, told, reason in runs(int(sys.argv[1]) if len(sys.argv) > 1 else 3, tuple(sys.argv[2:])):
        if reason.startswith("not trained"):
            print(name, reason)
            continue
        total += 1
        accused += bool(told)
        if told:
            print(name, told, reason)
    print(f"{total} sound runs, {accused} accused", flush=True)
