"""Block-FP8 checkpoints (V3, R1, V3.1): exact dequantisation while loading, tensor by tensor, on any device."""

import copy

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import logging

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

SCALE_SUFFIX = "_scale_inv"  # a multiplier, whatever the name says: W = W_fp8 * scale
FP8_DTYPES = {"F8_E4M3", "F8_E5M2"}
DEFAULT_BLOCK = (128, 128)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int] = DEFAULT_BLOCK) -> torch.Tensor:
    """`weight` `[m, n]` in FP8 times its block scales `[ceil(m / rows), ceil(n / columns)]`, in fp32.

    The last block of a row or column may be partial: kv_a_proj_with_mqa has 576 = 4.5 * 128 rows.

    Raises:
        ValueError: when the scales are not one per block.
    """
    blocks = tuple(-(-size // block) for size, block in zip(weight.shape, block_size, strict=True))
    if tuple(scale.shape) != blocks:
        raise ValueError(
            f"Scales {tuple(scale.shape)}, but a weight {tuple(weight.shape)} has {blocks} blocks of {tuple(block_size)}: "
            "check weight_block_size in the quantization_config."
        )
    rows, columns = block_size
    spread = scale.float().repeat_interleave(rows, 0)[: weight.shape[0]]
    return weight.float() * spread.repeat_interleave(columns, 1)[:, : weight.shape[1]]


class DequantizedSlice:
    """Stands for a tensor of the checkpoint like a slice of safetensors, and dequantises it when it is read."""

    def __init__(self, weight, scale, block_size: tuple[int, int], dtype: torch.dtype):
        self.weight, self.scale, self.block_size, self.dtype = weight, scale, block_size, dtype

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> torch.Tensor:
        return dequantize(self.weight[...], self.scale[...], self.block_size)[index].to(self.dtype)


def dequantized_state_dict(
    files: list[str], block_size: tuple[int, int], dtype: torch.dtype
) -> dict[str, "DequantizedSlice"]:
    """Name -> lazy tensor over all files; FP8 weights are paired with their scales, wherever these are stored.

    Raises:
        ValueError: for an FP8 weight without scales, and for scales without a weight, naming both tensors.
    """
    slices = {}
    for path in files:
        tensors = safe_open(path, framework="pt")
        slices |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
    quantized = {name for name, lazy in slices.items() if lazy.get_dtype() in FP8_DTYPES}
    scales = {name for name in slices if name.endswith(SCALE_SUFFIX)}
    for name in sorted(quantized):
        if name + SCALE_SUFFIX not in scales:
            raise ValueError(
                f"{name} is FP8, but its scales {name + SCALE_SUFFIX} are in none of the {len(files)} files."
            )
    for name in sorted(scales):
        if name.removesuffix(SCALE_SUFFIX) not in quantized:
            raise ValueError(f"{name} has no FP8 weight {name.removesuffix(SCALE_SUFFIX)} that it belongs to.")
    return {
        name: DequantizedSlice(lazy, slices[name + SCALE_SUFFIX], block_size, dtype) if name in quantized else lazy
        for name, lazy in slices.items()
        if name not in scales
    }


def without_fp8(config_class, path, config, kwargs: dict):
    """The config to load `path` with: for a block-FP8 checkpoint a copy without `quantization_config`, else `config` itself."""
    if "quantization_config" in kwargs or kwargs.get("state_dict") is not None or path is None:
        return config
    if not isinstance(config, PreTrainedConfig):
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            stored, _ = PreTrainedConfig.get_config_dict(path if config is None else config, **hub)
        except OSError:  # no config here: an adapter's folder, or transformers says what is wrong
            return config
        if "quantization_config" not in stored:
            return config
        kept = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
        config, unused = config_class.from_pretrained(
            path if config is None else config, return_unused_kwargs=True, **{**kwargs, **hub}
        )
        kwargs.clear()
        kwargs.update({**unused, **kept, **hub})
    config = copy.deepcopy(config)
    block_size = _take_fp8_config(config)
    if block_size is not None:
        config._fp8_block_size = block_size
        config.dtype = config.dtype or torch.bfloat16
    return config


def _take_fp8_config(config) -> tuple[int, int] | None:
    """Takes the `quantization_config` of a block-FP8 checkpoint out of `config`; returns its block size, else `None`."""
    quantization = getattr(config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    del config.quantization_config
    logger.warning_once("The checkpoint is stored in FP8: its weights are dequantised exactly while they are read.")
    return tuple(quantization.get("weight_block_size") or DEFAULT_BLOCK)
