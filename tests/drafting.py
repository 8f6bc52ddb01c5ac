"""What the tests of drafting share: a model that often guesses right, prompts of unequal lengths, generation in both ways."""

import torch
from transformers import GenerationConfig

from tiny import tiny_model, tiny_tokens

PAD, EOS = 2, 1
NEW = 24


def make(family: str = "v3", depths: int = 1, **overrides):
    """A model of so few words that drafts are often right by chance."""
    model = tiny_model(family, num_nextn_predict_layers=depths, **dict(vocab_size=7) | overrides)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    return model


def prompts(model, rows: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` `[rows, length]` padded on the left by 0, 1, 2, ... tokens, and their mask."""
    ids = tiny_tokens(model.config, rows, length, seed=seed)
    mask = (torch.arange(length) >= torch.arange(rows)[:, None] % (length - 1)).long()
    return dict(input_ids=ids.where(mask == 1, PAD), attention_mask=mask)


def both(model, inputs: dict, **options) -> tuple:
    """What `generate` gives without and with drafts."""
    options = dict(max_new_tokens=NEW, return_dict_in_generate=True) | options
    number = options.pop("num_assistant_tokens", None)
    plain = model.generate(**inputs, **options)
    return plain, model.generate(**inputs, **options, use_mtp=True, num_assistant_tokens=number)
