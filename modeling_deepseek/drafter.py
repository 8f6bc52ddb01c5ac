"""The MTP layers as a drafter: a chain of one-layer decoders over the main model's states (DeepSeek-V3 report, section 2.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .cache import LatentCache
from .masking import packed_causal_mask
from .ragged import RaggedRows


class _Depth:
    """One MTP layer and its cache."""

    def __init__(self, decoder: nn.Module, layer: nn.Module, rows: RaggedRows):
        self.decoder, self.layer, self.rows = decoder, layer, rows
        self.last: torch.Tensor | None = None  # `[B, 1, d]`: its last state that depends on no draft

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stands between the layer, which knows its index in the model, and a cache of this one layer."""
        return self.rows.cache.update(key_states, value_states, 0, *args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeds: torch.Tensor,
        counts: list[int],
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States for the head `[B, w, d]`; of what this appends to the cache, row r keeps `counts[r]`."""
        config, cache, width = self.decoder.config, self.rows.cache, embeds.shape[1]
        mask = packed_causal_mask(config, embeds, self.rows.mask(width), position_ids, cache)
        position_ids = self.rows.positions(width) if position_ids is None else position_ids
        states = self.layer(
            hidden_states,
            embeds,
            position_embeddings=self.decoder.rotary_emb(embeds, position_ids),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self,
            use_cache=True,
        )
        self.rows.keep(counts, width)
        return states


class MTPDrafter:
    """Proposes tokens with the chain of MTP layers; behind the last depth, its layer goes on over its own drafts.

    Depth k reads at position i the state of depth k - 1 there and token i + k. For the last k - 1 positions this token is itself
    a draft: what they leave in the cache is dropped at the end of the round, and computed again when the tokens are certain.

    Args:
        model: with `get_decoder()` and an output head.
        main: the rows of the main cache behind the prompt.
        prompt: tokens that the main model read at first; a chain is no longer than these.
        num_drafts: tokens to propose per round, at most.
    """

    def __init__(self, model: nn.Module, main: RaggedRows, prompt: int, num_drafts: int):
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        config, past = self.decoder.config, main.end - prompt
        padding = None if main.padding is None else main.padding[:, past:]
        layers = self.decoder.layers[config.num_hidden_layers :]
        self.depths = []
        for layer in layers[: min(num_drafts, prompt)]:
            cache = LatentCache() if hasattr(config, "kv_lora_rank") else DynamicCache()
            rows = RaggedRows(cache, padding, main.offsets + past - 1)
            self.depths.append(_Depth(self.decoder, layer, rows))

    def propose(
        self,
        num_drafts: int,
        hidden_states: torch.Tensor,
        embeds: torch.Tensor,
        counts: list[int],
        choose: Callable[[torch.Tensor, int], torch.Tensor],
        position_ids: torch.Tensor | None = None,
    ) -> None:
        """Calls `choose(logits [B, V], j) -> tokens [B]` for drafts j = 0, ..., num_drafts - 1 behind the certain tokens.

        Args:
            hidden_states `[B, w, d]`: of the main model, for the tokens that it read last.
            embeds `[B, w, d]`: of the tokens after each of these.
            counts: how many of the w are certain in each row.
            position_ids `[B, w]`: given with the prompt, of which the cache holds nothing yet.
        """
        prompt = position_ids is not None
        batch = torch.arange(len(counts), device=embeds.device)
        states, certain = hidden_states, []
        before = at = tokens = None
        for drafted, depth in enumerate(self.depths[:num_drafts]):
            if drafted:  # the token that this depth needs in addition is the latest draft
                embeds = nn.functional.pad(embeds, (0, 0, 0, 1))
                embeds[batch, at + 1 + (drafted - 1 if prompt else 0)] = self.decoder.embed_tokens(tokens)
                states = states if prompt else torch.cat((before, states), dim=1)
            kept = counts if prompt else [count + drafted for count in counts]
            states = depth.forward(states, embeds[:, drafted:] if prompt else embeds, kept, position_ids)
            certain.append([length - drafted for length in depth.rows.lengths])
            at = torch.tensor(kept, device=embeds.device) - 1
            before, depth.last = depth.last, states[batch, at - drafted][:, None]
            tokens = choose(self.head(states[batch, at]), drafted)
        last = states[batch, at][:, None]
        for drafted in range(len(self.depths), num_drafts):
            last = depth.forward(last, self.decoder.embed_tokens(tokens)[:, None], [1] * len(counts))
            tokens = choose(self.head(last[:, 0]), drafted)
        for depth, lengths in zip(self.depths, certain, strict=False):
            depth.rows.cut(lengths)
