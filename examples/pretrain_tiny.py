"""Pretrain a small DeepSeek-V3 on the Python standard library's own source, which every Python has.

    python examples/pretrain_tiny.py --minutes 50 --threads 2 --output examples/tiny-v3

The model has every part of the large one: latent attention with a query latent, a dense layer and then expert layers with a
shared expert, sigmoid routing balanced by a bias, and a multi-token prediction layer. Whole modules are held out, and the
loss on them is reported in bits per byte beside what gzip and xz make of the same text.
An interrupted run continues when the same command is given again.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import shutil
import sysconfig
import time
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.training import RouterBiasCallback

CONTEXT = 512  # tokens
BATCH = 4  # rows of CONTEXT tokens per step
HELD_OUT = 0.04  # share of module names, 3 to 4 % of the bytes
LEARNING_RATE = 3e-3
SAVE_STEPS = 250
BIAS_STEP = 1e-3  # of the router bias (DeepSeek-V3 report, section 4.2)
# A word with the character before it; up to 3 digits; punctuation with the newline and indentation behind it; space.
PIECES = r"[^\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\n+ *(?= ))?|\n+ *(?= )|\s+(?!\S)|\s+"
MODEL = dict(
    vocab_size=1536,
    hidden_size=128,
    intermediate_size=320,
    moe_intermediate_size=40,
    num_hidden_layers=8,
    num_attention_heads=4,
    first_k_dense_replace=1,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,  # as wide as a key, which the fused attention of the CPU asks for
    num_nextn_predict_layers=1,
    max_position_embeddings=CONTEXT,
)
CARD = """
# {name}

A small DeepSeek-V3 that writes Python ({parameters:,} parameters): latent attention, expert layers with a shared expert, one
multi-token prediction layer. `examples/pretrain_tiny.py` of `modeling_deepseek` made it, to try that code on a real model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def read_json(path):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

## Evaluation

On {held_out_bytes:,} bytes of held-out modules of Python {python}'s standard library, which neither model nor tokenizer saw:

| | bits per byte |
|---|---|
| this model, as stored (bfloat16) | **{bits:.3f}** |
| `xz -9e` | {xz:.3f} |
| `gzip -9` | {gzip:.3f} |

The compressors start from nothing and see the files as one stream; the model sees windows of {context} tokens.

`generate(..., use_mtp=True)` drafts with the MTP layer. Continuing windows of the same modules, the model accepts {greedy:.0%} of
the drafts in greedy decoding, and {sampled:.0%} in sampling as its generation config has it, at one draft per round. The config
asks for two, which is faster: the same layer makes the second, which is accepted less often.

## Training

The other modules: {train_bytes:,} bytes, {train_tokens:,} tokens. {steps:,} steps of {step_tokens:,} tokens with AdamW.
A module is held out, with its tests, by a hash of its name: {modules}.

## Licence and limits

The weights are under the MIT licence; the text they were trained on is Python's, under the PSF licence. What the model writes
looks like Python and is seldom a working program. Its context is {context} tokens.
"""


def module_name(path: Path) -> str:
    """The module of a file (relative to the library); a test belongs to what it tests: `test/test_json/x.py` -> `json`."""
    parts = path.parts[1:] if path.parts[0] == "test" and len(path.parts) > 1 else path.parts
    return parts[0].removesuffix(".py").lstrip("_").removeprefix("test_")


def is_held_out(module: str) -> bool:
    """Decided by the name alone, so that the split is the same in every version of Python."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def read_library(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Path -> text of the library's modules, for training and held out; installed packages and odd encodings are left out."""
    train, held_out = {}, {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            (held_out if is_held_out(module_name(path)) else train)[path.as_posix()] = text
    if not train or not held_out:
        raise ValueError(
            f"{root} holds {len(train)} modules to train on and {len(held_out)} held out: both are needed, "
            "run with a Python that has its standard library as .py files."
        )
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<bos>` = 0 and `<eos>` = 1 that puts `<bos>` in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in a row, each as `<bos> text <eos>`: token ids `[N]`."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for row in rows for token in (*row.ids, tokenizer.eos_token_id)])


def pack(ids: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """Training rows of `length` tokens; the last one is filled up with tokens that carry no label."""
    padding = -len(ids) % length
    inputs = F.pad(ids, (0, padding)).view(-1, length)
    labels = F.pad(ids, (0, padding), value=-100).view(-1, length)
    return [{"input_ids": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, ids: torch.Tensor, num_bytes: int, window: int = CONTEXT) -> float:
    """Bits that the model needs for `ids` `[N]` (all but the first token), per byte of the `num_bytes` that they encode.

    Windows advance by half their length, so that every token is scored once and sees at least half a window before it.
    """
    nats, half = 0.0, window // 2
    for start in range(0, max(1, len(ids) - half), half):
        row = ids[None, start : start + window].to(model.device)
        first = half if start else 1
        logits = model(row, use_cache=False).logits[0, first - 1 : -1]
        nats += F.cross_entropy(logits.float(), row[0, first:], reduction="sum").item()
    return nats / math.log(2) / num_bytes


def acceptance_rate(model: torch.nn.Module, ids: torch.Tensor, rows: int = 64, width: int = 64, **options) -> float:
    """Share of its MTP drafts that the model accepts while it continues `rows` windows of `ids` `[N]`, `width` tokens each."""
    windows = ids[: len(ids) // width * width].view(-1, width)
    prompts = windows[torch.linspace(0, len(windows) - 1, rows).long()].to(model.device)
    drafts = dict(use_mtp=True, return_dict_in_generate=True, max_new_tokens=width, eos_token_id=None, pad_token_id=1)
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), **drafts, **options
    ).mtp_stats.acceptance_rate


def seconds_per_step(config: DeepseekV3Config, device: str, steps: int = 5) -> float:
    """Time of one training step, measured on a model that is thrown away."""
    model = DeepseekV3ForCausalLM(config).train().to(device)
    ids = torch.randint(config.vocab_size, (BATCH, CONTEXT), device=device)
    for step in range(-2, steps):  # the first two warm up
        if step == 0:
            start = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.lm_head.weight.grad.sum().item()  # waits for the device
    return (time.perf_counter() - start) / steps


def train(
    config: DeepseekV3Config, rows: list[dict], folder: Path, steps: int, device: str, callbacks: list[TrainerCallback]
) -> DeepseekV3ForCausalLM:
    """Trains for `steps` steps in all, from the last checkpoint in `folder` if there is one."""
    set_seed(0)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    model = DeepseekV3ForCausalLM.from_pretrained(last, dtype="float32") if last else DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("eager" if device == "cpu" else "auto")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=min(100, steps // 10),
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        logging_steps=50,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last)
    model.config.use_cache = True  # Trainer turns it off
    return model.eval()


def save(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, scratch: Path, folder: Path) -> None:
    """Writes weights in bfloat16 (the router biases stay in float32), code and tokenizer to `folder`."""
    model.save_pretrained(scratch)
    model = DeepseekV3ForCausalLM.from_pretrained(scratch, dtype="bfloat16")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, num_assistant_tokens=2, **special
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_card(folder: Path, train_files: dict[str, str], held_out: dict[str, str], **facts) -> None:
    """Writes `README.md` with the facts given and those that follow from the texts."""
    text = "".join(held_out.values()).encode()
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    facts |= dict(
        xz=8 * len(xz) / len(text),
        gzip=8 * len(gzip.compress(text, 9)) / len(text),
        held_out_bytes=len(text),
        train_bytes=sum(len(file.encode()) for file in train_files.values()),
        modules=", ".join(sorted({f"`{module_name(PurePosixPath(path))}`" for path in held_out})),
        python=platform.python_version(),
        context=CONTEXT,
        step_tokens=BATCH * CONTEXT,
    )
    data = ModelCardData(
        license="mit", library_name="transformers", pipeline_tag="text-generation", tags=["deepseek", "code"]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{CARD.format(**facts)}").save(folder / "README.md")


def replace_folder(partial: Path, output: Path) -> None:
    """Puts the finished folder under its name; the model that had it goes away last."""
    old = output.with_name(output.name + ".old")
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a small DeepSeek-V3 on Python's standard library.")
    parser.add_argument(
        "--minutes", type=float, default=50, help="training time, from which the number of steps follows"
    )
    parser.add_argument("--output", type=Path, default=Path("tiny-v3"), help="folder for the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    if not args.minutes > 0 or args.threads < 1:
        parser.error(f"--minutes {args.minutes:g} and --threads {args.threads} must be positive")
    if args.output.exists() and not (args.output / "config.json").is_file():
        parser.error(f"--output {args.output} exists and is not a model folder: choose another name")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output.resolve()
    scratch, partial = (output.with_name(output.name + suffix) for suffix in (".training", ".partial"))

    train_files, held_out = read_library(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(list(train_files.values()), MODEL["vocab_size"])
    ids, held_out_ids = (encode(tokenizer, list(files.values())) for files in (train_files, held_out))
    config = DeepseekV3Config(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **MODEL)

    last = get_last_checkpoint(scratch) if scratch.is_dir() else None
    if last:  # continue the schedule that was begun
        steps = json.loads(Path(last, "trainer_state.json").read_text())["max_steps"]
    else:
        steps = max(1, round(args.minutes * 60 / seconds_per_step(config, device)))
    print(
        f"{len(ids):,} tokens, {len(held_out_ids):,} held out; {steps:,} steps of {BATCH * CONTEXT:,} tokens on {device}"
    )
    model = train(config, pack(ids, CONTEXT), scratch, steps, device, [RouterBiasCallback(BIAS_STEP)])

    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, scratch / "final", partial)
    stored = DeepseekV3ForCausalLM.from_pretrained(partial, dtype="float32").to(device)
    bits = bits_per_byte(stored, held_out_ids, sum(len(file.encode()) for file in held_out.values()))
    set_seed(0)
    greedy, sampled = (acceptance_rate(stored, held_out_ids, do_sample=sample) for sample in (False, True))
    facts = dict(name=output.name, parameters=stored.num_parameters(), train_tokens=len(ids), steps=steps, bits=bits)
    facts |= dict(greedy=greedy, sampled=sampled)
    write_card(partial, train_files, held_out, **facts)
    replace_folder(partial, output)
    shutil.rmtree(scratch)
    print(f"{output}: {bits:.3f} bits per byte on held-out modules, {greedy:.0%} of the MTP drafts accepted (greedy)")


if __name__ == "__main__":
    main()
