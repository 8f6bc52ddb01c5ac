"""Complete a prompt with a DeepSeek model, and see what its latent cache holds.

python examples/quickstart.py
python examples/quickstart.py --mtp
python examples/quickstart.py --model deepseek-ai/DeepSeek-V2-Lite-Chat --chat --prompt "What is latent attention?"
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedConfig, set_seed

TINY = Path(__file__).with_name("tiny-v3")
PROMPT = "class Point:\n    def __init__(self, x, y):"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def encode(tokenizer, prompt: str, chat: bool) -> BatchEncoding:
    """`input_ids` and `attention_mask`, both `[1, S]`.

    Raises:
        ValueError: for `chat` with a tokenizer that has no chat template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise ValueError(
            f"--chat needs a chat template, and the tokenizer of {tokenizer.name_or_path} has none: "
            "leave --chat out, or choose a chat model."
        )
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def full_bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """What one token's keys and values of all heads and layers take, in elements of `itemsize` bytes."""
    width = config.num_key_value_heads * 2 * config.head_dim
    if hasattr(config, "kv_lora_rank"):
        width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * width * itemsize


def report(model, cache, new_tokens: int, seconds: float) -> None:
    full = full_bytes_per_token(model.config, model.dtype.itemsize)
    print(f"full keys and values: {full:,} bytes per token")
    if hasattr(model.config, "kv_lora_rank"):
        held = cache.nbytes // cache.get_seq_length()
        print(f"latent cache:         {held:,} bytes per token, {full / held:.1f} times less")
    print(f"speed:                {new_tokens / seconds:.1f} tokens per second ({model.dtype}, {model.device})")


def compare_mtp(model, inputs: BatchEncoding, max_new_tokens: int, rounds: int = 5) -> None:
    """Decodes in turns without and with drafts of the MTP layers, as the model's generation config says."""
    speeds, drafted, accepted = {False: [], True: []}, 0, 0
    for seed in range(rounds):
        for use_mtp, found in speeds.items():
            set_seed(seed)
            start = time.perf_counter()
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, use_mtp=use_mtp, return_dict_in_generate=True
            )
            new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
            found.append(new / (time.perf_counter() - start))
        drafted, accepted = drafted + output.mtp_stats.drafted.sum(), accepted + output.mtp_stats.accepted.sum()
    without, with_mtp = (statistics.median(found) for found in speeds.values())
    ratio = statistics.median(fast / slow for slow, fast in zip(*speeds.values(), strict=True))
    print(f"without MTP drafts:   {without:.1f} tokens per second")
    print(
        f"with MTP drafts:      {with_mtp:.1f} tokens per second, {ratio:.2f} times; {accepted / drafted:.0%} accepted"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a prompt with a DeepSeek model.")
    parser.add_argument(
        "--model", default=str(TINY), help="Hub id or folder (default: the small model beside this script)"
    )
    parser.add_argument("--prompt", default=PROMPT, help="text to complete")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--mtp", action="store_true", help="compare speed with and without drafts of the MTP layers")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as stored")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    set_seed(0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
        inputs = encode(tokenizer, args.prompt, args.chat).to(args.device)
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {error}")
    if args.mtp and not model.config.num_nextn_predict_layers:
        parser.error(f"--mtp needs MTP layers, and {args.model} has none: leave --mtp out")
    model.to(args.device)

    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True), end="\n\n")
    report(model, output.past_key_values, output.sequences.shape[1] - inputs["input_ids"].shape[1], seconds)
    if args.mtp:
        compare_mtp(model, inputs, args.max_new_tokens)


if __name__ == "__main__":
    main()
