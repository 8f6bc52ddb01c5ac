"""How a block-FP8 checkpoint is read: its config, its scales, and its tensors one at a time, dequantised or as they are."""

import copy
import json
import re
from collections.abc import Iterable

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import find_adapter_config_file, is_peft_available, logging

from .fp8 import DEFAULT_BLOCK, SCALE_SUFFIX, dequantize
from .ops import gpu_multiplies_fp8

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# of `from_pretrained` that are no fields of a config, though some configs have an attribute of that name
LOADING_ARGUMENTS = (
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "torch_dtype",
    "output_loading_info",
    "device_map",
)
FP8_DTYPES, SCALE_DTYPES = {"F8_E4M3", "F8_E5M2"}, {"F32", "BF16", "F8_E8M0"}

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


class FusedSlice:
    """Stands for the tensors of a checkpoint that one parameter is made of: stacked along new dimensions as `parts` is nested.

    With `join_inner` the inner ones are joined along their rows instead. It is filled part by part: no other copy of it exists.
    """

    def __init__(self, parts: list, join_inner: bool):
        self.parts, self.join_inner = parts, join_inner

    def get_shape(self) -> list[int]:
        inner = [list(part.get_shape()) for part in self.parts[0]]
        if self.join_inner:
            return [len(self.parts), sum(shape[0] for shape in inner), *inner[0][1:]]
        return [len(self.parts), len(inner), *inner[0]]

    def get_dtype(self) -> str:
        return self.parts[0][0].get_dtype()

    def __getitem__(self, index) -> torch.Tensor:
        fused, rows = None, self.parts[0][0].get_shape()[0]
        for number, parts in enumerate(self.parts):
            for place, part in enumerate(parts):
                if fused is None:
                    fused = torch.empty(self.get_shape(), dtype=getattr(part, "dtype", None) or part[...].dtype)
                into = fused[number, place * rows : (place + 1) * rows] if self.join_inner else fused[number, place]
                if isinstance(part, DequantizedSlice):
                    part.read_into(into)
                else:
                    _bytes(into).copy_(_bytes(part[...]))
        return fused[index]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 tensors as bytes, which every operation that only moves data takes."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def expert_layers(names: Iterable[str]) -> dict[str, dict[tuple[int, str], str]]:
    """Path of a layer's experts -> (expert, "gate" / "up" / "down") -> tensor name, for the names that are weights of experts."""
    layers: dict[str, dict] = {}
    for name in names:
        match = _EXPERT.match(name)
        if match:
            layers.setdefault(match.group(1), {})[int(match.group(2)), match.group(3)] = name
    return layers


def fused_experts(slices: dict, names: dict[tuple[int, str], str], suffix: str = "") -> dict[str, FusedSlice]:
    """`gate_up_proj` and `down_proj` of all experts, of the tensors that `names` (+ `suffix`) calls by expert and kind.

    Weights of gate and up are joined, their scales stacked: I rows need not be whole blocks.
    """
    experts = range(1 + max(expert for expert, _ in names))
    gate_up = [[slices[names[expert, kind] + suffix] for kind in ("gate", "up")] for expert in experts]
    down = [[slices[names[expert, "down"] + suffix]] for expert in experts]
    return {
        "gate_up_proj" + suffix: FusedSlice(gate_up, join_inner=not suffix),
        "down_proj" + suffix: FusedSlice(down, join_inner=True),
    }


class DequantizedSlice:
    """Stands for a tensor of the checkpoint like a slice of safetensors, and dequantises it when it is read."""

    def __init__(self, weight, scale, block_size: tuple[int, int], dtype: torch.dtype):
        self.weight, self.scale, self.block_size, self.dtype = weight, scale, block_size, dtype

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> torch.Tensor:
        return dequantize(self.weight[...], self.scale[...], self.block_size, self.dtype)[index]

    def read_into(self, out: torch.Tensor) -> None:
        dequantize(self.weight[...], self.scale[...], self.block_size, self.dtype, out)


def check_scale_values(where: str, scale: torch.Tensor) -> None:
    """Raises `ValueError`, beginning with `where`, for scales that are not finite or not above 0."""
    values = scale.float().flatten()
    wrong = (~(values.isfinite() & (values > 0))).nonzero()
    if len(wrong):
        place = wrong[0, 0].item()
        raise ValueError(
            f"{where} holds {values[place].item()} (element {place}), expected finite scales above 0: download or copy it again"
        )


def checkpoint_slices(files: list[str], block_size: tuple[int, int]) -> tuple[dict, set[str]]:
    """Name -> lazy tensor over all files, and which of them are FP8 weights; each has its scales, wherever these are stored.

    Raises:
        ValueError: for an FP8 weight without scales, scales without a weight, and scales that are not one finite number above 0
            per block, naming the tensors.
    """
    slices, places = {}, {}
    for path in files:
        tensors = safe_open(path, framework="pt")
        found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        slices |= found
        places |= dict.fromkeys(found, path)
    quantized = {name for name, lazy in slices.items() if lazy.get_dtype() in FP8_DTYPES}
    scales = {name for name in slices if name.endswith(SCALE_SUFFIX)}
    for name in sorted(quantized):
        if name + SCALE_SUFFIX not in scales:
            raise ValueError(
                f"{name} is FP8, but its scales {name + SCALE_SUFFIX} are in none of the {len(files)} files."
            )
    for name in sorted(scales):
        weight, where = name.removesuffix(SCALE_SUFFIX), f"{places[name]}: {name}"
        if weight not in quantized:
            raise ValueError(f"{name} has no FP8 weight {weight} that it belongs to.")
        shape = slices[weight].get_shape()
        grid = [-(-size // block) for size, block in zip(shape, block_size, strict=False)]
        if len(shape) != 2 or slices[name].get_shape() != grid or slices[name].get_dtype() not in SCALE_DTYPES:
            raise ValueError(
                f"{where} is {slices[name].get_dtype()} {slices[name].get_shape()}, expected {' or '.join(sorted(SCALE_DTYPES))} "
                f"{grid}, one per block {list(block_size)} of {weight} {shape}: "
                "check weight_block_size in the quantization_config."
            )
        check_scale_values(where, slices[name][...])
    return slices, quantized


def dequantized_state_dict(files: list[str], block_size: tuple[int, int], dtype: torch.dtype) -> dict:
    """Name -> lazy tensor over all files, FP8 weights dequantised when they are read, and experts fused where all of them are.

    Errors as in [`checkpoint_slices`].
    """
    slices, quantized = checkpoint_slices(files, block_size)
    for name in quantized:
        slices[name] = DequantizedSlice(slices[name], slices.pop(name + SCALE_SUFFIX), block_size, dtype)
    for path, names in expert_layers(slices).items():
        if quantized.issuperset(names.values()):
            slices |= {f"{path}.{name}": lazy for name, lazy in fused_experts(slices, names).items()}
            for name in names.values():
                del slices[name]
    return slices


def without_fp8(config_class, path, config, kwargs: dict):
    """The config to load `path` with: for a block-FP8 checkpoint a copy without `quantization_config`, else `config` itself.

    Where `path` is an adapter, which has no config.json, the checkpoint is the one that it was trained on.
    """
    if "quantization_config" in kwargs or kwargs.get("state_dict") is not None or path is None:
        return config
    if not isinstance(config, PreTrainedConfig):
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        source = path if config is None else config
        stored = _stored_config(source, hub)
        if not stored and is_peft_available():  # an adapter has none
            source = _base_of_adapter(source, hub) or source
            stored = _stored_config(source, hub)
        if "quantization_config" not in stored:
            return config
        kept = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
        config, unused = config_class.from_pretrained(source, return_unused_kwargs=True, **{**kwargs, **hub})
        kwargs.clear()
        kwargs.update({**unused, **kept, **hub})
    config = copy.deepcopy(config)
    block_size = _take_fp8_config(config)
    if block_size is not None:
        config._fp8_block_size = block_size
        config.dtype = config.dtype or torch.bfloat16
    return config


def _stored_config(source, hub: dict) -> dict:
    """The fields of the config.json in `source`; empty where there is none, of which transformers says what is wrong."""
    try:
        return PreTrainedConfig.get_config_dict(source, **hub)[0]
    except OSError:
        return {}


def _base_of_adapter(path, hub: dict) -> str | None:
    """What the adapter in `path` (a folder, or an id on the Hub) says that it was trained on; `None` where there is none."""
    file = find_adapter_config_file(path, **hub)
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream).get("base_model_name_or_path")


def _take_fp8_config(config) -> tuple[int, int] | None:
    """Takes the `quantization_config` of a block-FP8 checkpoint out of `config`; returns its block size, else `None`."""
    quantization = getattr(config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ValueError(
                f"The quantization_config has quant_method {method!r}; expected 'fp8' or another of {known}."
            )
        return None
    block_size = block_size_of(quantization, "The quantization_config")
    del config.quantization_config  # which transformers would act upon
    if config.fp8_weights == "keep" or (config.fp8_weights == "auto" and gpu_multiplies_fp8()):
        config._fp8_quantization_config = quantization
        if config.fp8_weights == "auto":
            logger.warning_once(
                "The checkpoint is stored in FP8, which this GPU multiplies: its weights stay as they are, frozen. To train them, "
                "load with fp8_weights='dequantize'."
            )
    else:
        logger.warning_once("The checkpoint is stored in FP8: its weights are dequantised exactly while they are read.")
    return block_size


def block_size_of(quantization: dict, where: str) -> tuple[int, int]:
    """Rows and columns of a block by a `quantization_config`; the official 128 x 128 where it says nothing.

    Raises:
        ValueError: beginning with `where`, for a `weight_block_size` that is none.
    """
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(
            f"{where} has weight_block_size {block!r}; expected rows and columns, [128, 128] in the releases"
        )
    return tuple(block)
