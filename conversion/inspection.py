"""What a checkpoint holds, needs and lacks, from config.json and the headers of its safetensors files alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from modeling_deepseek import DeepseekConfig
from modeling_deepseek.checkpoint import SHARED_MTP_WEIGHTS, layer_index
from modeling_deepseek.conversion.add_code import read_config
from modeling_deepseek.conversion.family import expected_shapes, family_config
from modeling_deepseek.conversion.folder import CheckpointFolder, Header, fp8_block_size
from modeling_deepseek.conversion.weights import demo_parts, has_demo_layout, whole_header
from modeling_deepseek.fp8 import SCALE_SUFFIX
from modeling_deepseek.fp8_checkpoint import FP8_DTYPES

CACHE_BITS = {"bf16": 16, "8-bit": 8, "6-bit": 6}  # 6 bits per element: what the V2 report serves with
GQA_HEADS = 8  # key/value heads of DeepSeek-LLM 67B, to compare with
COPIES = tuple(f".{name}" for name in SHARED_MTP_WEIGHTS)
NAMED = 8  # tensors that a report names of each kind


@dataclass
class Share:
    """What the tensors of one dtype come to."""

    tensors: int = 0
    elements: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by config.json. The router biases of V3 count, FP8 scales do not."""

    main: int
    active_head_only: int  # per token: everything but the routed experts not chosen and the embedding
    active_with_embedding: int
    mtp_unique: int  # of the MTP layers, what the main model does not have
    mtp_stored: int  # with the copies of embedding and head that a checkpoint has


@dataclass(frozen=True)
class Stored:
    """What the headers alone say. Sizes in bytes."""

    source: str
    stored_main: int  # parameters in the files, FP8 scales aside
    stored_mtp: int
    tensors: int  # FP8 scales among them
    scales: int
    dtypes: dict[str, Share]  # largest first
    file_bytes: int

    @property
    def fp8_coverage(self) -> float:
        """Share of the stored parameters that is FP8."""
        quantized = sum(share.elements for dtype, share in self.dtypes.items() if dtype in FP8_DTYPES)
        return quantized / max(self.stored_main + self.stored_mtp, 1)


@dataclass(frozen=True)
class Ranks(Stored):
    """The findings of `inspect` in a folder in the demo layout that has no config.json; tensors are those of all ranks together."""

    ranks: int


@dataclass(frozen=True)
class Inspection(Stored):
    """The findings of `inspect`. Sizes in bytes, `cache` in elements per token."""

    family: str
    parameters: Parameters
    cache: dict[str, int]  # this model first, then other kinds of attention with the same heads
    context: int
    batch: int
    weight_bytes: int  # in memory, as stored; MTP layers share embedding and head
    dequantized_weight_bytes: int  # the same with FP8 weights as bf16
    missing: list[str]
    extra: list[str]
    misshapen: list[str]  # "name: (found), by the config (expected)"


def inspect(source: str | os.PathLike[str], context: int = 4096, batch: int = 1) -> Inspection | Ranks:
    """Read the headers of a checkpoint in the official layout: a folder, or a Hub id where there is no such path.

    A folder in the inference demo's layout, too; without a config.json beside the ranks there is less to say of it.

    `context` (tokens) and `batch` (sequences) are what the memory estimate is for.

    Raises:
        ValueError: no config.json of ours, files that cannot be read, no such model, or a context or batch below 1.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if os.path.isdir(source) and has_demo_layout(Path(source)) and not os.path.exists(Path(source) / "config.json"):
        return inspect_ranks(Path(source))
    fields, headers, file_bytes = read_folder(Path(source)) if os.path.exists(source) else read_hub(str(source))
    config = family_config(fields, f"{source}/config.json")
    expected = expected_shapes(config)
    missing, extra, misshapen = compare(headers, expected, fp8_block_size(fields, Path(source)))
    layers, scales = config.num_hidden_layers, {name for name in headers if name.endswith(SCALE_SUFFIX)}
    stored = {name: prod(header.shape) for name, header in headers.items() if name not in scales}
    stored_mtp = sum(count for name, count in stored.items() if is_mtp(name, layers))
    kept, dequantized = weight_bytes(config, headers, expected)
    return Inspection(
        source=str(source),
        family=family_name(config),
        parameters=count_parameters(config, expected),
        stored_main=sum(stored.values()) - stored_mtp,
        stored_mtp=stored_mtp,
        tensors=len(headers),
        scales=len(scales),
        dtypes=shares(headers),
        file_bytes=file_bytes,
        cache=cache_elements(config),
        context=context,
        batch=batch,
        weight_bytes=kept,
        dequantized_weight_bytes=dequantized,
        missing=missing,
        extra=extra,
        misshapen=misshapen,
    )


def inspect_ranks(folder: Path) -> Ranks:
    """Of the MTP layers, which nothing tells apart but their `eh_proj`, all tensors count as theirs."""
    headers, file_bytes, ranks = read_ranks(folder)
    mtp = {layer_index(name) for name in headers if name.endswith(".eh_proj.weight")}
    stored = {name: prod(header.shape) for name, header in headers.items() if not name.endswith(SCALE_SUFFIX)}
    stored_mtp = sum(count for name, count in stored.items() if layer_index(name) in mtp)
    return Ranks(
        source=str(folder),
        stored_main=sum(stored.values()) - stored_mtp,
        stored_mtp=stored_mtp,
        tensors=len(headers),
        scales=len(headers) - len(stored),
        dtypes=shares(headers),
        file_bytes=file_bytes,
        ranks=ranks,
    )


def read_ranks(folder: Path) -> tuple[dict[str, Header], int, int]:
    """Hub name -> header of the whole tensor in a folder in the demo layout, bytes of its files, and how many these are."""
    checkpoint = CheckpointFolder(folder, index=False)
    parts, dims = demo_parts(checkpoint)
    headers = {name: whole_header(name, of_ranks, dims[name]) for name, of_ranks in parts.items()}
    return headers, sum((folder / file).stat().st_size for file in checkpoint.shards), len(checkpoint.shards)


def family_name(config: DeepseekConfig) -> str:
    if config.model_type == "deepseek":
        return "DeepSeekMoE" if config.n_routed_experts else "DeepSeek-LLM"
    return {"deepseek_v2": "DeepSeek-V2", "deepseek_v3": "DeepSeek-V3"}[config.model_type]


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Header], int]:
    """Fields of config.json, tensor name -> header, and bytes of the safetensors files in `folder`."""
    fields = read_config(folder)
    if has_demo_layout(folder):
        return fields, *read_ranks(folder)[:2]
    checkpoint = CheckpointFolder(folder)
    return fields, checkpoint.tensors, sum((folder / file).stat().st_size for file in checkpoint.shards)


def read_hub(repo_id: str) -> tuple[dict[str, Any], dict[str, Header], int]:
    """As `read_folder`, of a model on the Hub; only config.json and the index are downloaded, headers are fetched."""
    api = HfApi()
    try:
        fields = read_config(Path(api.hf_hub_download(repo_id, "config.json")).parent)
        files = api.get_safetensors_metadata(repo_id).files_metadata
        sizes = {entry.path: entry.size for entry in api.list_repo_tree(repo_id) if entry.path in files}
    except (NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} is no folder here, and on the Hub: {error}") from error
    headers = {}
    for file, metadata in files.items():
        for name, tensor in metadata.tensors.items():
            first, last = tensor.data_offsets
            headers[name] = Header(Path(file), tensor.dtype, tuple(tensor.shape), last - first, first)
    return fields, headers, sum(sizes.values())


def is_mtp(name: str, layers: int) -> bool:
    """Whether a tensor is of an MTP layer, behind the `layers` of the main model."""
    return layer_index(name) >= layers


def is_copy(name: str, layers: int) -> bool:
    """Whether an MTP layer repeats a tensor of the main model under this name."""
    return name.endswith(COPIES) and is_mtp(name, layers)


def count_parameters(config: DeepseekConfig, expected: Mapping[str, tuple[int, ...]]) -> Parameters:
    sizes, layers = {name: prod(shape) for name, shape in expected.items()}, config.num_hidden_layers
    main = sum(count for name, count in sizes.items() if not is_mtp(name, layers))
    mtp = {name: count for name, count in sizes.items() if is_mtp(name, layers)}
    routed = sum(count for name, count in sizes.items() if ".mlp.experts." in name and name not in mtp)
    active = main - routed
    if routed:
        active += routed * config.num_experts_per_tok // config.n_routed_experts
    embedding = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    return Parameters(
        main=main,
        active_head_only=active - embedding,
        active_with_embedding=active,
        mtp_unique=sum(count for name, count in mtp.items() if not is_copy(name, layers)),
        mtp_stored=sum(mtp.values()),
    )


def cache_elements(config: DeepseekConfig) -> dict[str, int]:
    """Kind of attention -> cached elements per token in all main layers, this model's own kind first."""
    layers, heads, groups = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    if config.model_type == "deepseek":
        per_head = 2 * config.head_dim
        own = f"MHA, {heads} heads" if groups == heads else f"GQA, {groups} key/value heads"
        cache = {own: layers * groups * per_head}
    else:
        per_head = config.qk_nope_head_dim + config.v_head_dim
        width = config.kv_lora_rank + config.qk_rope_head_dim
        cache = {f"latent, {config.kv_lora_rank} + {config.qk_rope_head_dim}": layers * width}
    others = {f"MHA, {heads} heads": layers * heads * per_head}
    if heads > GQA_HEADS and heads % GQA_HEADS == 0:
        others[f"GQA, {GQA_HEADS} key/value heads"] = layers * GQA_HEADS * per_head
    return {**cache, **others}


def weight_bytes(
    config: DeepseekConfig, headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]]
) -> tuple[int, int]:
    """Bytes of the weights in memory: as they are stored, and with FP8 weights dequantised to bf16."""
    kept, dequantized, layers = 0, 0, config.num_hidden_layers
    for name, header in headers.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in expected or is_copy(weight, layers):
            continue
        kept += header.nbytes
        if weight == name:
            dequantized += 2 * prod(header.shape) if header.dtype in FP8_DTYPES else header.nbytes
    return kept, dequantized


def shares(headers: Mapping[str, Header]) -> dict[str, Share]:
    """dtype -> what its tensors come to, the most bytes first."""
    found: dict[str, Share] = {}
    for header in headers.values():
        share = found.setdefault(header.dtype, Share())
        share.tensors += 1
        share.elements += prod(header.shape)
        share.nbytes += header.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def compare(
    headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]], block: tuple[int, int]
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing and in excess, and lines for tensors of another shape. An FP8 weight needs its scales."""
    wanted = dict(expected)
    for name, header in headers.items():
        if header.dtype in FP8_DTYPES:
            grid = zip(header.shape, block, strict=True) if len(header.shape) == 2 else ()
            wanted[name + SCALE_SUFFIX] = tuple(ceil(size / side) for size, side in grid)
    misshapen = [
        f"{name}: {header.shape}, by the config {wanted[name]}"
        for name, header in headers.items()
        if name in wanted and header.shape != wanted[name]
    ]
    return [name for name in wanted if name not in headers], [name for name in headers if name not in wanted], misshapen


def report(found: Inspection | Ranks) -> str:
    """The findings as aligned lines."""
    if isinstance(found, Ranks):
        ranks = f"{found.ranks} rank{'s' if found.ranks > 1 else ''}"
        hint = "a config.json of the Hub beside them tells more"
        return "\n".join([f"{found.source}: the inference demo's layout, {ranks}; {hint}", "", *stored_lines(found)])
    lines = [f"{found.source}: {found.family}", ""]
    parts = (parameter_lines(found.parameters), stored_lines(found), cache_lines(found), memory_lines(found))
    for part in parts:
        lines += [*part, ""]
    return "\n".join(lines + fit_lines(found))


def parameter_lines(counts: Parameters) -> list[str]:
    lines = [
        "parameters by config.json",
        row("main model", counts.main),
        row("  active per token", counts.active_head_only, "with the head only"),
        row("", counts.active_with_embedding, "with embedding and head"),
    ]
    for count, note in ((counts.mtp_unique, "of its own"), (counts.mtp_stored, "with copies of embedding and head")):
        if count:
            lines.append(row("MTP", count, f"{percent(count, counts.main + count)}, {note}"))
    return lines


def stored_lines(found: Stored) -> list[str]:
    everything = sum(share.nbytes for share in found.dtypes.values())
    lines = [
        "stored",
        row("main model", found.stored_main),
        row("MTP", found.stored_mtp, percent(found.stored_mtp, found.stored_main + found.stored_mtp)),
        row("tensors", found.tensors, f"{found.scales:,} of them FP8 scales"),
        row("bytes on disk", found.file_bytes, size(found.file_bytes)),
    ]
    for dtype, share in found.dtypes.items():
        lines.append(row(f"  {dtype}", share.nbytes, f"{percent(share.nbytes, everything)}, {share.tensors:,} tensors"))
    return [*lines, f"  {'parameters in FP8':26}{100 * found.fp8_coverage:19.2f} %"]


def cache_lines(found: Inspection) -> list[str]:
    lines = [f"{'cache per token':28}" + "".join(f"{name:>14}" for name in CACHE_BITS)]
    for name, elements in found.cache.items():
        lines.append(f"  {name:26}" + "".join(f"{size(elements * bits / 8):>14}" for bits in CACHE_BITS.values()))
    return lines


def memory_lines(found: Inspection) -> list[str]:
    """Weights and bf16 cache for the context and batch."""
    cache = next(iter(found.cache.values())) * 2 * found.context * found.batch
    weights = {"as stored": found.weight_bytes}
    if found.fp8_coverage:
        weights = {"FP8 kept": found.weight_bytes, "FP8 dequantised to bf16": found.dequantized_weight_bytes}
    lines = [f"memory for {found.batch:,} x {found.context:,} tokens: weights + bf16 cache, without activations"]
    for name, nbytes in weights.items():
        lines.append(f"  {name:26}{size(nbytes):>19} + {size(cache)} = {size(nbytes + cache)}")
    return lines


def fit_lines(found: Inspection) -> list[str]:
    """What disagrees with config.json, the first names of each kind."""
    kinds = {"missing": found.missing, "not in the config": found.extra, "misshapen": found.misshapen}
    lines = []
    for kind, names in kinds.items():
        if names:
            lines += [f"{kind}: {len(names):,}", *(f"  {name}" for name in names[:NAMED])]
            lines += [f"  and {len(names) - NAMED:,} more"] if len(names) > NAMED else []
    return lines or ["tensors: exactly those of config.json"]


def row(name: str, count: int, note: str = "") -> str:
    return f"  {name:26}{count:>19,}  {note}".rstrip()


def percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


def size(nbytes: float) -> str:
    """`nbytes` in the largest binary unit up to GiB that it fills."""
    exponent = sum(nbytes >= 1024**power for power in (1, 2, 3))
    return f"{nbytes / 1024**exponent:,.2f} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"
