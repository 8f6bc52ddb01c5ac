"""Fine-tune all weights of a DeepSeek model with Trainer: packed without padding, MTP layers and balance of experts included.

python examples/finetune_trainer.py
python examples/finetune_trainer.py --model deepseek-ai/DeepSeek-V2-Lite --steps 1000 --learning-rate 5e-6
"""

from stdlib_data import arguments, functions, load, tokenized, training_options
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_deepseek.training import LossPartsCallback, RouterBiasCallback


def main() -> None:
    args = arguments(__doc__.splitlines()[0], steps=100, learning_rate=1e-3)
    model, tokenizer = load(args.model, args.dtype)
    train, kept = (tokenized(part, tokenizer) for part in functions())
    callbacks = [LossPartsCallback()]  # logs lm_loss and mtp_loss, of which loss is made
    if getattr(model.config, "topk_method", None) == "noaux_tc":
        callbacks.append(RouterBiasCallback(1e-3))  # V3's balance of experts, without a loss
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **training_options(args),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.2},  # DeepSeek-V3's own fine-tuning: from 5e-6 to 1e-6
            per_device_train_batch_size=8,
            prediction_loss_only=True,
        ),
        data_collator=DataCollatorWithFlattening(),  # a batch is one row: positions that restart tell functions apart
        train_dataset=train,
        eval_dataset=kept,
        callbacks=callbacks,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    tokenizer.save_pretrained(args.output)
    print(f"loss on {len(kept)} functions that it was not trained on: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
