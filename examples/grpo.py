"""Reinforcement learning as in DeepSeek-R1: GRPO with rewards that a rule verifies, for functions that compile.

python examples/grpo.py
python examples/grpo.py --model deepseek-ai/DeepSeek-V2-Lite --steps 500 --learning-rate 3e-6

The model is shown how a function of the standard library begins (`def name(arguments`) and writes on.
"""

import ast
import re
import warnings

import torch
from datasets import Dataset
from stdlib_data import arguments, functions, load, training_options
from trl import GRPOConfig, GRPOTrainer


def function_of(head: str, rest: str) -> ast.FunctionDef | None:
    """The function that the model wrote, up to the next line that begins at the margin; None where it does not compile."""
    text = re.split(r"\n(?=\S)", head + rest)[0]
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(text, "<completion>", "exec")
        return ast.parse(text).body[0]
    except (SyntaxError, ValueError):
        return None


def compiles(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """R1's accuracy reward: a compiler says whether the answer is right."""
    return [float(function_of(*pair) is not None) for pair in zip(prompts, completions, strict=True)]


def documented(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """R1's format reward: the function has a docstring."""
    found = [function_of(*pair) for pair in zip(prompts, completions, strict=True)]
    return [float(each is not None and bool(ast.get_docstring(each))) for each in found]


def main() -> None:
    args = arguments(__doc__.splitlines()[0], steps=60, learning_rate=5e-4)
    model, tokenizer = load(args.model, args.dtype)
    model.model.layers[model.config.num_hidden_layers :].requires_grad_(False)  # GRPO does not train the MTP layers
    heads = [each.head.rpartition(")")[0] for each in functions()[0] if each.head.endswith("):")]
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            **training_options(args),
            trust_remote_code=True,  # of the reference model
            # R1-Zero (Nature 2025, methods): 16 outputs of 32 questions, temperature 1, KL 0.001, one update per output; the
            # learning rate was 3e-6. V2, V3 and R1 divide by the group's deviation; V3.2 no longer does (scale_rewards="none").
            num_generations=16,
            per_device_train_batch_size=32,  # 2 questions
            temperature=1.0,
            beta=0.001,
            scale_rewards="group",
            loss_type="grpo",  # per answer the mean over its tokens, as in DeepSeekMath
            epsilon=10.0,  # the clip ratio of R1's first stage, which never binds with one update per output
            lr_scheduler_type="constant",
            max_completion_length=32,
            gradient_checkpointing=torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": heads}),
        reward_funcs=[compiles, documented],
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    trainer.save_model()
    print(f"mean reward (of 2): {rewards[0]:.3f} in the first tenth of the run -> {rewards[-1]:.3f} in the last")


if __name__ == "__main__":
    main()
