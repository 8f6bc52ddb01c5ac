"""Teach a DeepSeek model to chat with TRL: from a docstring, the assistant writes the function, and only its words are learned.

python examples/sft_chat.py
python examples/sft_chat.py --packing
python examples/sft_chat.py --model deepseek-ai/DeepSeek-V2-Lite --steps 1000 --learning-rate 5e-6
"""

from datasets import Dataset
from stdlib_data import Function, arguments, functions, load, training_options
from trl import SFTConfig, SFTTrainer

from modeling_deepseek.training import LossPartsCallback, ModelLossMixin

# What stands between `generation` and `endgeneration` is the assistant's, end of text included: the loss looks at nothing else.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}# {{ message.content }}\n"
    "{% else %}{% generation %}{{ message.content }}\n{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


class ChatTrainer(ModelLossMixin, SFTTrainer):
    """TRL's trainer with the model's own loss, which trains the MTP layers too."""


def conversation(function: Function) -> dict:
    question = {"role": "user", "content": " ".join(function.doc.split("\n\n")[0].split())}
    return {"messages": [question, {"role": "assistant", "content": function.source}]}


def main() -> None:
    switches = dict(
        packing="fill rows of 512 tokens with whole conversations", padding_free="batches of one row without padding"
    )
    args = arguments(__doc__.splitlines()[0], steps=100, learning_rate=1e-3, **switches)
    model, tokenizer = load(args.model, args.dtype)
    tokenizer.chat_template = TEMPLATE
    train, kept = (Dataset.from_list(list(map(conversation, part))) for part in functions())
    trainer = ChatTrainer(
        model=model,
        args=SFTConfig(
            **training_options(args),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.2},
            per_device_train_batch_size=2 if args.packing else 8,
            assistant_only_loss=True,
            packing=args.packing,
            eval_packing=False,
            padding_free=args.padding_free or args.packing,
            max_length=None if args.padding_free and not args.packing else 512,
            prediction_loss_only=True,
        ),
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=kept,
        callbacks=[LossPartsCallback()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # with the chat template
    print(f"loss on the answers of {len(kept)} conversations that it was not trained on: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
