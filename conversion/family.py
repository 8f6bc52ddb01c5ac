"""Which of our models a config.json describes, and the tensors that its checkpoint must hold."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.core_model_loading import revert_weight_conversion

import modeling_deepseek
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.checkpoint import SHARED_MTP_WEIGHTS
from modeling_deepseek.conversion.add_code import read_config
from modeling_deepseek.hub import PREFIXES

LLAMA = "llama"  # what the official DeepSeek-LLM folders say


def read_family(folder: Path) -> DeepseekConfig:
    """Our config of the model in `folder`, without its `quantization_config`.

    Raises:
        ValueError: no folder, no readable config.json in it, or one of another family.
    """
    return family_config(read_config(folder), folder / "config.json")


def family_config(fields: dict[str, Any], source: Path | str) -> DeepseekConfig:
    """Our config with the `fields` of a config.json, without its `quantization_config`; errors name `source`.

    Raises:
        ValueError: for a `model_type` that is not ours, and for values that no model of its family has.
    """
    fields = {
        name: deepcopy(value) for name, value in fields.items() if name != "quantization_config"
    }  # transformers edits them
    model_type = str(fields.get("model_type"))
    try:
        prefix = PREFIXES["deepseek"] if model_type == LLAMA else PREFIXES[model_type]
    except KeyError:
        known = ", ".join(map(repr, (*PREFIXES, LLAMA)))
        raise ValueError(
            f"{source}: model_type {fields.get('model_type')!r} is not a DeepSeek family: expected one of {known}"
        ) from None
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise ValueError(f"{source}: {name} is {value!r}: expected a dtype of torch, such as 'bfloat16'")
    try:
        return getattr(modeling_deepseek, f"{prefix}Config").from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error


def causal_lm_class(config: DeepseekConfig) -> type[torch.nn.Module]:
    """Our class of models with a language head for `config`."""
    return getattr(modeling_deepseek, f"{PREFIXES[config.model_type]}ForCausalLM")


def expected_shapes(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in an official checkpoint of `config`, FP8 scales aside.

    The experts one by one, MTP layers with their copies of embedding and head. Built on the meta device: no memory.

    Raises:
        ValueError: for a config of which no model can be built.
    """
    try:
        with torch.device("meta"):
            model = causal_lm_class(config)(config)
    except Exception as error:  # whatever a wrong field leads to
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"config.json has fields of which no model can be built ({type(error).__name__}: {reason}): download it again"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    vocabulary = shapes["model.embed_tokens.weight"]
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    main = config.num_hidden_layers
    copies = (
        f"model.layers.{main + depth}.{name}"
        for depth in range(config.num_nextn_predict_layers)
        for name in SHARED_MTP_WEIGHTS
    )
    return shapes | dict.fromkeys(copies, vocabulary)


def check_shapes(shapes: dict[str, tuple[int, ...]], config: DeepseekConfig, folder: Path, config_file: Path) -> None:
    """A checkpoint with tensors of these `shapes` in `folder` is one of `config`, which `config_file` holds.

    Raises:
        ValueError: for the first tensor that is missing, misshapen or unknown.
    """
    expected = expected_shapes(config)
    other = "it is the config of another model, or the checkpoint is not whole"
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"{folder} lacks {name}, which {config_file} demands: {other}")
        if shapes[name] != shape:
            raise ValueError(f"{folder}: {name} is {shapes[name]}, by {config_file} {shape}: {other}")
    for name in shapes:
        if name not in expected:
            raise ValueError(f"{folder} holds {name}, which {config_file} has no place for: {other}")
