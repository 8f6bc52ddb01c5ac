"""What balance costs and gives: one small DeepSeek-V3 trained with nothing, with the balance loss, and with the router bias.

    python benchmarks/balance.py FOLDER [--steps 800] [--threads 2] [--picture benchmarks/balance.png]

The geometry, text and schedule of examples/pretrain_tiny.py, the same seed and tokens for all three. FOLDER keeps what each run
found: an interrupted run goes on, a finished one is not trained again. MaxVio is (largest load - mean) / mean, averaged over the
MoE layers: of the training steps between two logs, and at the end of every fourth window of the held-out text ("global" MaxVio of
Wang et al. 2024).
"""

import argparse
import json
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_deepseek import DeepseekV3Config
from modeling_deepseek.load_balance import RouterBiasCallback, max_violation, routers_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain_tiny

# Fields of the config, and the speed of the bias: 0 counts and changes nothing.
KINDS = {
    "nothing": ({}, 0.0),
    "balance loss, 0.001": (dict(aux_loss_alpha=1e-3, seq_aux=True), 0.0),
    "router bias, 0.001": ({}, pretrain_tiny.BIAS_STEP),
}
EVAL_STEPS, EVAL_ROWS = 100, 32


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, rows: list[dict]) -> float:
    """Mean next-token loss, in nats per token."""
    was_training = model.training
    model.eval()
    total = tokens = 0
    for row in rows:
        count = (row["labels"][1:] != -100).sum().item()
        if count:
            total += count * model(row["input_ids"][None], labels=row["labels"][None], use_cache=False).loss.item()
            tokens += count
    model.train(was_training)
    return total / tokens


@torch.inference_mode()
def held_out_load(model: torch.nn.Module, rows: list[dict]) -> dict[str, list[int]]:
    """How often each expert of each main layer is chosen on all `rows`."""
    counts, hooks = {}, []
    layers = [(n, r) for n, r in routers_of(model).items() if int(n.split(".")[2]) < model.config.num_hidden_layers]
    for name, router in layers:
        counts[name] = torch.zeros(router.num_experts, dtype=torch.long)

        def count(router, _inputs, output, name=name):
            counts[name] += torch.bincount(output[2].flatten(), minlength=router.num_experts)

        hooks.append(router.register_forward_hook(count))
    for row in rows:
        model(row["input_ids"][None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: each.tolist() for name, each in counts.items()}


class Evaluate(TrainerCallback):
    """Notes the held-out loss every `EVAL_STEPS` steps in Trainer's history, which its checkpoints keep."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % EVAL_STEPS == 0:
            state.log_history.append({"held_out": held_out_loss(model, self.rows), "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        self.history = state.log_history


def run(kind: str, folder: Path, steps: int, texts: tuple[dict[str, str], dict[str, str]]) -> dict:
    """Trains one kind, and returns its history, its load and its loss on the whole held-out text."""
    fields, speed = KINDS[kind]
    tokenizer = pretrain_tiny.train_tokenizer(list(texts[0].values()), pretrain_tiny.MODEL["vocab_size"])
    train, held_out = (
        pretrain_tiny.pack(pretrain_tiny.encode(tokenizer, list(files.values())), pretrain_tiny.CONTEXT)
        for files in texts
    )
    held_out = held_out[::4]
    config = DeepseekV3Config(bos_token_id=0, eos_token_id=1, **pretrain_tiny.MODEL, **fields)
    evaluate = Evaluate(held_out[:: len(held_out) // EVAL_ROWS])
    callbacks = [RouterBiasCallback(speed), evaluate]
    model = pretrain_tiny.train(config, train, folder, steps, "cpu", callbacks)
    return dict(history=evaluate.history, load=held_out_load(model, held_out), loss=held_out_loss(model, held_out))


def draw(found: dict[str, dict], path: Path) -> None:
    """MaxVio and held-out loss over the steps, and the load of every expert on the held-out text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    curves, maps = above.subplots(1, 2), below.subplots(1, len(found), sharey=True)
    for (kind, result), heat in zip(found.items(), maps, strict=True):
        for axes, field in zip(curves, ("maxvio", "held_out"), strict=True):
            points = [(entry["step"], entry[field]) for entry in result["history"] if field in entry]
            axes.plot(*zip(*points, strict=True), label=kind)
        load = torch.tensor(list(result["load"].values())).float()
        image = heat.imshow(load / load.mean(-1, keepdim=True), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        heat.set(title=kind, xlabel="expert")
    maps[0].set_ylabel("MoE layer")
    below.colorbar(image, ax=maps, label="load / mean, held-out text")
    curves[0].set(xlabel="step", ylabel="MaxVio in training", ylim=(0, None))
    losses = [entry["held_out"] for result in found.values() for entry in result["history"] if "held_out" in entry]
    curves[1].set(xlabel="step", ylabel="held-out loss, nats per token", ylim=(min(losses) - 0.1, min(losses) + 1.5))
    for axes in curves:
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where to draw it, as .png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)

    texts, found = pretrain_tiny.read_library(Path(sysconfig.get_paths()["stdlib"])), {}
    for index, kind in enumerate(KINDS):
        result = args.folder / f"{index}.json"
        if not result.exists():
            text = json.dumps(run(kind, args.folder / str(index), args.steps, texts))
            result.with_suffix(".tmp").write_text(text)
            result.with_suffix(".tmp").replace(result)
        found[kind] = json.loads(result.read_text())

    print(
        "| | MaxVio, last 50 steps | MaxVio global, held out | load entropy, last 50 steps | held-out loss | against nothing |"
    )
    print("|---|---|---|---|---|---|")
    plain = found["nothing"]["loss"]
    for kind, each in found.items():
        last = [entry for entry in each["history"] if "maxvio" in entry][-1]
        total = sum(max_violation(torch.tensor(counts)) for counts in each["load"].values()) / len(each["load"])
        values = f"{last['maxvio']:.2f} | {total:.2f} | {last['load_entropy']:.4f} | {each['loss']:.4f}"
        print(f"| {kind} | {values} | {each['loss'] / plain - 1:+.2%} |")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
