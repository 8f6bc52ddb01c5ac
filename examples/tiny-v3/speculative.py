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
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
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

# They remember earlier calls, which one row repeats in order and several do not.
_STATEFUL = {
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
}


@dataclass
class MTPStats(ModelOutput):
    """What came of the drafts.

    drafted `[batch]`: drafts for places that the row's result has.
    accepted `[batch]`: those among them that stand in it.
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
    """Turns logits into tokens: the logits processors of `generate`, then the best token or a sampled one.

    The main model's logits go through all of them. Drafts are chosen with those of transformers that take any text: the others
    are never asked about a text that is not a row's own, as it stands.

    Raises:
        ValueError: for a processor that remembers earlier calls, beside several rows.
    """

    def __init__(self, processors: LogitsProcessorList, sample: bool, rows: int):
        for processor in processors:
            if type(processor) in _STATEFUL and rows > 1:
                raise ValueError(
                    f"{type(processor).__name__} remembers what it was asked, and with use_mtp=True {rows} rows advance by "
                    f"different numbers of tokens: drop {_STATEFUL[type(processor)]} or use_mtp, or generate row by row."
                )
        self.sample, self.rows = sample, list(range(rows))
        self.context_free = all(type(processor) in _CONTEXT_FREE for processor in processors)
        self.processors = LogitsProcessorList(map(self._restricted, processors))
        particular = (PrefixConstrainedLogitsProcessor, *_STATEFUL)
        self.for_drafts = LogitsProcessorList(
            processor
            for processor in processors
            if type(processor).__module__.startswith("transformers.") and type(processor) not in particular
        )

    def _restricted(self, processor):
        """A `prefix_allowed_tokens_fn` may fail for a text that cannot occur: it is not asked about the rows beside."""
        if type(processor) is not PrefixConstrainedLogitsProcessor:
            return processor
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(
            lambda row, ids: allowed(row, ids) if row in self.rows else [0], num_beams=1
        )

    def scores(self, logits: torch.Tensor, text: Sequences, rows: list[int]) -> torch.Tensor:
        """Processed fp32 scores `[B, m, V]` of the next m tokens of `rows`; others keep their logits.

        As without drafts the processors see one length at a time, all rows, and the row's own tokens; a row beside it that is
        shorter has padding at its end. Unless all of them look at the scores alone, m is 1.
        """
        if not self.processors or self.context_free:
            return self.processors(text.ids, logits.flatten(0, 1)).view_as(logits)
        return self._by_length(self.processors, logits[:, 0], text, rows, 0)[:, None]

    def draft_scores(self, logits: torch.Tensor, text: Sequences, place: int) -> torch.Tensor:
        """`[B, V]` for the token behind `place` drafts of every row."""
        if not self.for_drafts or self.context_free:
            return self.for_drafts(text.ids, logits)
        return self._by_length(self.for_drafts, logits, text, list(range(len(logits))), place)

    def _by_length(
        self, processors, logits: torch.Tensor, text: Sequences, rows: list[int], place: int
    ) -> torch.Tensor:
        scores = logits.clone()
        for length in sorted({text.lengths[row] for row in rows}):
            self.rows = [row for row in rows if text.lengths[row] == length]
            processed = processors(text.shown(length + place, self.rows), logits.clone())
            scores[self.rows] = processed[self.rows]
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
        """How many leading drafts each row accepts `[B]`, and the row's tokens `[B, m]`: these drafts and one more.

        Args:
            drafts `[B, K]`: proposed tokens, drawn from `draft_probs` `[B, K, V]` if sampled.
            scores `[B, m, V]`: of the main model, for each draft and (m = K + 1), if it is known, for the token behind them.
        """
        number = drafts.shape[1]
        if not self.sample:
            tokens = scores.argmax(-1)
            return (tokens[:, :number] == drafts).long().cumprod(-1).sum(-1), tokens
        probs = scores.softmax(-1)
        wanted, offered = (p.gather(-1, drafts[..., None]).squeeze(-1) for p in (probs[:, :number], draft_probs))
        accepted = (torch.rand_like(wanted) * offered < wanted).long().cumprod(-1).sum(-1)
        # of the first rejected place, what the drafts did not cover; behind the last one nothing was drafted
        last = probs.shape[1] - 1
        at = accepted.clamp(max=last)[:, None, None].expand(-1, 1, probs.shape[-1])
        left = (probs - nn.functional.pad(draft_probs, (0, 0, 0, last + 1 - number))).clamp(min=0).gather(1, at)
        left, probs = left.squeeze(1), probs.gather(1, at).squeeze(1)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, probs)
        tokens = nn.functional.pad(drafts, (0, 1)).scatter(1, accepted[:, None], torch.multinomial(left, 1))
        return accepted, tokens[:, : last + 1]


class _Recorder:
    """Keeps what the decoder is given and what it returns, while the model is called in the usual way.

    As soon as the cache is known, calls with another one are left out: they belong to another thread.
    """

    def __init__(self, decoder: nn.Module):
        self.cache: Cache | None = None
        self.calls: list[tuple[dict, torch.Tensor]] = []
        self.handle = decoder.register_forward_hook(self._record, with_kwargs=True)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.handle.remove()

    def _record(self, _decoder: nn.Module, _args: tuple, kwargs: dict, output) -> None:
        if self.cache is None or kwargs.get("past_key_values") is self.cache:
            self.calls.append((kwargs, output[0]))

    def take(self, cache: Cache) -> tuple[torch.Tensor, list[dict]]:
        """Last hidden states `[B, S, d]` of the calls with `cache` since the last `take`, and the arguments of each."""
        self.cache = cache
        calls = [call for call in self.calls if call[0].get("past_key_values") is cache]
        self.calls.clear()
        return torch.cat([states for _, states in calls], dim=1), [kwargs for kwargs, _ in calls]


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


class _Referee:
    """Decides which tokens are drafted and which of them stand, and keeps what `generate` reports of it."""

    def __init__(self, chooser: Chooser, text: Sequences, config: GenerationConfig):
        self.chooser, self.text = chooser, text
        kept = config.return_dict_in_generate
        self.scores, self.logits = _Steps(kept and config.output_scores), _Steps(kept and config.output_logits)
        self.offered: list[torch.Tensor | None] = []  # what the drafts of this round were drawn from
        self.rounds: list[tuple[int, list[int], list[int]]] = []  # drafts, lengths before, drafts that were right

    def draft(self, logits: torch.Tensor, place: int) -> torch.Tensor:
        """Chooses the draft `[B]` behind `place` drafts by `logits` `[B, V]`."""
        scores = self.chooser.draft_scores(logits.to(self.text.ids.device, torch.float), self.text, place)
        tokens, offered = self.chooser.choose(scores)
        self.text.write(tokens[:, None], place)
        self.offered.append(offered)
        return tokens.to(logits.device)

    def decide(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Lets the main model's `logits` `[B, m, V]` judge the m - 1 drafts: tokens `[B, m]`, and how many each row got.

        All places at once where no processor looks at the text; else place by place, so that none is asked about a draft.
        """
        text, number, before = self.text, logits.shape[1] - 1, self.text.lengths
        logits = logits.to(text.ids.device, torch.float, copy=True)
        drafts = text.at(0, number)
        offered = torch.stack(self.offered, dim=1) if number and self.chooser.sample else logits[:, :0]
        self.offered.clear()
        width = number + 1 if self.chooser.context_free else 1
        going, decided, accepted = [row for row, room in enumerate(text.rooms) if room], [], [0] * len(before)
        for first in range(0, number + 1, width):
            places = slice(first, first + width)
            scores = self.chooser.scores(logits[:, places], text, going)
            right, tokens = self.chooser.judge(drafts[:, places], offered[:, places], scores)
            decided.append(tokens)
            lengths, right = text.lengths, right.tolist()
            counts = [min(right[row] + 1, width) if row in going else 0 for row in range(len(lengths))]
            start, counts = [length - text.prompt for length in lengths], list(map(min, counts, text.rooms))
            self.scores.add(scores, start, counts)
            self.logits.add(logits[:, places], start, counts)
            counts = text.grow(tokens, counts, self.scores.steps)
            accepted = [known + min(right[row], counts[row]) for row, known in enumerate(accepted)]
            going = [row for row in going if right[row] == width and text.rooms[row]]
        self.rounds.append((number, before, accepted))
        counts = [length - known for length, known in zip(text.lengths, before, strict=True)]
        return torch.cat(decided, dim=1), counts

    def stats(self) -> MTPStats:
        drafted, accepted = torch.zeros(2, len(self.text.lengths), dtype=torch.long)
        for row, end in enumerate(self.text.limits):
            for number, lengths, right in self.rounds:
                room = max(0, end - lengths[row])
                drafted[row] += min(number, room)
                accepted[row] += min(right[row], room)
        rate = accepted.sum().item() / max(1, drafted.sum().item())
        return MTPStats(drafted=drafted, accepted=accepted, acceptance_rate=rate)


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
        name: getattr(generation_config, name, None)
        for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight")
    }
    given["assistant_model"] = mode_kwargs.get("assistant_model")
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"use_mtp=True drafts by itself, and {name} is for other ones: drop one of the two.")
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"use_mtp=True works with greedy search and sampling, and these arguments ask for {mode.value}: drop use_mtp, or what "
            "asks for it (num_beams, penalty_alpha, dola_layers, ...)."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"use_mtp=True needs positions that stay what they are while the text grows; rope_type {rope_type!r} changes them: "
            "drop use_mtp."
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
    """The loop behind `generate(..., use_mtp=True)`; its arguments are as `generate` prepares them.

    In the cache that it returns, slots behind a row's last token but one hold nothing that can be used.
    """
    config, cache, mask = generation_config, model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    chooser = Chooser(logits_processor, config.do_sample, len(input_ids))
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)  # PEFT's model, if it has one's place
    if config.prefill_chunk_size and getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size} puts a tuned prompt before every chunk: drop it, or use_mtp."
        )
    unseen = 0 if mask is None else mask.shape[1] - input_ids.shape[1]  # in the cache, and not among the ids
    check_can_shrink(cache)
    static_capacity(cache, len(input_ids), config.max_length + unseen - 1)
    decoder, most = model.get_decoder(), config.num_assistant_tokens
    others = {name: value for name, value in model_kwargs.items() if name not in _HANDLED}
    text = Sequences(input_ids, stopping_criteria, config.max_length, config._pad_token_tensor, streamer)
    referee = _Referee(chooser, text, config)

    with _Recorder(decoder) as recorder:
        outputs = model._prefill(input_ids, config, model_kwargs)
        cache = outputs.past_key_values  # with prefix tuning not the one it was given
        check_can_shrink(cache)
        states, calls = recorder.take(cache)
        prompt = {name: [call.get(name) for call in calls] for name in ("input_ids", "inputs_embeds", "position_ids")}
        prompt = {name: None if parts[0] is None else torch.cat(parts, dim=1) for name, parts in prompt.items()}
        position_ids, embeds = prompt["position_ids"], prompt["inputs_embeds"]
        if position_ids is None:
            past = int(cache.get_seq_length()) - states.shape[1]
            position_ids = torch.arange(past, past + states.shape[1], device=states.device)[None]
        position_ids = position_ids.expand(len(input_ids), -1)
        seen = calls[-1].get("attention_mask")  # wider than `mask` with prompt tuning; with a static cache it is 4-D
        rows = RaggedRows(cache, seen if seen is not None and seen.ndim == 2 else mask, position_ids[:, -1])
        unseen = rows.end - input_ids.shape[1]
        capacity = static_capacity(cache, len(input_ids), config.max_length + unseen - 1)
        drafter = MTPDrafter(model, rows, states.shape[1], most)
        last_positions = rows.offsets + config.max_length + unseen - 1  # what a longer row drafts beyond is not used

        def room_for_drafts() -> int:
            number = most if synced_gpus else max(0, min(most, max(text.rooms) - 1))  # ranks must call the same modules
            return number if capacity is None else max(0, min(number, capacity - rows.end - 1))

        tokens, counts = referee.decide(outputs.logits[:, -1:])
        del outputs
        number = room_for_drafts()
        if number:
            embeds = decoder.embed_tokens(prompt["input_ids"]) if embeds is None else embeds
            embeds = torch.cat((embeds[:, 1:], decoder.embed_tokens(tokens.to(states.device))), dim=1)
            drafter.read_prompt(number, states, embeds, position_ids, referee.draft, config.prefill_chunk_size)
        with model._optimize_model_for_decode():  # for few tokens at a time, unlike the prompt
            while model._has_unfinished_sequences(not any(text.rooms), synced_gpus, device=input_ids.device):
                logits = model(
                    input_ids=text.at(-1, number + 1).to(states.device),
                    attention_mask=rows.mask(number + 1),
                    position_ids=rows.positions(number + 1).minimum(last_positions[:, None]),
                    past_key_values=cache,
                    use_cache=True,
                    **others,
                ).logits
                states, _ = recorder.take(cache)
                tokens, counts = referee.decide(logits)
                rows.keep(counts, number + 1)
                number = room_for_drafts()
                if number:
                    embeds = decoder.embed_tokens(tokens.to(states.device))
                    drafter.propose(number, states, embeds, counts, referee.draft)

    length = max(text.limits)
    rows.cut([length + unseen - 1] * len(input_ids))
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.padded(length)
    return DeepseekGenerateOutput(
        sequences=text.padded(length),
        scores=referee.scores.steps and referee.scores.steps[: length - text.prompt],
        logits=referee.logits.steps and referee.logits.steps[: length - text.prompt],
        past_key_values=cache,
        mtp_stats=referee.stats(),
    )
