"""The models: one implementation, of which the families are configurations.

Experts follow `@use_experts_implementation` (moe.py), attention follows transformers' attention interface (attention.py).
"""

import copy
import functools
import inspect
import itertools
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import for_all_heads
from .balance import Routing
from .cache import LatentCache
from .configuration_deepseek import DeepseekConfig
from .decoder import DeepseekDecoderLayer
from .layers import DeepseekRMSNorm, linear
from .masking import packed_causal_mask
from .mtp import DeepseekMTPLayer
from .objective import TrainingObjectiveMixin
from .paged import ContinuousBatchingMixin, PagedLatents
from .pretrained import DeepseekPreTrainedModel, DeepseekV2PreTrainedModel, DeepseekV3PreTrainedModel
from .rope import DeepseekRotaryEmbedding
from .speculative import MTPGenerationMixin

logger = logging.get_logger(__name__)


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds to the fields of [`~transformers.modeling_outputs.MoeCausalLMOutputWithPast`]:

    lm_loss (scalar): next-token loss, the part of `loss` without MTP.
    mtp_loss (tuple of scalars): one loss per MTP depth.
    mtp_logits (tuple of `[B, T - k, V]`): logits of depth k = 1, 2, ...; row i predicts token i + k + 1.
    aux_loss (scalar): in training, the balance losses with their factors, summed over all MoE layers.
    """

    lm_loss: torch.Tensor | None = None
    mtp_loss: tuple[torch.Tensor, ...] | None = None
    mtp_logits: tuple[torch.Tensor, ...] | None = None


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder. `layers` holds the `num_hidden_layers` main blocks and, behind them, the MTP blocks."""

    def __init__(self, config: DeepseekConfig):
        if not hasattr(config, "is_moe_layer"):  # not by class: remote code has a copy of it
            raise ValueError(
                f"{type(self).__name__} was given a {type(config).__module__}.{type(config).__name__}: build the config with the "
                f"{type(self).config_class.__name__} of this package."
            )
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
        under_head: bool = False,
        routing: Routing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Arguments as in every decoder of transformers; `last_hidden_state` `[B, S, d]` is behind the final norm.

        `under_head`: the caller is a causal model, which sees to the MTP layers and balance losses itself, for which it may
        give the `routing` of this pass.
        """
        if not under_head and self._leaves_losses_out():
            logger.warning_once(
                "This forward in training mode ends at the decoder, as in TRL's trainers: MTP layers are not trained and balance "
                "losses not added, as forward(labels=...) of the causal model does. For SFTTrainer, training.ModelLossMixin of "
                "modeling_deepseek does the same; config.mtp_loss_weight = 0 and balance factors of 0 say that this is meant."
            )
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if hasattr(past_key_values, "check_layers"):
            past_key_values.check_layers(self.config.num_hidden_layers)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, int):
            self._warn_beyond_positions(past + inputs_embeds.shape[1], position_ids)

        if "cache" in kwargs and hasattr(self.config, "kv_lora_rank"):  # continuous batching
            kwargs, causal_mask = {"paged": PagedLatents(self.config, **kwargs)}, None
        else:
            causal_mask = packed_causal_mask(self.config, inputs_embeds, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        hidden_states = inputs_embeds
        position_embeddings = for_all_heads(self.rotary_emb(hidden_states, position_ids))
        for layer in itertools.islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                routing=routing,
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

        A text of no more than k tokens has no state at depth k: `[B, 0, d]`.

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
            length, mask = embeds.shape[1], attention_mask
            if length == 0:  # every depth takes part in every step: ranks wait for the gradients of all parameters
                hidden_states, embeds, mask = last_hidden_state[:, :1], inputs_embeds[:, :1], None
            width = embeds.shape[1]
            if mask is not None:
                mask = mask[..., :width, :width] if mask.ndim == 4 else mask[:, :width]
            hidden_states = layer(
                hidden_states,
                embeds,  # not by name, which reentrant checkpointing would not differentiate
                position_embeddings=self.rotary_emb(embeds, position_ids[:, :width]),
                attention_mask=packed_causal_mask(self.config, embeds, mask, position_ids[:, :width], None),
                position_ids=position_ids[:, :width],
                **kwargs,
            )[:, :length]
            depths.append(hidden_states)
        return depths

    def _leaves_losses_out(self) -> bool:
        """Whether a loss that is made of `last_hidden_state` alone lacks what the config asks for."""
        balance = self.training and torch.is_grad_enabled() and any(self.config.balance_factors)
        return balance or self._mtp_is_left_untrained()

    def _mtp_is_left_untrained(self) -> bool:
        """Whether a forward in training mode without labels passes over MTP layers that are meant to learn."""
        if not (self.training and torch.is_grad_enabled() and self.config.mtp_loss_weight):
            return False
        layers = self.layers[self.config.num_hidden_layers :]
        return any(parameter.requires_grad for layer in layers for parameter in layer.parameters())

    def _warn_beyond_positions(self, length: int, position_ids: torch.Tensor | None) -> None:
        limit = self.config.max_position_embeddings
        if length > limit and (position_ids is None or position_ids.max() >= limit):
            logger.warning_once(
                f"The sequence is longer than max_position_embeddings={limit}, which the model was made for: what it says beyond "
                "is unreliable."
            )


class DeepseekForCausalLM(TrainingObjectiveMixin, DeepseekPreTrainedModel, ContinuousBatchingMixin, MTPGenerationMixin):
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekCausalLMOutput:
        """Arguments as in every causal model of transformers, and `output_mtp_logits`.

        In training mode with `labels`, `loss = lm_loss + mtp_loss_weight / D * sum(mtp_loss)` over D MTP layers (DeepSeek-V3
        report, equation 25); in eval mode `loss` is the next-token loss alone, and `mtp_loss` is there with `output_mtp_logits`.

        Raises:
            ValueError: for the MTP depths behind a cache that holds tokens: they would not see these.
        """
        weight = self.config.mtp_loss_weight if self.training and labels is not None else 0
        mtp = self.config.num_nextn_predict_layers > 0 and (weight > 0 or output_mtp_logits)
        if labels is None and self.model._leaves_losses_out():
            logger.warning_once(
                "The MTP layers are trained by forward(labels=...), and this forward in training mode has none, as under Trainer's "
                "label_smoothing_factor and compute_loss_func: they stay as they are, and no balance loss is added. "
                "config.mtp_loss_weight = 0 and balance factors of 0 say that this is meant."
            )
        if mtp and past_key_values is not None and int(past_key_values.get_seq_length()):
            raise ValueError(
                f"The MTP layers have no cache here, and past_key_values holds {int(past_key_values.get_seq_length())} tokens that "
                "they would not see: pass the whole text without a cache, or drop output_mtp_logits (in training: set "
                "config.mtp_loss_weight = 0)."
            )
        like = input_ids if inputs_embeds is None else inputs_embeds
        routing = self.shared_routing(like, attention_mask, position_ids, past_key_values)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            under_head=True,
            routing=routing,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = kept_states(hidden_states, logits_to_keep)
        in_pieces = self.training and labels is not None and not self.config.training_logits
        logits = None if in_pieces else linear(self.lm_head, kept)

        loss = lm_loss = mtp_loss = mtp_logits = aux_loss = None
        if labels is not None:
            loss = lm_loss = self._lm_loss(kept, logits, labels, **kwargs)
        if mtp:
            embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            depths = self.model.mtp_hidden_states(hidden_states, embeds, attention_mask, position_ids, routing=routing)
            if output_mtp_logits:
                mtp_logits = tuple(linear(self.lm_head, states) for states in depths)
            if labels is not None:
                mtp_loss = self._mtp_loss(depths, mtp_logits, labels, attention_mask, position_ids, **kwargs)
            if weight:
                loss = lm_loss + weight / self.config.num_nextn_predict_layers * sum(mtp_loss)
        if routing is not None:
            loss, aux_loss = self.with_balance_loss(loss, routing, labels, **kwargs)

        return DeepseekCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=lm_loss,
            mtp_loss=mtp_loss,
            mtp_logits=mtp_logits,
            aux_loss=aux_loss,
        )

    def add_mtp_layers(self, num_layers: int = 1) -> None:
        """Appends `num_layers` freshly initialised MTP layers to a model that was trained without them, or with fewer.

        To train these alone: `model.requires_grad_(False)`, then `model.model.layers[-num_layers:].requires_grad_(True)`.

        Raises:
            ValueError: when `num_layers` is no positive number.
        """
        if type(num_layers) is not int or num_layers < 1:
            raise ValueError(f"num_layers is the number of MTP layers to add, at least 1, got {num_layers!r}.")
        layers = self.model.layers
        like, neighbour = (
            self.model.norm.weight,
            vars(layers[-1]),
        )  # weights that are kept in FP8 are no model for new ones
        for _ in range(num_layers):
            layer = DeepseekMTPLayer(self.config, len(layers)).to(like.device, like.dtype).train(self.training)
            layer.apply(self._init_weights)
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func", "recompute"):
                if name in neighbour:
                    setattr(layer, name, neighbour[name])
            layer.self_attn.recompute = layer.recompute
            layers.append(layer)
        for model in (self, self.model):
            model._no_split_modules.add(DeepseekMTPLayer.__name__)
        self.config.num_nextn_predict_layers += num_layers

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> torch.Tensor | None:
        """The mask that `generate` makes in advance for a static cache."""
        return packed_causal_mask(config, inputs_embeds, attention_mask, position_ids, past_key_values)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """`generate` of an MLA model makes a `LatentCache` where transformers would make a `DynamicCache`.

        So it does for `cache_implementation="quantized"` with `cache_config={"nbits": 8}` or 6, which transformers' default
        backend does not have; any other backend is named.
        """
        kind, options = generation_config.cache_implementation, generation_config.cache_config or {}
        bits = options.get("nbits") if kind == "quantized" and set(options) == {"nbits"} else None
        ours = hasattr(self.config, "kv_lora_rank") and (kind in (None, "dynamic", "offloaded") or bits in (6, 8))
        if ours and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LatentCache(self.config, bits=bits, offloading=kind == "offloaded")
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _with_evaluated_signature(forward):
    """`forward` as it is; its annotations, strings in transformers' generic heads, tell which outputs it can be asked for."""

    @functools.wraps(forward)
    def evaluated(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    evaluated.__signature__ = inspect.signature(forward, eval_str=True)
    return evaluated


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
    forward = _with_evaluated_signature(GenericForSequenceClassification.forward)

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(_TaskHead, GenericForTokenClassification, DeepseekPreTrainedModel):
    forward = _with_evaluated_signature(GenericForTokenClassification.forward)

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class DeepseekForQuestionAnswering(_TaskHead, GenericForQuestionAnswering, DeepseekPreTrainedModel):
    forward = _with_evaluated_signature(GenericForQuestionAnswering.forward)

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


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


def kept_states(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states `[B, S, d]` to compute logits of.

    `logits_to_keep`: the last so many (0: all), or a tensor: indices for all rows `[K]` or for each row `[B, K]`, or a boolean
    mask `[B, S]`, which gives `[kept, d]`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool and logits_to_keep.ndim == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)
    return hidden_states[:, logits_to_keep]


def new_cache(config: DeepseekConfig) -> Cache:
    """An empty cache of the kind that `config` calls for."""
    return LatentCache(config) if hasattr(config, "kv_lora_rank") else DynamicCache(config=config)


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
