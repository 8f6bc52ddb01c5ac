"""The base class of all models: what is initialised how, and the ways from and to a checkpoint."""

import copy
import os
import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .attention import DeepseekAttention
from .checkpoint import (
    SHARED_MTP_WEIGHTS,
    check_experts,
    check_index,
    drop_absent_mtp_layers,
    misfits,
    safetensors_shapes,
    with_shared_mtp_weights,
)
from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .decoder import DeepseekDecoderLayer
from .fp8 import SCALE_SUFFIX, official_fp8_config
from .fp8_checkpoint import dequantized_state_dict, without_fp8
from .hub import PREFIXES, auto_map_for, code_files, replace_files, write_model_card
from .lora import NamesLoraTargets, name_lora_targets
from .moe import DeepseekExperts
from .precision import dequantize_model, fp8_modules, freeze_fp8, kept_state_dict, quantize_model, with_official_experts
from .recompute import checkpointing_function
from .rope import DeepseekRotaryEmbedding
from .router import DeepseekTopkRouter

# Per-expert checkpoint keys fuse on load and split on save, as for the native classes of the same model_type.
for _model_type in PREFIXES:
    register_checkpoint_conversion_mapping(_model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


def require_config(path: str | os.PathLike, subfolder: str = "") -> None:
    """transformers would go on with a default config, 671B parameters large, where a folder has none.

    Raises:
        OSError: for an existing folder with neither config.json nor adapter_config.json.
    """
    folder = os.path.join(path, subfolder)
    if os.path.isdir(folder) and not any(
        os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json")
    ):
        raise OSError(f"{folder} has no config.json: give the folder of a checkpoint, or pass config=.")


class DeepseekPreTrainedModel(PreTrainedModel):
    config: DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer", "DeepseekMTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers greps the file of a model class for `ALL_ATTENTION_FUNCTIONS.get_interface(` and `@use_experts_implementation`,
    # to decide whether implementations can be switched; they stand in attention.py and moe.py
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": DeepseekAttention,
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    peft_config = NamesLoraTargets()
    name_lora_targets = name_lora_targets
    _keys_to_ignore_on_load_unexpected = [rf"layers\.\d+\.{re.escape(name)}$" for name in SHARED_MTP_WEIGHTS]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, but that "auto" is an implementation, and what is taken where none is asked for."""
        if requested_experts == "auto":
            return "auto"
        found = super().get_correct_experts_implementation(requested_experts)
        return "auto" if requested_experts is None and found == "grouped_mm" else found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekRotaryEmbedding):
            inv_freq, _ = module.rope_init_fn(module.config, device=None)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)

    def post_init(self) -> None:
        """Keeps of the parallel plans and other lists what this model has: LLM has no experts, V2-Lite no `q_b_proj`."""
        super().post_init()
        modules, parameters, buffers = self.named_modules(), self.named_parameters(), self.named_buffers()
        names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in (*modules, *parameters, *buffers)}
        self._tp_plan = {pattern: style for pattern, style in self._tp_plan.items() if pattern in names}
        self._ep_plan = {pattern: style for pattern, style in self._ep_plan.items() if pattern in names}
        fp32 = self._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = {kept for kept in fp32 if any(name.endswith(kept) for name in names)}
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}  # FSDP looks for each of them

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs
    ) -> None:
        """Behind transformers' functions that turn checkpointing on and off, whatever their version calls them.

        `gradient_checkpointing_kwargs={"mode": "selective"}` computes RMSNorms and MLA up-projections again and keeps the rest
        (DeepSeek-V3 report, section 3.2.3); "full", as without a mode, computes whole layers again.

        Raises:
            ValueError: for another mode, and for the selective one with `use_reentrant=True`.
        """
        selective, by = checkpointing_function(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, by, **kwargs)
        for layer in self.modules():
            if isinstance(layer, DeepseekDecoderLayer):
                chosen = enable and selective and layer.gradient_checkpointing
                layer.gradient_checkpointing = layer.gradient_checkpointing and not chosen
                layer.recompute = layer.self_attn.recompute = by if chosen else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As [`~transformers.PreTrainedModel.from_pretrained`]. A block-FP8 checkpoint is dequantised while it is read, or
        stays in FP8 in memory, as `fp8_weights` of the config says (or is given here)."""
        if config is None and pretrained_model_name_or_path is not None:
            require_config(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if "fp8_weights" in kwargs and isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
            config.fp8_weights = kwargs.pop("fp8_weights")
            config.validate_architecture()
        config = without_fp8(cls.config_class, pretrained_model_name_or_path, config, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Looks at the headers first: a bad file or expert is named before anything is read."""
        block_size = model.config.__dict__.pop("_fp8_block_size", None)
        kept = model.config.__dict__.pop("_fp8_quantization_config", None)
        if kept is not None:
            model.config.quantization_config = kept
        files = (
            checkpoint_files
            if state_dict is None and str((checkpoint_files or [""])[0]).endswith(".safetensors")
            else None
        )
        if block_size is not None and not files and state_dict is None:
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path} says that it is block FP8, and has no safetensors files, the only "
                "ones that are read as such: download or convert it again."
            )
        if files or state_dict is not None:
            shapes = safetensors_shapes(files) if files else {name: tuple(x.shape) for name, x in state_dict.items()}
            if files:
                check_index(files, shapes)
            scale = next((name for name in shapes if name.endswith(SCALE_SUFFIX)), None)
            if scale is not None and block_size is None and load_config.hf_quantizer is None:
                raise ValueError(
                    f"The checkpoint has block-FP8 scales ({scale}), and no quantization_config says how to read them: put "
                    f"{official_fp8_config()} into config.json, or download it again."
                )
            check_experts(model.config, len(model.base_model.layers), shapes, load_config.ignore_mismatched_sizes)
        if files and kept is not None:
            state_dict, checkpoint_files = kept_state_dict(model, files, block_size), None
        elif files and block_size is not None:
            # without the files, whose raw bytes would be taken for what is offloaded to disk
            state_dict, checkpoint_files = dequantized_state_dict(files, block_size, load_config.dtype), None
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if block_size is not None:  # experts came fused: what was not used to load is wanted to save
            used = model._weight_conversions
            model._weight_conversions = [*used, *_converters_beside(used, model)]
        return loaded

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """Names misshapen tensors in the error itself, and settles MTP layers before anything missing is initialised."""
        if not load_config.ignore_mismatched_sizes and loading_info.mismatched_keys:
            raise RuntimeError(
                f"Tensors of {load_config.pretrained_model_name_or_path} do not fit {type(model).__name__}: "
                f"{misfits(loading_info.mismatched_keys)}. Fix config.json or the checkpoint (or pass "
                "ignore_mismatched_sizes=True to initialise them anew)."
            )
        drop_absent_mtp_layers(model, model.base_model, loading_info)
        freeze_fp8(model)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def quantize_fp8(self, scale_fmt: str | None = None) -> None:
        """Puts the weights of attention, MLPs and experts into block FP8 (E4M3, 128 x 128), in place and frozen.

        What stays as it is: embedding, head, norms, routers and `eh_proj`. The model saves as an official FP8 checkpoint.

        Args:
            scale_fmt: `None` for fp32 scales (V3, R1), "ue8m0" for powers of two (V3.1).

        Raises:
            ValueError: for another `scale_fmt`.
        """
        if scale_fmt not in (None, "ue8m0"):
            raise ValueError(f"scale_fmt is None or 'ue8m0', got {scale_fmt!r}.")
        quantize_model(self, scale_fmt)
        self.config.quantization_config = official_fp8_config(scale_fmt)

    def dequantize_fp8(self) -> None:
        """Undoes FP8 in memory: plain weights in the dtype of the model, with the very values that FP8 stood for.

        Call it before adapters are merged into weights that were kept in FP8.
        """
        dequantize_model(self, self.dtype)
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, **kwargs
    ) -> None:
        """As [`~transformers.PreTrainedModel.save_pretrained`], and beside the weights: the code that loads them with
        `trust_remote_code=True`, `auto_map`, and a model card if there is none. Tensors get their official keys."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            model_type = type(self.config).model_type
            if not fp8_modules(self) and getattr(self, "hf_quantizer", None) is None:
                vars(self.config).pop("quantization_config", None)  # of the checkpoint that the config was read from
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map_for(model_type)}
            state_dict = with_shared_mtp_weights(self, self.state_dict() if state_dict is None else state_dict)
            state_dict = with_official_experts(self, state_dict)
            if is_main_process and not os.path.isfile(save_directory):
                os.makedirs(save_directory, exist_ok=True)
                replace_files(Path(save_directory), {file.name: file.read_bytes() for file in code_files()})
                write_model_card(save_directory, model_type)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Code and card are written before `save_pretrained` looks at the clock: leave them among the files to upload."""
        ours = {"README.md", *(file.name for file in code_files())}
        return {name: stamp for name, stamp in super()._get_files_timestamps(working_dir).items() if name not in ours}

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        write_model_card(working_dir, type(self.config).model_type, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _converters_beside(used: list, model: PreTrainedModel) -> list[WeightConverter]:
    """The registered converters of `model` that are not among those `used`."""
    known = [conversion.target_patterns for conversion in used]
    registered = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in registered if isinstance(each, WeightConverter) and each.target_patterns not in known]


class DeepseekV2PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV2Config


class DeepseekV3PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV3Config
