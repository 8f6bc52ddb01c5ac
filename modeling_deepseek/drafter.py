"""The MTP layers as a drafter: a chain of one-layer decoders over the main model's states (DeepSeek-V3 report, section 2.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .cache import LatentCache
from .masking import packed_causal_mask
from .ragged import RaggedRows

Choose = Callable[[torch.Tensor, int], torch.Tensor]


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
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States for the head `[B, w, d]`; of what this appends to the cache, row r keeps `counts[r]`.

        Positions and mask are those behind the rows, unless they are given (with the prompt).
        """
        config, width = self.decoder.config, embeds.shape[1]
        if position_ids is None:
            position_ids, attention_mask = self.rows.positions(width), self.rows.mask(width)
        states = self.layer(
            hidden_states,
            embeds,
            position_embeddings=self.decoder.rotary_emb(embeds, position_ids),
            attention_mask=packed_causal_mask(config, embeds, attention_mask, position_ids, self.rows.cache),
            position_ids=position_ids,
            past_key_values=self,
            use_cache=True,
        )
        self.rows.keep(counts, width)
        return states

    def read(
        self,
        hidden_states: torch.Tensor,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        chunk_size: int | None,
    ) -> torch.Tensor:
        """`forward` over the prompt `[B, S, d]`, `chunk_size` tokens at a time."""
        parts, size = [], chunk_size or embeds.shape[1]
        pieces = zip(hidden_states.split(size, 1), embeds.split(size, 1), position_ids.split(size, 1), strict=True)
        for states, following, places in pieces:
            width, end = following.shape[1], self.rows.end + following.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :end]
            parts.append(self.forward(states, following, [width] * len(states), places, mask))
        return torch.cat(parts, dim=1)


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
        self.padding = None if main.padding is None else main.padding[:, past:]
        layers = self.decoder.layers[config.num_hidden_layers :]
        self.depths = []
        for layer in layers[: min(num_drafts, prompt)]:
            cache = LatentCache() if hasattr(config, "kv_lora_rank") else DynamicCache()
            rows = RaggedRows(cache, self.padding, main.offsets + past - 1)
            self.depths.append(_Depth(self.decoder, layer, rows))

    def read_prompt(
        self,
        num_drafts: int,
        hidden_states: torch.Tensor,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        choose: Choose,
        chunk_size: int | None = None,
    ) -> None:
        """The first round: every depth reads the prompt, which no cache of theirs holds yet.

        Args:
            hidden_states `[B, S, d]`: of the main model, for the prompt.
            embeds `[B, S, d]`: of the tokens after each of its tokens.
            position_ids `[B, S]`: of the prompt.
            choose: as for `propose`.
            chunk_size: tokens that a layer reads at a time.
        """
        states, certain, tokens, length = hidden_states, [], None, embeds.shape[1]
        for drafted, depth in enumerate(self.depths[:num_drafts]):
            if drafted:  # the token that this depth needs in addition is the latest draft
                embeds = torch.cat((embeds[:, 1:], self.decoder.embed_tokens(tokens)[:, None]), dim=1)
            states = depth.read(states, embeds, position_ids, self.padding, chunk_size)
            certain.append([length - drafted] * len(states))
            depth.last = states[:, length - 1 - drafted, None]
            tokens = choose(self.head(states[:, -1]), drafted)
        self._go_on(num_drafts, states[:, -1:], tokens, certain, choose)

    def propose(
        self, num_drafts: int, hidden_states: torch.Tensor, embeds: torch.Tensor, counts: list[int], choose: Choose
    ) -> None:
        """Calls `choose(logits [B, V], j) -> tokens [B]` for drafts j = 0, ..., num_drafts - 1 behind the certain tokens.

        Args:
            num_drafts: no more than in the round before.
            hidden_states `[B, w, d]`: of the main model, for the tokens that it read last.
            embeds `[B, w, d]`: of the tokens after each of these.
            counts: how many of the w are certain in each row.
        """
        states, certain = hidden_states, []
        before = kept = tokens = None
        for drafted, depth in enumerate(self.depths[:num_drafts]):
            if drafted:
                embeds = nn.functional.pad(embeds, (0, 0, 0, 1))
                device = embeds.device  # of a model on several GPUs each part has its own
                rows, places = torch.arange(len(kept), device=device), torch.tensor(kept, device=device)
                embeds[rows, places] = self.decoder.embed_tokens(tokens)
                states = torch.cat((before, states), dim=1)
            kept = [count + drafted for count in counts]
            states = depth.forward(states, embeds, kept)
            certain.append([length - drafted for length in depth.rows.lengths])
            batch, at = torch.arange(len(kept), device=states.device), torch.tensor(kept, device=states.device) - 1
            before, depth.last = depth.last, states[batch, at - drafted][:, None]
            tokens = choose(self.head(states[batch, at]), drafted)
        self._go_on(num_drafts, states[batch, at][:, None], tokens, certain, choose)

    def _go_on(
        self, num_drafts: int, last: torch.Tensor, tokens: torch.Tensor, certain: list[list[int]], choose: Choose
    ) -> None:
        """Drafts behind the last depth, of its state `last` `[B, 1, d]`; then no cache keeps more than its `certain` tokens."""
        for drafted in range(len(self.depths), num_drafts):
            last = self.depths[-1].forward(last, self.decoder.embed_tokens(tokens)[:, None], [1] * len(last))
            tokens = choose(self.head(last[:, 0]), drafted)
        for depth, lengths in zip(self.depths, certain, strict=False):
            depth.rows.cut(lengths)
