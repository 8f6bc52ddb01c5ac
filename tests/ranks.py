"""Runs of Trainer that are the same with one process and with many; as a script, what `torch.distributed.run` starts on each rank.

python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py FOLDER RUN...
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from modeling_deepseek.load_balance import routers_of
from modeling_deepseek.lora import lora_targets
from modeling_deepseek.training import EMACallback, RouterBiasCallback
from tiny import tiny_model

STEPS, STEP = 4, 8  # optimiser steps, and the sequences of each
BALANCE = dict(aux_loss_alpha=0.3, device_aux_loss_alpha=0.2, comm_aux_loss_alpha=0.1)


def rows(count: int = 48) -> list[list[int]]:
    """Token ids of texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([text + [2] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


class Seen(TrainerCallback):
    """Losses, and the router biases after every step (before and after an evaluation)."""

    def __init__(self):
        self.losses, self.biases = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        biases = [router.e_score_correction_bias for router in routers_of(model).values()]
        if biases and biases[0] is not None:
            self.biases.append(torch.stack(biases).clone())

    on_evaluate = on_step_end


class Killed(TrainerCallback):
    """Ends the process in the third step, as the machine would."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def adapted(model):
    return get_peft_model(model, LoraConfig(r=4, **lora_targets("all")))


V3 = dict(family="v3", num_nextn_predict_layers=1)
KINDS = {
    "v3": dict(fields=V3, accumulation=4, bias=True),
    "v2": dict(fields=dict(family="v2", **BALANCE)),
    "lora": dict(fields=V3 | BALANCE, wrap=adapted, bias=True),
}
RUNS = [*KINDS, "fsdp v3", "fsdp v2"]


def run(
    name: str, folder: Path, ranks: int, *callbacks: TrainerCallback, resume: Path | None = None, **options
) -> dict:
    """What came of the run `name` on one of `ranks` processes; every one of them has the same steps of `STEP` sequences."""
    settings = KINDS[name.removeprefix("fsdp ")]
    model = tiny_model(settings["fields"]["family"], **{k: v for k, v in settings["fields"].items() if k != "family"})
    model = settings.get("wrap", lambda model: model)(model)
    accumulation, callbacks = settings.get("accumulation", 1), [*callbacks, Seen()]
    if name == "fsdp v3":
        accumulation = 2
    if settings.get("bias"):
        callbacks.insert(0, RouterBiasCallback(0.01))
    if name == "v3":
        callbacks.insert(1, EMACallback(0.9))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=STEP // ranks // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps" if "v3" in name else "no",
        save_steps=2,
        eval_strategy="steps" if "v3" in name else "no",
        eval_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=padded,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    weights = {name: whole(weight).detach() for name, weight in trainer.model.named_parameters()}
    return dict(losses=callbacks[-1].losses, biases=callbacks[-1].biases, weights=weights)


def whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def allow_fsdp_on_cpu() -> None:
    """accelerate has FSDP for accelerators only; nothing in what it does with it needs one."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(folder: Path, names: list[str]) -> None:
    logging.set_verbosity_error()
    if names == ["killed"]:
        run("v3", folder, 1, Killed())
    allow_fsdp_on_cpu()
    found = {}
    for name in names:
        options = dict(fsdp=True, fsdp_config={"version": 2}) if name.startswith("fsdp") else {}
        found[name] = run(name, folder / name, 2, **options)
        if name == "fsdp v3":
            found["fsdp v3 resumed"] = run(name, folder / name, 2, resume=folder / name / "checkpoint-2", **options)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
