"""The models: one implementation, of which the families are configurations."""

import copy
import os
import re
import shutil
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import DeepseekAttention
from .cache import LatentCache
from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .decoder import DeepseekDecoderLayer
from .hub import PREFIXES, auto_map_for, code_files, write_model_card
from .layers import DeepseekRMSNorm
from .moe import DeepseekExperts
from .mtp import SHARED_WEIGHTS, DeepseekMTPLayer, mtp_targets
from .rope import DeepseekRotaryEmbedding
from .router import DeepseekTopkRouter

logger = logging.get_logger(__name__)

# Per-expert checkpoint keys fuse on load and split on save, as for the native classes of the same model_type.
for _model_type in PREFIXES:
    register_checkpoint_conversion_mapping(_model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds to the fields of [`~transformers.modeling_outputs.MoeCausalLMOutputWithPast`]:

    lm_loss (scalar): next-token loss, the part of `loss` without MTP.
    mtp_loss (tuple of scalars): one loss per MTP depth.
    mtp_logits (tuple of `[B, T - k, V]`): logits of depth k = 1, 2, ...; row i predicts token i + k + 1.
    """

    lm_loss: torch.Tensor | None = None
    mtp_loss: tuple[torch.Tensor, ...] | None = None
    mtp_logits: tuple[torch.Tensor, ...] | None = None


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
    # transformers looks for these switches in the source of this file; ours stand in attention.py and moe.py
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": DeepseekAttention,
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _keys_to_ignore_on_load_unexpected = [rf"layers\.\d+\.{re.escape(name)}$" for name in SHARED_WEIGHTS]

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

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """Names misshapen tensors in the error itself, and settles MTP layers before anything missing is initialised."""
        if not load_config.ignore_mismatched_sizes and loading_info.mismatched_keys:
            misfits = "; ".join(
                f"{name}: {tuple(found)} in the checkpoint, {tuple(expected)} by the config"
                for name, found, expected in sorted(loading_info.mismatched_keys)
            )
            raise RuntimeError(
                f"Tensors of {load_config.pretrained_model_name_or_path} do not fit {type(model).__name__}: {misfits}. "
                "Fix config.json or the checkpoint (or pass ignore_mismatched_sizes=True to initialise them anew)."
            )
        drop_absent_mtp_layers(model, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, **kwargs
    ) -> None:
        """As [`~transformers.PreTrainedModel.save_pretrained`], and beside the weights: the code that loads them with
        `trust_remote_code=True`, `auto_map`, and a model card if there is none. Tensors get their official keys."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = with_shared_mtp_weights(self, self.state_dict() if state_dict is None else state_dict)
        model_type = type(self.config).model_type
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map_for(model_type)}
        if is_main_process and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            for file in code_files():
                if file.parent.resolve() != os.path.realpath(save_directory):
                    shutil.copyfile(file, os.path.join(save_directory, file.name))
            write_model_card(save_directory, model_type)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Code and card are written before `save_pretrained` looks at the clock: leave them among the files to upload."""
        ours = {"README.md", *(file.name for file in code_files())}
        return {name: stamp for name, stamp in super()._get_files_timestamps(working_dir).items() if name not in ours}

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        write_model_card(working_dir, type(self.config).model_type, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder. `layers` holds the `num_hidden_layers` main blocks and, behind them, the MTP blocks."""

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        config.validate_architecture()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        main, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, index) for index in range(main)]
            + [DeepseekMTPLayer(config, index) for index in range(main, main + mtp)]
        )
        self.norm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Arguments as in every decoder of transformers; `last_hidden_state` `[B, S, d]` is behind the final norm."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, int):
            self._warn_beyond_positions(past + inputs_embeds.shape[1])

        causal_mask = self._causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values, past)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def mtp_hidden_states(
        self,
        last_hidden_state: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> list[torch.Tensor]:
        """What the output head reads at every MTP depth k = 1, 2, ...: `[B, T - k, d]` (DeepSeek-V3 report, equations 21-23).

        Args:
            last_hidden_state `[B, T, d]`: of the main model, behind its final norm.
            inputs_embeds `[B, T, d]`: embeddings of the same T tokens.
            attention_mask, position_ids: as given to `forward`, without a cache.
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        depths, hidden_states = [], last_hidden_state
        for depth, layer in enumerate(self.layers[self.config.num_hidden_layers :], start=1):
            hidden_states, embeds = hidden_states[:, :-1], inputs_embeds[:, depth:]
            length = embeds.shape[1]
            if length == 0:
                break
            mask = attention_mask
            if mask is not None:
                mask = mask[..., :length, :length] if mask.ndim == 4 else mask[:, :length]
            hidden_states = layer(
                hidden_states,
                inputs_embeds=embeds,
                position_embeddings=self.rotary_emb(embeds, position_ids[:, :length]),
                attention_mask=self._causal_mask(embeds, mask, position_ids[:, :length], None, 0),
                position_ids=position_ids[:, :length],
                **kwargs,
            )
            depths.append(hidden_states)
        return depths

    def _causal_mask(self, inputs_embeds, attention_mask, position_ids, past_key_values, past):
        """transformers' causal mask; packed rows are told apart also while a cache is being filled, unlike there.

        Positions that restart begin a new document, which sees nothing before it. As in transformers this is looked for only
        without an `attention_mask`.
        """
        documents = None
        if position_ids is not None and attention_mask is None and past_key_values is not None:
            starts = document_starts(position_ids.expand(inputs_embeds.shape[0], -1), past)
            if starts is not None:

                def documents(batch_idx, head_idx, q_idx, kv_idx):
                    return kv_idx >= starts[batch_idx, q_idx - past]

        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=documents,
        )

    def _warn_beyond_positions(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            logger.warning_once(
                f"The sequence has {length} tokens and the model was made for max_position_embeddings="
                f"{self.config.max_position_embeddings}: what it says beyond is unreliable."
            )


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, and the MTP loss of its extra layers in training."""

    _model_class = DeepseekModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_mtp_logits: bool = False,
        **kwargs,
    ) -> DeepseekCausalLMOutput:
        """Arguments as in every causal model of transformers, and `output_mtp_logits`.

        In training mode with `labels`, `loss = lm_loss + mtp_loss_weight / D * sum(mtp_loss)` over D MTP layers (DeepSeek-V3
        report, equation 25); in eval mode `loss` is the next-token loss alone.
        """
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep, :])

        loss = lm_loss = mtp_loss = mtp_logits = None
        if labels is not None:
            loss = lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        weight = self.config.mtp_loss_weight if self.training and labels is not None else 0
        if self.config.num_nextn_predict_layers and (weight or output_mtp_logits):
            embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            depths = self.model.mtp_hidden_states(hidden_states, embeds, attention_mask, position_ids)
            mtp_logits = tuple(map(self.lm_head, depths))
            if weight and mtp_logits:
                mtp_loss = self._mtp_loss(mtp_logits, labels, attention_mask, position_ids, **kwargs)
                loss = lm_loss + weight / self.config.num_nextn_predict_layers * sum(mtp_loss)

        return DeepseekCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=lm_loss,
            mtp_loss=mtp_loss,
            mtp_logits=mtp_logits if output_mtp_logits else None,
        )

    def _mtp_loss(self, mtp_logits, labels, attention_mask, position_ids, **kwargs) -> tuple[torch.Tensor, ...]:
        packed = None
        if position_ids is not None and attention_mask is None:
            packed = find_packed_sequence_indices(position_ids.expand(labels.shape[0], -1))
        losses = []
        for depth, logits in enumerate(mtp_logits, start=1):
            targets = mtp_targets(labels, depth, packed)
            losses.append(
                self.loss_function(
                    logits=logits, labels=None, vocab_size=self.config.vocab_size, shift_labels=targets, **kwargs
                )
            )
        return tuple(losses)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """`generate` of an MLA model makes a `LatentCache` where transformers would make a `DynamicCache`."""
        kind = generation_config.cache_implementation
        ours = hasattr(self.config, "kv_lora_rank") and kind in (None, "dynamic", "offloaded")
        if ours and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LatentCache(self.config, offloading=kind == "offloaded")
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class _TaskHead:
    """Builds transformers' generic heads over our decoder, without the MTP layers that only a causal model uses."""

    _model_class = DeepseekModel

    def __init__(self, config: DeepseekConfig):
        if config.num_nextn_predict_layers:
            config = copy.deepcopy(config)
            config.num_nextn_predict_layers = 0
        DeepseekPreTrainedModel.__init__(self, config)
        self.model = self._model_class(config)
        self.num_labels = config.num_labels


class DeepseekForSequenceClassification(_TaskHead, GenericForSequenceClassification, DeepseekPreTrainedModel):
    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(_TaskHead, GenericForTokenClassification, DeepseekPreTrainedModel):
    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class DeepseekForQuestionAnswering(_TaskHead, GenericForQuestionAnswering, DeepseekPreTrainedModel):
    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


class DeepseekV2PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV2Config


class DeepseekV2Model(DeepseekV2PreTrainedModel, DeepseekModel):
    pass


class DeepseekV2ForCausalLM(DeepseekV2PreTrainedModel, DeepseekForCausalLM):
    _model_class = DeepseekV2Model


class DeepseekV2ForSequenceClassification(DeepseekV2PreTrainedModel, DeepseekForSequenceClassification):
    _model_class = DeepseekV2Model


class DeepseekV2ForTokenClassification(DeepseekV2PreTrainedModel, DeepseekForTokenClassification):
    _model_class = DeepseekV2Model


class DeepseekV2ForQuestionAnswering(DeepseekV2PreTrainedModel, DeepseekForQuestionAnswering):
    _model_class = DeepseekV2Model


class DeepseekV3PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV3Config


class DeepseekV3Model(DeepseekV3PreTrainedModel, DeepseekModel):
    pass


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, DeepseekForCausalLM):
    _model_class = DeepseekV3Model


class DeepseekV3ForSequenceClassification(DeepseekV3PreTrainedModel, DeepseekForSequenceClassification):
    _model_class = DeepseekV3Model


class DeepseekV3ForTokenClassification(DeepseekV3PreTrainedModel, DeepseekForTokenClassification):
    _model_class = DeepseekV3Model


class DeepseekV3ForQuestionAnswering(DeepseekV3PreTrainedModel, DeepseekForQuestionAnswering):
    _model_class = DeepseekV3Model


def new_cache(config: DeepseekConfig) -> Cache:
    """An empty cache of the kind that `config` calls for."""
    return LatentCache(config) if hasattr(config, "kv_lora_rank") else DynamicCache(config=config)


def document_starts(position_ids: torch.Tensor, past: int | torch.Tensor) -> torch.Tensor | None:
    """First key that each query of packed rows may see, `[B, S]`, or `None` when no row holds more than one document.

    A token whose position does not follow its predecessor's starts a document at its own slot; the row's first tokens belong to
    the document that started `position` slots before them.
    """
    length = position_ids.shape[1]
    slots = torch.arange(length, device=position_ids.device) + past
    restarts = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1
    first = (past - position_ids[:, :1]).clamp(min=0) if not isinstance(past, int) or past else slots[:1] * 0
    starts = torch.where(restarts, slots, 0).cummax(dim=-1).values
    starts = torch.maximum(starts, first.expand(position_ids.shape[0], 1))
    if not torch.compiler.is_compiling() and not (starts > 0).any():
        return None
    return starts


def drop_absent_mtp_layers(model: PreTrainedModel, loading_info) -> None:
    """Turns off MTP layers that the config claims and the checkpoint lacks, with one warning: never random weights.

    Keys of MTP layers that the checkpoint holds and the config turned off are not reported as unexpected.
    """
    decoder = getattr(model, model.base_model_prefix, model)
    main = model.config.num_hidden_layers
    layer_of = re.compile(r"(?:^|\.)layers\.(\d+)\.")

    def index(key: str) -> int:
        found = layer_of.search(key)
        return int(found.group(1)) if found else -1

    absent = sorted(key for key in loading_info.missing_keys if index(key) >= main)
    if absent:
        kept = min(map(index, absent)) - main
        logger.warning(
            f"config.num_nextn_predict_layers is {model.config.num_nextn_predict_layers}, but the checkpoint lacks "
            f"{len(absent)} tensors of its MTP layers ({absent[0]}, ...): loaded with {kept}."
        )
        del decoder.layers[main + kept :]
        model.config.num_nextn_predict_layers = decoder.config.num_nextn_predict_layers = kept
        loading_info.missing_keys = {key for key in loading_info.missing_keys if index(key) < main + kept}
    dropped = {index(key) for key in loading_info.unexpected_keys if key.endswith(".eh_proj.weight")}
    loading_info.unexpected_keys = {
        key for key in loading_info.unexpected_keys if index(key) < main or index(key) not in dropped
    }


def with_shared_mtp_weights(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` plus the copies of embedding and head that every MTP layer has on disk."""
    decoder = getattr(model, model.base_model_prefix, model)
    prefix = f"{model.base_model_prefix}." if decoder is not model else ""
    sources = {"embed_tokens": f"{prefix}embed_tokens.weight", "lm_head": "lm_head.weight"}
    if model.config.tie_word_embeddings:
        sources["lm_head"] = sources["embed_tokens"]
    state_dict = dict(state_dict)
    main = model.config.num_hidden_layers
    for layer in range(main, main + model.config.num_nextn_predict_layers):
        for name, source in SHARED_WEIGHTS.items():
            weight = state_dict.get(sources[source])
            if weight is not None and weight.device.type != "meta":
                state_dict[f"{prefix}layers.{layer}.{name}"] = weight.clone()
    return state_dict


__all__ = [
    "DeepseekForCausalLM",
    "DeepseekForQuestionAnswering",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForQuestionAnswering",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV2PreTrainedModel",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForQuestionAnswering",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
]
