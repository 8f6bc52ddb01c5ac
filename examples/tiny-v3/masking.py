"""Attention masks: packed documents told apart, and every prepared mask in one dense form."""

import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


def document_starts(position_ids: torch.Tensor, past: int | torch.Tensor) -> torch.Tensor | None:
    """First key that each query of packed rows may see, `[B, S]`, or `None` when no row holds more than one document.

    A token whose position does not follow its predecessor's starts a document at its own slot; the first token of a row belongs
    to the document that started `position` slots before it.

    Args:
        position_ids `[B, S]`: positions of the S new tokens.
        past: number of tokens in front of them in the cache.
    """
    slots = torch.arange(position_ids.shape[1], device=position_ids.device) + past
    restarts = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1
    starts = torch.where(restarts, slots, 0)
    starts[:, :1] = (slots[:1] - position_ids[:, :1]).clamp(min=0)
    starts = starts.cummax(dim=-1).values
    if not torch.compiler.is_compiling() and not starts.any():
        return None
    return starts


def packed_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
):
    """transformers' causal mask for `config._attn_implementation`; packed rows are told apart also with a cache, unlike there.

    Positions that restart begin a new document, which sees nothing before it. As in transformers this is looked for only when
    `position_ids` are given without an `attention_mask`.

    Raises:
        ValueError: for packed rows that flash attention would mix up.
    """
    other_documents = None
    if position_ids is not None and attention_mask is None and past_key_values is not None:
        past = past_key_values.get_seq_length()
        starts = document_starts(position_ids.expand(inputs_embeds.shape[0], -1), past)
        if starts is not None:
            if "flash" in (config._attn_implementation or ""):
                refuse_what_flash_mixes_up(config, starts.shape[0], past)

            def other_documents(batch_idx, head_idx, q_idx, kv_idx):
                return kv_idx >= starts[batch_idx, q_idx - past]

    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=other_documents,
    )


def refuse_what_flash_mixes_up(config: PreTrainedConfig, rows: int, past: int | torch.Tensor) -> None:
    """Flash attention finds packed documents by itself, in the expanded form of a single row on an empty cache."""
    absorbed = getattr(config, "mla_mode", "auto") == "absorbed"
    if past or rows > 1 or absorbed:
        raise ValueError(
            f"{config._attn_implementation} tells packed documents apart only in a single row on an empty cache, expanded; got "
            f"{rows} rows on {past} cached tokens{', mla_mode absorbed' if absorbed else ''}: use attn_implementation='sdpa'."
        )


def dense_mask(
    attention_mask, batch: int, queries: int, keys: int, device: torch.device, from_start: bool = False
) -> torch.Tensor | None:
    """Any mask that transformers prepares, as one that broadcasts to `[B, H, S, T]`; `None` where all is seen.

    "eager" and "sdpa" give a 4-D one (or `None`: causal), "flash_attention_2" a padding mask `[B, T]`, "flex_attention" a
    block mask. `from_start`: a missing mask means that the queries are the first of the keys, as for torch's SDPA (a prefill into
    a static cache has more keys than tokens), instead of the last.
    """
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        return create_mask(attention_mask.mask_mod, batch, 1, queries, keys, device=device)
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask[..., :keys]
    causal = None
    if queries > 1:
        diagonal = 0 if from_start and attention_mask is None else keys - queries
        causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal)[None, None]
    if attention_mask is None:
        return causal
    padding = attention_mask[:, None, None, :keys].bool()
    return padding if causal is None else padding & causal
