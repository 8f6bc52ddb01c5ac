"""Which modules of a model hold block-FP8 weights: made so while loading, on request, and undone."""

import re

import torch
from torch import nn

from .fp8 import DEFAULT_BLOCK, GPU_PIECE, SCALE_SUFFIX, FP8Experts, FP8Linear, quantize
from .fp8_checkpoint import DequantizedSlice, checkpoint_slices, expert_layers, fused_experts
from .moe import DeepseekExperts

# not embedding, head, norms, router (which is no nn.Linear) and eh_proj
_QUANTIZED = re.compile(r"layers\.\d+\.(self_attn|mlp)\.")
_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}


def kept_state_dict(model: nn.Module, files: list[str], block_size: tuple[int, int]) -> dict:
    """Puts FP8 modules into `model` (on the meta device) for what is FP8 in `files`; name -> lazy tensor, experts fused.

    FP8 weights of anything but linear layers and experts of the decoder are dequantised when they are read.

    Raises:
        ValueError: for a layer whose experts are FP8 in part, for weights of another shape than the config's, and as
            [`checkpoint_slices`].
    """
    slices, quantized = checkpoint_slices(files, block_size)
    ue8m0 = model.config.quantization_config.get("scale_fmt") == "ue8m0"
    modules, kept = dict(model.named_modules()), set()
    for name in sorted(quantized):
        path = _in_model(model, name.removesuffix(".weight"))
        module = modules.get(path)
        if isinstance(module, nn.Linear) and _QUANTIZED.search(path):
            _check_shape(name, slices[name].get_shape(), module.weight)
            weight, scale = (_like(slices[key]) for key in (name, name + SCALE_SUFFIX))
            _replace(model, path, FP8Linear(weight, scale, block_size, module.bias, ue8m0))
            model.get_submodule(path).compute_dtype = module.weight.dtype
            kept.add(name)
    for path, names in expert_layers(sorted(quantized)).items():
        module = modules.get(_in_model(model, path))
        if not isinstance(module, DeepseekExperts):
            continue
        needed = [(expert, kind) for expert in range(module.num_experts) for kind in ("gate", "up", "down")]
        plain = [f"{path}.{expert}.{kind}_proj.weight" for expert, kind in needed if (expert, kind) not in names]
        if plain:
            raise ValueError(
                f"The experts of a layer are FP8 together or not at all: {names[min(names)]} is, {plain[0]} is not. Load with "
                "fp8_weights='dequantize'."
            )
        fused = fused_experts(slices, names) | fused_experts(slices, names, SCALE_SUFFIX)
        for name in names.values():
            del slices[name], slices[name + SCALE_SUFFIX]
        kept |= set(names.values())
        slices |= {f"{path}.{name}": lazy for name, lazy in fused.items()}
        empty = {name: _like(lazy) for name, lazy in fused.items()}
        _replace(model, _in_model(model, path), FP8Experts(empty, block_size, model.config.hidden_act, ue8m0))
        model.get_submodule(_in_model(model, path)).compute_dtype = module.down_proj.dtype
    for name in quantized - kept:
        slices[name] = DequantizedSlice(slices[name], slices.pop(name + SCALE_SUFFIX), block_size, torch.float32)
    return slices


def _check_shape(name: str, found: list[int], expected: torch.Tensor) -> None:
    if list(found) != list(expected.shape):
        raise ValueError(
            f"{name} is {list(found)}, by the config {list(expected.shape)}: fix the checkpoint or its config.json."
        )


def _in_model(model: nn.Module, path: str) -> str:
    """A checkpoint's module path in `model`: either may be of the bare decoder."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        return path.removeprefix(prefix)
    return path if path.startswith(prefix) or not path.startswith("layers.") else prefix + path


def _like(lazy) -> torch.Tensor:
    return torch.empty(lazy.get_shape(), dtype=_DTYPES[lazy.get_dtype()], device="meta")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def fp8_modules(model: nn.Module) -> dict[str, FP8Linear | FP8Experts]:
    """Path -> module that keeps FP8 weights."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (FP8Linear, FP8Experts))}


def freeze_fp8(model: nn.Module) -> None:
    for module in fp8_modules(model).values():
        module.requires_grad_(False)


@torch.no_grad()
def quantize_model(model: nn.Module, scale_fmt: str | None, block_size: tuple[int, int] = DEFAULT_BLOCK) -> None:
    """Puts FP8 modules in the place of every linear layer and expert of the decoder layers, as the official checkpoints have it.

    Raises:
        ValueError: before anything is changed, for a model that has FP8 modules, is offloaded, or holds values that are not
            finite.
    """
    if fp8_modules(model):
        raise ValueError("The model holds FP8 weights already: undo that first (dequantize_fp8).")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is offloaded, out of reach of quantize_fp8: load the model without an offload.")
        if _QUANTIZED.search(name) and not all(part.isfinite().all() for part in _pieces(parameter)):
            raise ValueError(f"{name} holds values that are not finite, which FP8 has no scale for.")
    for path, module in list(model.named_modules()):
        if isinstance(module, DeepseekExperts):
            _replace(model, path, _quantized_experts(module, scale_fmt, block_size, model.config.hidden_act))
        elif type(module) is nn.Linear and _QUANTIZED.search(path):
            weight, scale = quantize(module.weight, block_size, scale_fmt)
            _replace(model, path, FP8Linear(weight, scale, block_size, module.bias, scale_fmt == "ue8m0"))
            model.get_submodule(path).compute_dtype = module.weight.dtype


def _pieces(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of it that are checked at a time: in little memory, and with few questions to the device."""
    return parameter.split(max(1, GPU_PIECE * len(parameter) // max(1, parameter.numel())))


def _quantized_experts(module: DeepseekExperts, scale_fmt, block_size, hidden_act: str) -> FP8Experts:
    found = {name: [] for name in ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")}
    for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True):
        pairs = [quantize(part, block_size, scale_fmt) for part in gate_up.chunk(2)]
        found["gate_up_proj"].append(torch.cat([weight.view(torch.uint8) for weight, _ in pairs]))
        found["gate_up_proj_scale_inv"].append(torch.stack([scale for _, scale in pairs]))
        weight, scale = quantize(down, block_size, scale_fmt)
        found["down_proj"].append(weight.view(torch.uint8))
        found["down_proj_scale_inv"].append(scale)
    fused = {name: torch.stack(parts) for name, parts in found.items()}
    fused |= {name: fused[name].view(torch.float8_e4m3fn) for name in ("gate_up_proj", "down_proj")}
    return FP8Experts(fused, block_size, hidden_act, scale_fmt == "ue8m0")


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts plain linear layers and experts in the place of FP8 modules, with the same values in `dtype`.

    Raises:
        ValueError: before anything is changed, for a model that is offloaded.
    """
    modules = fp8_modules(model)
    for path, module in modules.items():
        if any(parameter.device.type == "meta" for parameter in module.parameters()):
            raise ValueError(
                f"{path} is offloaded, out of reach of dequantize_fp8: load the model with fp8_weights='dequantize'."
            )
    for path, module in modules.items():
        if isinstance(module, FP8Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.dequantized_weight(dtype))
            plain.bias = module.bias
        else:
            with torch.device("meta"):
                plain = DeepseekExperts(model.config)
            plain.gate_up_proj = nn.Parameter(module.dequantized("gate_up_proj", dtype))
            plain.down_proj = nn.Parameter(module.dequantized("down_proj", dtype))
        _replace(model, path, plain.train(module.training))


def with_official_experts(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with every fused FP8 expert, weights and scales, under its own official names."""
    state_dict = dict(state_dict)
    for path, module in fp8_modules(model).items():
        if any(parameter.device.type == "meta" for parameter in module.parameters()):
            raise ValueError(
                f"{path} is kept in FP8 and offloaded, out of reach of save_pretrained: load the model without an offload, or with "
                "fp8_weights='dequantize'."
            )
        if isinstance(module, FP8Experts):
            for name in module.state_dict():
                state_dict.pop(f"{path}.{name}", None)
            for expert in range(module.num_experts):
                for name, pair in module.weights_of(expert).items():
                    key = f"{path}.{expert}.{name}.weight"
                    state_dict[key], state_dict[key + SCALE_SUFFIX] = (tensor.contiguous() for tensor in pair)
    return state_dict
