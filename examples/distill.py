"""Distil a DeepSeek model into one with half of its layers, on what the student itself writes (TRL's DistillationTrainer).

python examples/distill.py
python examples/distill.py --model deepseek-ai/DeepSeek-V2-Lite --steps 1000 --learning-rate 1e-5
"""

import copy

import torch
from datasets import Dataset
from stdlib_data import arguments, functions, load, training_options
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer


def half_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """The dense layers and every second of the others, with the teacher's weights; no MTP layers."""
    config = copy.deepcopy(teacher.config)
    dense, layers = config.first_k_dense_replace, teacher.model.layers[: config.num_hidden_layers]
    taken = [*layers[:dense], *layers[dense::2]]
    config.num_hidden_layers, config.num_nextn_predict_layers = len(taken), 0
    student = type(teacher)(config).to(teacher.dtype)
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for part in ("embed_tokens", "norm"):
        getattr(student.model, part).load_state_dict(getattr(teacher.model, part).state_dict())
    for mine, theirs in zip(student.model.layers, taken, strict=True):
        mine.load_state_dict(theirs.state_dict())
    return student


def main() -> None:
    args = arguments(__doc__.splitlines()[0], steps=60, learning_rate=1e-3)
    teacher, tokenizer = load(args.model, args.dtype)
    student = half_of(teacher)
    print(f"teacher {teacher.num_parameters():,} parameters, student {student.num_parameters():,}")
    train, kept = (Dataset.from_dict({"prompt": [each.head for each in part]}) for part in functions())
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            **training_options(args),
            beta=0.5,  # 0: KL(teacher | student), 1: the reverse; between them the Jensen-Shannon divergence
            lr_scheduler_type="cosine",
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            max_completion_length=48,
            gradient_checkpointing=torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=kept,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(
        f"divergence from the teacher on {len(kept)} beginnings that it was not trained on: {before:.3f} -> {after:.3f}"
    )


if __name__ == "__main__":
    main()
