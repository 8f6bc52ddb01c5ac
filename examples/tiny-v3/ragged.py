"""A batch whose rows grow by different numbers of tokens, as speculative decoding makes them: the cache and the text."""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer, StaticLayer
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class RaggedRows:
    """Keeps row r's tokens in its first `lengths[r]` slots, while every forward appends to all rows at the same slot.

    What is appended begins behind the longest row, so that shorter rows have a hole in front of it: `mask` hides it from
    attention and `keep` closes it by moving the few tokens that stay.

    Args:
        cache: with any contents, alike in all rows.
        padding `[B, P]`: 0 for slots that hold no token (left padding), or `None`. Without it a row's last token belongs to the
            document that began as many slots before as its position says, and sees none of an earlier one.
        last_positions `[B]`: position of each row's last token; -1 for an empty cache.

    Raises:
        ValueError: for padding that is wider or narrower than a cache that holds tokens.
    """

    def __init__(self, cache: Cache, padding: torch.Tensor | None, last_positions: torch.Tensor):
        self.cache = cache
        self.end = int(cache.get_seq_length())  # slots in use: the longest row's
        self.lengths = [self.end] * len(last_positions)
        if padding is not None and self.end and padding.shape[1] != self.end:
            raise ValueError(
                f"The attention_mask is {padding.shape[1]} wide and the cache holds {self.end} tokens, so that it is unknown which "
                "of them are padding: pass one as wide as the tokens, or drop use_mtp."
            )
        self.padding = padding.bool() if padding is not None and not padding.all() else None
        self.offsets = last_positions + 1 - self.end  # from slots to positions
        self.packed = self.padding is None and bool((self.offsets < 0).any())

    def positions(self, width: int) -> torch.Tensor:
        """`position_ids` `[B, width]` of the next tokens of every row."""
        starts = torch.tensor(self.lengths, device=self.offsets.device) + self.offsets
        return starts[:, None] + torch.arange(width, device=starts.device)

    def mask(self, width: int) -> torch.Tensor | None:
        """Attention mask `[B, end + width]` for `width` new tokens; `None` where every slot holds a token."""
        if self.padding is None and not self.packed and min(self.lengths) == self.end:
            return None
        device = self.offsets.device
        slots, lengths = torch.arange(self.end + width, device=device), torch.tensor(self.lengths, device=device)
        seen = (slots < lengths[:, None]) | (slots >= self.end)
        if self.padding is not None:
            seen[:, : self.padding.shape[1]] &= self.padding
        if self.packed:
            seen &= slots >= -self.offsets[:, None]
        return seen.long()

    def keep(self, counts: list[int], width: int) -> None:
        """Of the `width` tokens just appended, row r keeps the first `counts[r]`; the rest is dropped."""
        start, before = self.end, self.lengths
        self.lengths = [length + count for length, count in zip(before, counts, strict=True)]
        if min(before) < start:
            first = torch.tensor(before, device=self.offsets.device)
            slots = first[:, None, None, None] + torch.arange(width, device=first.device)[:, None]
            for layer in self.cache.layers:
                for states in layer.stored if hasattr(layer, "stored") else (layer.keys, layer.values):
                    index = slots.to(states.device).expand(-1, states.shape[1], -1, states.shape[3])
                    states.scatter_(2, index, states.narrow(2, start, width).clone())
        self._cut(start + width)

    def cut(self, lengths: list[int]) -> None:
        """Shortens row r to `lengths[r]` tokens."""
        held = self.end
        self.lengths = list(map(min, self.lengths, lengths))
        self._cut(held)

    def _cut(self, held: int) -> None:
        self.end = max(self.lengths)
        if held == self.end:
            return
        for layer in self.cache.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(self.end)
            else:
                layer.crop(self.end - held)


def check_can_shrink(cache: Cache) -> None:
    """Raises `ValueError` unless tokens can be dropped from the end of `cache` and moved within it."""
    replicated = [] if cache.layer_class_to_replicate is None else [cache.layer_class_to_replicate]
    for kind in {*map(type, cache.layers), *replicated}:
        if not issubclass(kind, (DynamicLayer, StaticLayer)) or issubclass(kind, QuantizedLayer) or kind.is_sliding:
            raise ValueError(
                f"use_mtp=True must drop rejected tokens from the cache, which {kind.__name__} cannot: use the default cache, "
                "a LatentCache or cache_implementation='static', or drop use_mtp."
            )


class Sequences:
    """Token ids of which row r has `lengths[r]`; they stop, are padded and streamed as `generate` does it.

    With an end-of-sequence criterion a row stops where it meets any criterion; without one, all rows go on until the last of
    them has met one. Criteria see all rows at the length of those in question, others padded.

    Args:
        input_ids `[B, S]`: the prompt.
        criteria: of `generate`; one of them is met at `max_length`.
        pad: padding token, behind rows that stopped early.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        criteria: StoppingCriteriaList,
        max_length: int,
        pad: torch.Tensor | None = None,
        streamer: BaseStreamer | None = None,
    ):
        batch, prompt = input_ids.shape
        self.ids = input_ids.long()
        self.rows = torch.arange(batch, device=self.ids.device)[:, None]
        self.lengths, self.prompt, self.max_length = [prompt] * batch, prompt, max_length
        self.criteria, self.pad, self.streamer, self.streamed = criteria, pad, streamer, prompt
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.met: list[int | None] = [None] * batch  # the length at which a row met a criterion

    @property
    def limits(self) -> list[int]:
        """Where each row ends, as far as is known."""
        if self.has_eos:
            return [self.max_length if met is None else met for met in self.met]
        return [self.max_length if None in self.met else max(self.met)] * len(self.met)

    @property
    def rooms(self) -> list[int]:
        """Tokens that each row may still get; none for a row that is done."""
        return [max(0, limit - length) for limit, length in zip(self.limits, self.lengths, strict=True)]

    def at(self, offset: int, width: int) -> torch.Tensor:
        """The ids `[B, width]` that begin `offset` places behind every row's tokens."""
        places = self._places(offset, width)
        return self.ids[self.rows, places]

    def write(self, tokens: torch.Tensor, offset: int = 0) -> None:
        """Puts `[B, width]` at these places, without making them part of the rows."""
        places = self._places(offset, tokens.shape[1])
        self.ids[self.rows, places] = tokens.to(self.ids.device)

    def _places(self, offset: int, width: int) -> torch.Tensor:
        """Their indices `[B, width]` in `ids`, which is made longer where it must be."""
        missing = max(self.lengths) + offset + width - self.ids.shape[1]
        if missing > 0:
            self.ids = nn.functional.pad(self.ids, (0, max(missing, self.ids.shape[1], 64)))
        starts = torch.tensor(self.lengths, device=self.ids.device) + offset
        return starts[:, None] + torch.arange(width, device=starts.device)

    def shown(self, length: int, rows: list[int]) -> torch.Tensor:
        """Ids `[B, length]` for who looks at `rows`, drafts among them: other rows are padded behind their last token."""
        ids = self.ids[:, :length].clone()
        if len(rows) == len(ids):
            return ids
        held = torch.tensor(self.lengths, device=ids.device)
        held[rows] = length
        padding = ids.new_zeros(()) if self.pad is None else self.pad.to(ids.device)
        return torch.where(torch.arange(length, device=ids.device) < held[:, None], ids, padding)

    def grow(self, tokens: torch.Tensor, counts: list[int], scores: tuple | None = None) -> list[int]:
        """Appends the first `counts[r]` of `tokens` `[B, m]` to row r, up to where it stops; returns how many it got."""
        self.write(tokens)
        counts = list(map(min, counts, self.rooms))
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        for length in range(min(self.lengths) + 1, max(ends) + 1):  # the criteria see the rows grow one by one
            rows = [row for row, end in enumerate(ends) if self.lengths[row] < length <= end]
            if not rows:
                continue
            seen = None if scores is None else scores[: length - self.prompt]
            stop = self.criteria(self.shown(length, rows), seen).tolist()
            for row in rows:
                if stop[row] and self.met[row] is None:
                    self.met[row] = length
                    ends[row] = length if self.has_eos else ends[row]
        counts = [end - length for end, length in zip(ends, self.lengths, strict=True)]
        self.lengths = ends
        if self.streamer is not None:
            self._stream()
        return counts

    def _stream(self) -> None:
        """Hands on what all rows have, column by column."""
        growing = [length for length, room in zip(self.lengths, self.rooms, strict=True) if room]
        ready = min(growing) if growing else max(self.limits)
        for column in self.padded(ready)[:, self.streamed :].cpu().unbind(1):
            self.streamer.put(column)
        self.streamed = max(ready, self.streamed)

    def padded(self, length: int) -> torch.Tensor:
        """The first `length` tokens of all rows, with padding behind those that stopped earlier."""
        ids = self.ids[:, :length]
        if not self.has_eos or self.pad is None:
            return ids
        limits = torch.tensor(self.limits, device=ids.device)
        return torch.where(torch.arange(length, device=ids.device) < limits[:, None], ids, self.pad.to(ids.device))
