"""The official inference demo's layout, one file per rank, and back: `to_demo` and `from_demo`."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_deepseek import DeepseekConfig
from modeling_deepseek.checkpoint import SHARED_MTP_WEIGHTS, layer_index
from modeling_deepseek.conversion.add_code import parse_json
from modeling_deepseek.conversion.family import check_shapes, family_config
from modeling_deepseek.conversion.folder import CheckpointFolder, Header, check_scales, fp8_block_size, fp8_pairs
from modeling_deepseek.conversion.quantization import SCALE_FMTS
from modeling_deepseek.conversion.weights import DEMO_MODULES, DEMO_PARTS, EXPERT, Weights
from modeling_deepseek.conversion.writer import MAX_SHARD_SIZE, Group, Output, convert, index_of, split, to_json
from modeling_deepseek.fp8 import SCALE_SUFFIX, official_fp8_config

MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")
CONFIG_NAME = "config_demo.json"
# Hub name of a module -> that of the demo, and the dimension that is sharded
HUB_MODULES = {hub: (demo, dim) for demo, (hub, dim) in DEMO_MODULES.items()} | {
    "eh_proj": ("eh_proj", None),
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
}
HUB_PARTS = {hub: demo for demo, hub in DEMO_PARTS.items()}
KINDS = {"weight": "weight", f"weight{SCALE_SUFFIX}": "scale", "e_score_correction_bias": "bias"}


def to_demo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    mp: int,
    with_mtp: bool = False,
    jobs: int = 2,
) -> None:
    """Shard a V2 or V3 checkpoint (bf16 or FP8) for the official inference demo on `mp` ranks, bit by bit.

    `destination` gets `model{rank}-mp{mp}.safetensors` and, for the demo's `--config`, config_demo.json. The demo has no
    MTP layers and drops them; `with_mtp` keeps them, named in the same way.

    Raises:
        ValueError: for another family, wrong scales, a tensor that has no name in the demo, sizes, blocks or experts that `mp`
            does not divide, and as [`writer.convert`].
    """
    if mp < 1:
        raise ValueError(f"mp is {mp}; expected the number of ranks, 1 or more")
    folder = CheckpointFolder(source)
    config = family_config(folder.config, folder.path / "config.json")
    if config.model_type not in MLA_FAMILIES:
        raise ValueError(
            f"{folder.path / 'config.json'}: model_type is {folder.config.get('model_type')!r}; the demo runs "
            f"{' and '.join(MLA_FAMILIES)} only"
        )
    block_size = fp8_block_size(folder.config, folder.path)
    pairs = fp8_pairs(folder.tensors, block_size)
    scales = set(pairs.values())
    check_scales((scale, folder.tensors[scale]) for scale in scales)
    for field in ("num_attention_heads", "n_routed_experts"):
        if (getattr(config, field) or 0) % mp:
            raise ValueError(
                f"mp is {mp}, which does not divide {field} {getattr(config, field)}: every rank has as many"
            )
    shards: dict[str, list[Group]] = {f"model{rank}-mp{mp}.safetensors": [] for rank in range(mp)}
    for name, header in folder.tensors.items():
        if layer_index(name) >= config.num_hidden_layers and not with_mtp:
            continue
        demo, dim = demo_name(name, folder)
        if name not in scales:
            check_divides(name, header, dim, mp, block_size if name in pairs else (1, 1))
        expert = EXPERT.search(name)
        owner = int(expert[1]) * mp // config.n_routed_experts if expert else None
        for rank, groups in enumerate(shards.values()):
            if owner in (None, rank):
                groups.append(part_of(folder, name, demo, dim, rank, mp))
    check_whole(folder, config, scales)
    last = {CONFIG_NAME: to_json(demo_config(config, folder.config, bool(pairs)))}
    convert(folder, destination, shards, last, {"command": "to-demo", "mp": mp, "with_mtp": with_mtp}, jobs)


def check_whole(folder: CheckpointFolder, config: DeepseekConfig, scales: set[str]) -> None:
    """Every tensor of the config is there, and no other; MTP layers, and their copies of embedding and head, may be absent."""
    where = folder.path / "config.json"
    if config.tie_word_embeddings:
        raise ValueError(
            f"{where}: tie_word_embeddings is true, and the demo has a head of its own: untie and save them first"
        )
    shapes = {name: header.shape for name, header in folder.tensors.items() if name not in scales}
    layers = {layer for layer in map(layer_index, shapes) if layer >= config.num_hidden_layers}
    if not layers:
        config = copy.deepcopy(config)
        config.num_nextn_predict_layers = 0
    for layer in layers:
        for name, source in SHARED_MTP_WEIGHTS.items():
            vocabulary = shapes.get(f"model.{source}.weight", shapes.get(f"{source}.weight"))
            shapes.setdefault(f"model.layers.{layer}.{name}", vocabulary)
    check_shapes(shapes, config, folder.path, where)


def demo_name(name: str, folder: CheckpointFolder) -> tuple[str, int | None]:
    """Name in the demo layout of a tensor of the Hub layout, and its sharded dimension; the inverse of `hub_name`."""
    *path, module, kind = name.removeprefix("model.").split(".")
    head = path[-1:] == ["shared_head"] and module == "head"  # of an MTP layer, where it keeps its name
    if not (head or module in HUB_MODULES) or kind not in KINDS:
        raise ValueError(f"{folder.tensors[name].file}: {name} has no name in the demo layout")
    demo, dim = HUB_MODULES["lm_head" if head else module]
    if EXPERT.search(name):
        dim = None  # routed experts lie whole on one rank
    return ".".join([*(HUB_PARTS.get(part, part) for part in path), demo, KINDS[kind]]), dim


def check_divides(name: str, header: Header, dim: int | None, mp: int, block_size: tuple[int, int]) -> None:
    """Every rank must get as much of `header`, in whole blocks."""
    if dim is None or mp == 1:
        return
    size, block = header.shape[dim], block_size[dim]
    if size % (mp * block):
        blocks = f" in blocks of {block}" if block > 1 else ""
        raise ValueError(
            f"{header.file}: {name} is {header.shape}; mp {mp} does not divide its {size}{blocks}: name a smaller mp"
        )


def part_of(folder: CheckpointFolder, name: str, demo: str, dim: int | None, rank: int, mp: int) -> Group:
    """What `rank` has of the tensor `name`."""
    header = folder.tensors[name]
    shape = tuple(size // mp if axis == dim else size for axis, size in enumerate(header.shape))

    def compute() -> list[torch.Tensor]:
        if dim == 0:
            return [folder.read(name, slice(rank * shape[0], (rank + 1) * shape[0]))]
        tensor = folder.read(name)
        return [tensor if dim is None else tensor.narrow(dim, rank * shape[dim], shape[dim])]

    return Group((Output(demo, header.dtype, shape),), compute)


def demo_config(config: DeepseekConfig, fields: dict[str, Any], fp8: bool) -> dict[str, Any]:
    """The demo's own config; `fields` are those of config.json."""
    rope = config.rope_parameters or {}
    yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    return {
        "dtype": "fp8" if fp8 else "bf16",
        "scale_fmt": (fields.get("quantization_config") or {}).get("scale_fmt"),
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "inter_dim": config.intermediate_size,
        "moe_inter_dim": config.moe_intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_dense_layers": config.first_k_dense_replace,
        "n_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_activated_experts": config.num_experts_per_tok,
        "n_expert_groups": config.n_group or 1,
        "n_limited_groups": config.topk_group or 1,
        "score_func": config.scoring_func,
        "route_scale": config.routed_scaling_factor,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "original_seq_len": rope["original_max_position_embeddings"] if yarn else config.max_position_embeddings,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rope_factor": rope["factor"] if yarn else 1.0,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope.get("mscale_all_dim") or 0.0 if yarn else 1.0,
    }


def from_demo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    config_file: str | os.PathLike[str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    jobs: int = 2,
) -> None:
    """Put the ranks of a folder in the demo layout together again, as a checkpoint in the Hub layout, bit by bit.

    Args:
        config_file: the config.json of the model on the Hub. Of it `num_nextn_predict_layers` is set to the MTP layers that
            the ranks hold (the demo drops them), and `quantization_config` to whether they are FP8. Where it has none, blocks
            are 128 x 128, and scales as config_demo.json beside the ranks says.

    Raises:
        ValueError: for ranks that are missing or do not fit together, tensors that the config has no place for or misses,
            wrong scales, a config that is none of the Hub's, and as [`writer.convert`].
    """
    fields = read_hub_config(Path(config_file))
    weights = Weights(source, fields)
    if not weights.is_demo:
        raise ValueError(f"{weights.path} has the Hub layout; expected files of ranks, model0-mp1.safetensors")
    main = family_config(fields, Path(config_file)).num_hidden_layers
    mtp_layers = {layer_index(name) for name in weights.shapes if layer_index(name) >= main}
    if mtp_layers or "num_nextn_predict_layers" in fields:
        fields["num_nextn_predict_layers"] = len(mtp_layers)
    check_shapes(weights.shapes, family_config(fields, Path(config_file)), weights.path, Path(config_file))
    if weights.quantized:
        fields["quantization_config"] = fields.get("quantization_config") or official_fp8_config(demo_scale_fmt(source))
    else:
        fields.pop("quantization_config", None)
    groups = [
        Group((Output(name, header.dtype, header.shape),), partial(read_group, weights, name))
        for name, header in sorted(weights.headers.items(), key=lambda item: layer_index(item[0]))
    ]
    shards = split(groups, max_shard_size)
    last = {**index_of(shards), "config.json": to_json(fields)}
    ranks = CheckpointFolder(source, index=False)
    convert(ranks, destination, shards, last, {"command": "from-demo"}, jobs, without=[CONFIG_NAME])


def demo_scale_fmt(folder: str | os.PathLike[str]) -> str | None:
    """`scale_fmt` by the demo's own config, which `to_demo` writes beside the ranks; `None` where there is none."""
    path = Path(folder) / CONFIG_NAME
    try:
        scale_fmt = parse_json(path.read_bytes()).get("scale_fmt") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a JSON object ({error}); expected the demo's config, or no such file"
        ) from error
    if scale_fmt not in SCALE_FMTS:
        raise ValueError(f"{path}: scale_fmt is {scale_fmt!r}; expected 'ue8m0' or null")
    return scale_fmt


def read_group(weights: Weights, name: str) -> list[torch.Tensor]:
    return [weights.read_stored(name)]


def read_hub_config(path: Path) -> dict[str, Any]:
    """The object in a config.json of the Hub."""
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); expected the config.json of the model on the Hub"
        ) from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(
            f"{path} has no model_type; expected the config.json of the model on the Hub, not the demo's config"
        )
    return fields
