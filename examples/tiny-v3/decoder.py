"""One residual block: attention, then a dense MLP or a mixture of experts."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import DeepseekLatentAttention, DeepseekMultiHeadAttention
from .balance import Routing
from .layers import DeepseekMLP, DeepseekRMSNorm
from .moe import DeepseekMoE
from .recompute import recomputed


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: `[B, S, d] -> [B, S, d]`."""

    recompute: Callable | None = None  # in training, the checkpointing function of the parts that are computed again

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        latent = hasattr(config, "kv_lora_rank")
        self.self_attn = (DeepseekLatentAttention if latent else DeepseekMultiHeadAttention)(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = DeepseekMoE(config)
        else:
            self.mlp = DeepseekMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        routing: Routing | None = None,
        **kwargs,
    ) -> torch.Tensor:
        by = self.recompute if self.training else None
        with recomputed(by, self.input_layernorm, hidden_states) as normed:
            attended, _ = self.self_attn(
                normed,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states = hidden_states + attended
        with recomputed(by, self.post_attention_layernorm, hidden_states) as normed:
            mlp = self.mlp
            return hidden_states + (mlp(normed, routing) if isinstance(mlp, DeepseekMoE) else mlp(normed))
