"""Drafting with the MTP layers inside `generate` (DeepSeek-V3 report, section 2.2: "MTP in Inference").

Every round the MTP layers draft a few tokens, the main model judges all of them in one forward, and each row of the batch keeps
its own number of them. Drafts change the speed, never the result: greedy tokens equal those without drafts, sampled ones follow
the same distribution (Leviathan et al. 2023, algorithm 1).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .drafter import MTPDrafter
from .ragged import RaggedRows, Sequences, check_can_shrink

# What `decode` passes to the model itself.
_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds", "logits_to_keep"}

# They look at the scores alone, so that rows and places can go through them in one call.
_CONTEXT_FREE = (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass
class MTPStats(ModelOutput):
    """What came of the drafts.

    drafted `[batch]`: drafts that the main model judged and the row had room for.
    accepted `[batch]`: those among them that stand in the result.
    acceptance_rate (`float`): accepted / drafted over all rows, 0 without drafts.
    """

    drafted: torch.LongTensor | None = None
    accepted: torch.LongTensor | None = None
    acceptance_rate: float | None = None


@dataclass
class DeepseekGenerateOutput(GenerateDecoderOnlyOutput):
    """Adds `mtp_stats` ([`MTPStats`]) to what `generate(..., return_dict_in_generate=True)` gives."""

    mtp_stats: MTPStats | None = None


class Chooser:
    """Turns logits into tokens: the logits processors of `generate`, then the best token or a sampled one."""

    def __init__(self, processors: LogitsProcessorList, sample: bool):
        self.processors, self.sample = processors, sample
        self.context_free = all(type(processor) in _CONTEXT_FREE for processor in processors)

    def scores(self, logits: torch.Tensor, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Processed fp32 scores `[B, m, V]`; place j of row r follows `ids[r, : lengths[r] + j]`.

        The processors see what they would see without drafts: one length at a time, all rows, the row's own tokens.
        """
        logits = logits.float()
        if not self.processors:
            return logits
        if self.context_free:
            return self.processors(ids, logits.flatten(0, 1)).view_as(logits)
        scores = torch.empty_like(logits)
        for place in range(logits.shape[1]):
            for length in set(lengths):
                rows = [row for row, own in enumerate(lengths) if own == length]
                processed = self.processors(ids[:, : length + place], logits[:, place].clone())
                scores[rows, place] = processed[rows]
        return scores

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, V]` -> tokens `[B]`, and the distribution that they were drawn from."""
        if not self.sample:
            return scores.argmax(-1), None
        probs = scores.softmax(-1)
        return torch.multinomial(probs, 1).squeeze(1), probs

    def judge(
        self, drafts: torch.Tensor, draft_probs: torch.Tensor | None, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many leading drafts each row accepts `[B]`, and the row's tokens `[B, K + 1]`: these drafts and one more.

        Args:
            drafts `[B, K]`: proposed tokens, drawn from `draft_probs` `[B, K, V]` if sampled.
            scores `[B, K + 1, V]`: of the main model, for each draft and for the token behind them.
        """
        if not self.sample:
            tokens = scores.argmax(-1)
            return (tokens[:, :-1] == drafts).long().cumprod(-1).sum(-1), tokens
        probs = scores.softmax(-1)
        wanted, offered = (p.gather(-1, drafts[..., None]).squeeze(-1) for p in (probs[:, :-1], draft_probs))
        accepted = (torch.rand_like(wanted) * offered < wanted).long().cumprod(-1).sum(-1)
        # of the first rejected place, what the drafts did not cover; behind the last one nothing was drafted
        at = accepted[:, None, None].expand(-1, 1, probs.shape[-1])
        left = (probs - nn.functional.pad(draft_probs, (0, 0, 0, 1))).clamp(min=0).gather(1, at).squeeze(1)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, probs.gather(1, at).squeeze(1))
        tokens = nn.functional.pad(drafts, (0, 1))
        return accepted, tokens.scatter(1, accepted[:, None], torch.multinomial(left, 1))


class _Recorder:
    """Keeps what the decoder is given with `cache` and what it returns, while the model is called in the usual way.

    Another thread may generate with the same model: its calls have another cache.
    """

    def __init__(self, decoder: nn.Module, cache: Cache):
        self.cache = cache
        self.calls: list[tuple[dict, torch.Tensor]] = []
        self.handle = decoder.register_forward_hook(self._record, with_kwargs=True)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.handle.remove()

    def _record(self, _decoder: nn.Module, _args: tuple, kwargs: dict, output) -> None:
        if kwargs.get("past_key_values") is self.cache:
            self.calls.append((kwargs, output[0]))

    def take(self, *names: str) -> tuple[torch.Tensor | None, ...]:
        """Last hidden states `[B, S, d]` of the calls since the last `take`, and their arguments of these names."""
        given = [[kwargs.get(name) for kwargs, _ in self.calls] for name in names]
        states = torch.cat([states for _, states in self.calls], dim=1)
        self.calls.clear()
        return states, *(None if parts[0] is None else torch.cat(parts, dim=1) for parts in given)


class _Steps:
    """Scores `[B, V]` per generated place, from rows that get theirs at different times."""

    def __init__(self, wanted: bool):
        self.steps: tuple[torch.Tensor, ...] | None = () if wanted else None

    def add(self, scores: torch.Tensor, first: list[int], counts: list[int]) -> None:
        """`scores` `[B, m, V]`, of which row r's first `counts[r]` belong to the places from `first[r]` on."""
        if self.steps is None:
            return
        for row, (start, count) in enumerate(zip(first, counts, strict=True)):
            while len(self.steps) < start + count:
                self.steps += (torch.zeros_like(scores[:, 0], dtype=torch.float),)
            for j in range(count):
                self.steps[start + j][row] = scores[row, j]


class MTPGenerationMixin(GenerationMixin):
    """`generate(..., use_mtp=True)`; everything else is transformers' own."""

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Drafts are as many as there are MTP layers, unless somebody asked for another number."""
        asked = [kwargs.get("num_assistant_tokens")]
        asked += [getattr(given, "num_assistant_tokens", None) for given in (generation_config, self.generation_config)]
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if prepared.use_mtp:
            depths = self.config.num_nextn_predict_layers
            prepared.num_assistant_tokens = next((number for number in asked if number is not None), depths)
        return prepared, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_config.use_mtp:
            check_request(self.config, generation_mode, generation_config, generation_mode_kwargs)
            generation_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
        return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Rejected drafts want room behind the last token of a static cache."""
        spare = 1 + generation_config.num_assistant_tokens if generation_config.use_mtp else 0
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + spare
        )

    def _assisted_decoding(self, input_ids, generation_config, **kwargs):
        if generation_config.use_mtp:
            return decode(self, input_ids, generation_config=generation_config, **kwargs)
        return super()._assisted_decoding(input_ids, generation_config=generation_config, **kwargs)


def check_request(config, mode: GenerationMode, generation_config: GenerationConfig, mode_kwargs: dict) -> None:
    """Raises `ValueError` for what `use_mtp=True` cannot be combined with, before anything is computed."""
    if not config.num_nextn_predict_layers:
        raise ValueError(
            "use_mtp=True drafts with MTP layers, and this model has none (num_nextn_predict_layers is 0): drop use_mtp, load a "
            "checkpoint that has them, or add and train them (add_mtp_layers)."
        )
    given = {
        name: getattr(generation_config, name, None) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    }
    given["assistant_model"] = mode_kwargs.get("assistant_model")
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"use_mtp=True and {name} both propose tokens: drop one of the two.")
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"use_mtp=True works with greedy search and sampling, and these arguments ask for {mode.value}: drop use_mtp, or what "
            "asks for it (num_beams, penalty_alpha, dola_layers, ...)."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"use_mtp=True gives no {name.removeprefix('output_')}: drop {name} or use_mtp.")
    if generation_config.use_cache is False:
        raise ValueError("use_mtp=True needs the cache: drop use_cache=False or use_mtp.")
    number = generation_config.num_assistant_tokens
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"num_assistant_tokens is the number of drafts per round, at least 1, got {number!r}.")


def static_capacity(cache: Cache, batch: int, needed: int) -> int | None:
    """Tokens that a static cache takes; `None` for one that grows.

    Raises:
        ValueError: when a row of `needed` tokens does not fit, beside a free slot for the rows that are longer on the way.
    """
    capacity = min((layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), default=None)
    needed += batch > 1
    if capacity is not None and capacity < needed:
        raise ValueError(
            f"The static cache has {capacity} slots, and use_mtp=True needs {needed} for {batch} rows of this length: build it "
            f"with max_cache_len={needed} or more, or drop use_mtp."
        )
    return capacity


def decode(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    tokenizer=None,
    inputs_tensor: torch.Tensor | None = None,
    **model_kwargs,
) -> DeepseekGenerateOutput | torch.LongTensor:
    """The loop behind `generate(..., use_mtp=True)`; its arguments are as `generate` prepares them."""
    config, cache, batch = generation_config, model_kwargs["past_key_values"], input_ids.shape[0]
    check_can_shrink(cache)
    decoder, most = model.get_decoder(), config.num_assistant_tokens
    others = {name: value for name, value in model_kwargs.items() if name not in _HANDLED}
    chooser = Chooser(logits_processor, config.do_sample)
    text = Sequences(input_ids, stopping_criteria, config.max_length, most + 1, config._pad_token_tensor, streamer)
    kept = config.return_dict_in_generate
    kept_scores, kept_logits = _Steps(kept and config.output_scores), _Steps(kept and config.output_logits)
    drafted, accepted = [0] * batch, [0] * batch
    probs: list[torch.Tensor] = []

    def draft(logits: torch.Tensor, place: int) -> torch.Tensor:
        lengths = [length + place for length in text.lengths]
        scores = chooser.scores(logits[:, None].to(text.ids.device), text.ids, lengths)
        tokens, offered = chooser.choose(scores[:, 0])
        text.write(tokens[:, None], place)
        probs.append(offered)
        return tokens.to(logits.device)

    def judge(logits: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Lets the main model's `logits` `[B, m, V]` decide on the m - 1 drafts: tokens `[B, m]`, and how many each row got."""
        number = logits.shape[1] - 1
        logits = logits.to(text.ids.device, torch.float, copy=True)
        scores = chooser.scores(logits, text.ids, text.lengths)
        offered = torch.stack(probs, dim=1) if number and config.do_sample else scores[:, :0]
        right, tokens = chooser.judge(text.at(0, number), offered, scores)
        right, rooms, start = right.tolist(), text.rooms, [length - text.prompt for length in text.lengths]
        counts = [min(count + 1, room) for count, room in zip(right, rooms, strict=True)]
        kept_scores.add(scores, start, counts)
        kept_logits.add(logits, start, counts)
        counts = text.grow(tokens, counts, kept_scores.steps)
        for row in range(batch):
            drafted[row] += min(number, rooms[row])
            accepted[row] += min(right[row], counts[row])
        probs.clear()
        return tokens, counts

    with _Recorder(decoder, cache) as recorder, model._optimize_model_for_decode():
        logits = model._prefill(input_ids, config, model_kwargs).logits[:, -1:]
        states, ids, embeds, position_ids = recorder.take("input_ids", "inputs_embeds", "position_ids")
        if position_ids is None:
            position_ids = (
                torch.arange(states.shape[1], device=states.device)[None] + cache.get_seq_length() - states.shape[1]
            )
        position_ids = position_ids.expand(batch, -1)
        rows = RaggedRows(cache, model_kwargs.get("attention_mask"), position_ids[:, -1])
        unseen = rows.end - input_ids.shape[1]  # in the cache, and not among the ids
        capacity = static_capacity(cache, batch, config.max_length + unseen - 1)
        drafter = MTPDrafter(model, rows, states.shape[1], most)
        tokens, _ = judge(logits)
        following = decoder.embed_tokens(tokens.to(states.device))
        embeds = decoder.embed_tokens(ids) if embeds is None else embeds
        embeds, counts = torch.cat((embeds[:, 1:], following), dim=1), [states.shape[1]] * batch

        while model._has_unfinished_sequences(not any(text.rooms), synced_gpus, device=input_ids.device):
            number = most if synced_gpus else min(most, max(text.rooms) - 1)  # ranks must call the same modules
            if capacity is not None:
                number = min(number, capacity - rows.end - 1)
            if number:
                drafter.propose(number, states, embeds, counts, draft, position_ids)
            logits = model(
                input_ids=text.at(-1, number + 1).to(states.device),
                attention_mask=rows.mask(number + 1),
                position_ids=rows.positions(number + 1),
                past_key_values=cache,
                use_cache=True,
                **others,
            ).logits
            states, position_ids = *recorder.take(), None
            tokens, counts = judge(logits)
            rows.keep(counts, number + 1)
            embeds = decoder.embed_tokens(tokens.to(states.device))

    length = max(text.limits)
    rows.cut([length + unseen - 1] * batch)
    if streamer is not None:
        streamer.end()
    if not kept:
        return text.padded(length)
    drafted, accepted = torch.tensor(drafted), torch.tensor(accepted)
    rate = accepted.sum().item() / max(1, drafted.sum().item())
    return DeepseekGenerateOutput(
        sequences=text.padded(length),
        scores=kept_scores.steps and kept_scores.steps[: length - text.prompt],
        logits=kept_logits.steps and kept_logits.steps[: length - text.prompt],
        past_key_values=cache,
        mtp_stats=MTPStats(drafted=drafted, accepted=accepted, acceptance_rate=rate),
    )
