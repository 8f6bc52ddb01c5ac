"""Multi-token prediction: the extra block, the shift of its depth, and its targets (DeepSeek-V3 report, section 2.2)."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from .checkpoint import SHARED_MTP_WEIGHTS
from .decoder import DeepseekDecoderLayer
from .layers import DeepseekRMSNorm, linear
from .recompute import recomputed


class DeepseekSharedHead(nn.Module):
    """The norm in front of the output head that all depths share."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)


class DeepseekMTPLayer(DeepseekDecoderLayer):
    """A decoder block over `eh_proj([enorm(embedding of the next token) ; hnorm(hidden state)])`, then the head's norm.

    The report's equation 21 writes the hidden state first; every checkpoint has the embedding first.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp.gate.depth = layer_idx - config.num_hidden_layers + 1
        self.enorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekSharedHead(config)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """`load_state_dict` passes over the copies of embedding and head that a checkpoint has here."""
        for name in SHARED_MTP_WEIGHTS:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        """`hidden_states` and the embeddings of the tokens after them, both `[B, S, d]` -> input of the output head `[B, S, d]`."""
        with recomputed(self.recompute if self.training else None, self.pair, hidden_states, inputs_embeds) as pair:
            merged = linear(self.eh_proj, pair)
        return self.shared_head(super().forward(merged, **kwargs))

    def pair(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """What `eh_proj` reads, `[B, S, 2d]`."""
        return torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)


def mtp_targets(labels: torch.Tensor, depth: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Targets `[B, T - depth]` of depth `depth` (1, 2, ...): the token `depth + 1` places after each hidden state, else -100.

    Args:
        labels `[B, T]`: unshifted, -100 where nothing is to be predicted.
        documents `[B, T]`: for packed rows, an id per token: a target in another document is ignored.
    """
    shift = depth + 1
    targets = torch.full_like(labels[:, depth:], -100)
    reached = labels[:, shift:]
    if documents is not None:
        reached = reached.masked_fill(documents[:, shift:] != documents[:, : documents.shape[1] - shift], -100)
    targets[:, : reached.shape[1]] = reached
    return targets
