"""Train LoRA adapters on attention, dense and shared MLPs and every routed expert, then merge them.

python examples/finetune_lora.py
python examples/finetune_lora.py --model deepseek-ai/DeepSeek-V2-Lite --dtype auto --steps 1000 --learning-rate 1e-4
"""

from peft import LoraConfig, get_peft_model
from stdlib_data import arguments, functions, load, tokenized, training_options
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_deepseek.lora import lora_targets


def main() -> None:
    args = arguments(__doc__.splitlines()[0], steps=100, learning_rate=3e-3, merge="save the merged model, no adapter")
    model, tokenizer = load(args.model, args.dtype)
    train, kept = (tokenized(part, tokenizer) for part in functions())
    targets = lora_targets("all")  # or "attention", "mlp", "experts"
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **targets))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **training_options(args),
            lr_scheduler_type="cosine",
            per_device_train_batch_size=8,
            prediction_loss_only=True,
            label_names=["labels"],  # which Trainer cannot read off an adapter
        ),
        data_collator=DataCollatorWithFlattening(),
        train_dataset=train,
        eval_dataset=kept,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if args.merge:
        model = model.merge_and_unload()  # a whole model with official keys, for every engine
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"loss on {len(kept)} functions that it was not trained on: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
