"""What DeepSeek's reports vary over a training run: the learning rate and the batch size; and the groups that weight decay needs.

A run is told to every function here in one way, as `steps`: the number of optimiser steps, or, where their size changes, the
sequences of each (`batch_size_ramp`). The reports give their marks in tokens; as shares of the run they fit any length.

    sizes = batch_size_ramp(96, 480, ramp=469 / 14_800, sequences=1_000_000, multiple_of=32)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=2.2e-4, betas=(0.9, 0.95))
    arguments = TrainingArguments(max_steps=len(sizes), per_device_train_batch_size=15, gradient_accumulation_steps=32)
    BatchRampTrainer(
        batch_sizes=sizes, model=model, args=arguments, optimizers=(optimizer, v3_schedule(optimizer, sizes)), ...
    ).train()

Under FSDP Trainer makes the optimiser itself and takes no `optimizers`: return the schedule from `create_scheduler` in a subclass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from numbers import Integral

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer


def multi_step_schedule(
    optimizer: torch.optim.Optimizer,
    steps: int | Sequence[int],
    warmup_steps: int = 2000,
    marks: Sequence[float] = (0.8, 0.9),
    factor: float = 0.316,
) -> LambdaLR:
    """The learning rate of DeepSeek LLM (section 2.3) and DeepSeek-V2 (section 3.1.2): times `factor` at each of `marks`.

    Args:
        optimizer: its learning rate is the peak.
        steps: of the whole run: their number, or the sequences of each.
        warmup_steps: over which the learning rate goes up linearly from 0.
        marks: shares of the run's sequences; (0.8, 0.9) in DeepSeek LLM, DeepSeekMoE and V2-Lite, (0.6, 0.9) in DeepSeek-V2.

    Raises:
        ValueError: for marks that are no shares or out of order, and for a run that is empty or all warm-up.
    """
    if not all(0 < mark < 1 for mark in marks) or any(later <= earlier for earlier, later in pairwise(marks)):
        raise ValueError(f"marks are shares of the run that go up, as in (0.8, 0.9); got {marks!r}.")
    return _schedule(optimizer, steps, warmup_steps, lambda share: factor ** sum(mark <= share for mark in marks))


def v3_schedule(optimizer: torch.optim.Optimizer, steps: int | Sequence[int], warmup_steps: int = 2000) -> LambdaLR:
    """The learning rate of DeepSeek-V3 (section 4.2), its 14.8 trillion tokens stretched or squeezed to the run.

    It is the peak (2.2e-4 there) for 10T tokens, follows a cosine to a tenth of it over 4.3T, stays there for 333B, and is
    7.3e-6 / 2.2e-4 of the peak for the last 167B. Arguments and errors are those of `multi_step_schedule`.
    """
    return _schedule(optimizer, steps, warmup_steps, _v3_factor)


def _v3_factor(share: float) -> float:
    tokens = 14.8 * share  # trillions
    if tokens < 14.3:
        return 0.55 + 0.45 * math.cos(math.pi * max(0.0, tokens - 10) / 4.3)
    return 0.1 if tokens < 14.633 else 7.3e-6 / 2.2e-4


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int | Sequence[int], warmup_steps: int, factor: Callable[[float], float]
) -> LambdaLR:
    """Linear warm-up, times `factor` of the share of the run's sequences that are done."""
    done = (
        range(steps + 1) if isinstance(steps, Integral) else [0, *accumulate(steps)]
    )  # before each step, and at the end
    last = len(done) - 1
    if not 0 <= warmup_steps < last:
        raise ValueError(
            f"A warm-up of {warmup_steps} steps in a run of {last}: give the steps of the whole run, and a warmup_steps from 0 to "
            f"{max(0, last - 1)}."
        )

    def multiplier(step: int) -> float:
        warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warmup * factor(done[min(step, last)] / done[-1])

    return LambdaLR(optimizer, multiplier)


def batch_size_ramp(first: int, last: int, ramp: float, sequences: int, multiple_of: int = 1) -> list[int]:
    """Sequences of each optimiser step of a run: from `first` up to `last`, linearly in what is done, and `last` from then on.

    DeepSeek-V2 (section 3.1.2) went from 2304 to 9216 over the first 225B of 8.1T tokens, DeepSeek-V3 (section 4.2) from 3072 to
    15360 over 469B of 14.8T, at 4096 tokens a sequence. "Gradually" is all they say of the way: the straight line is ours.

    Args:
        ramp: share of the run over which the size grows.
        sequences: of the whole run; the last step is a whole one, and may go beyond them.
        multiple_of: the sizes are rounded down to it: ranks x `gradient_accumulation_steps` for `BatchRampTrainer`.

    Raises:
        ValueError: for sizes that are not positive, shrink or are no multiples, a ramp that is no share, or an empty run.
    """
    if not 0 < first <= last or first % multiple_of or last % multiple_of:
        raise ValueError(f"first and last are multiples of {multiple_of} that do not shrink; got {first} and {last}.")
    if not 0 <= ramp <= 1 or sequences < 1:
        raise ValueError(f"ramp is a share of the run's sequences, from 0 to 1; got {ramp} of {sequences}.")
    sizes, done = [], 0
    while done < sequences:
        reached = min(1.0, done / (ramp * sequences)) if ramp else 1.0
        sizes.append(int(first + (last - first) * reached) // multiple_of * multiple_of)
        done += sizes[-1]
    return sizes


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Groups of the trainable parameters for AdamW: matrices decay; vectors, which are norms and biases, do not.

    The reports give a decay of 0.1 and do not say what is left out. A router's `e_score_correction_bias` is in no group, even
    where it is a parameter, as in the official code: no gradient reaches it. `TrainingArguments.weight_decay` has no effect here.

    Raises:
        ValueError: where nothing is trainable.
    """
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith("e_score_correction_bias")
    ]
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad: unfreeze some, or add an adapter."
        )
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class RampBatchSampler(Sampler[list[int]]):
    """Micro-batches of a run whose steps differ in size: step i has `parts`, each of `sizes[i] / parts` indices of `sampler`.

    It goes through `sampler` again whenever that ends, and so is one "epoch" long whatever the data. accelerate deals the
    micro-batches of a step out to the ranks, and asks for `sampler`, `batch_size` and `drop_last`.
    """

    batch_size, drop_last = None, True  # to accelerate: sizes differ, and nothing is to be padded at the end

    def __init__(self, sampler: Sampler[int], sizes: Sequence[int], parts: int):
        self.sampler, self.sizes, self.parts = sampler, sizes, parts

    def __len__(self) -> int:
        return len(self.sizes) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        indices = self._indices()
        for size in self.sizes:
            for _ in range(self.parts):
                yield list(islice(indices, size // self.parts))

    def _indices(self) -> Iterator[int]:
        while True:
            yield from self.sampler


class BatchRampTrainer(Trainer):
    """`Trainer` whose optimiser steps have the sequences of `batch_sizes`, over all ranks; resuming included.

    A step keeps its `gradient_accumulation_steps` micro-batches, on which Trainer's counting rests: they grow, up to
    `per_device_train_batch_size`. A callback that changes the accumulation instead breaks that count in the middle of an epoch.
    `max_steps` says where the run ends, however often that goes through the data. `train_samples_per_second` in the last log is
    that of a run without ramp.

    Args:
        batch_sizes: sequences of each optimiser step, as of `batch_size_ramp`; multiples of ranks x
            `gradient_accumulation_steps`.

    Raises:
        ValueError: when training begins, for other multiples, for micro-batches over `per_device_train_batch_size`, for a
            `max_steps` that is not set or beyond `batch_sizes`, for a dataset that is iterable or empty, and for `ignore_data_skip`
            and `split_batches`.
    """

    def __init__(self, *args, batch_sizes: Sequence[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_sizes = batch_sizes

    def get_train_dataloader(self) -> DataLoader:
        parts = self.get_total_train_batch_size(self.args) // self.args.train_batch_size
        if isinstance(self.train_dataset, IterableDataset) or self.train_dataset is None or not len(self.train_dataset):
            raise ValueError(
                f"BatchRampTrainer draws rows by index, and {type(self.train_dataset).__name__} has none: give a map-style "
                "dataset with rows, or train without a ramp."
            )
        if not 0 < self.args.max_steps <= len(self.batch_sizes):
            raise ValueError(
                f"batch_sizes has {len(self.batch_sizes)} steps, and max_steps is {self.args.max_steps}: set "
                f"TrainingArguments(max_steps={len(self.batch_sizes)}), or less."
            )
        if self.args.ignore_data_skip or self.accelerator.split_batches:
            raise ValueError(
                "A ramp starts anew under ignore_data_skip=True, and under split_batches=True its steps are split over the ranks "
                "once more: leave both out."
            )
        if odd := [size for size in self.batch_sizes if size % parts or size < parts]:
            raise ValueError(
                f"A step of {odd[0]} sequences does not divide into {parts} micro-batches (ranks x gradient_accumulation_steps): "
                f"give batch_size_ramp(..., multiple_of={parts})."
            )
        if max(self.batch_sizes) > parts * self.args.train_batch_size:
            raise ValueError(
                f"A step of {max(self.batch_sizes)} sequences in {parts} micro-batches is over per_device_train_batch_size="
                f"{self.args.per_device_train_batch_size}: raise that, or gradient_accumulation_steps."
            )
        plain = super().get_train_dataloader()  # for its columns, collator and workers
        kept = ("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "persistent_workers", "prefetch_factor")
        loader = DataLoader(
            plain.dataset,
            batch_sampler=RampBatchSampler(self._get_train_sampler(plain.dataset), self.batch_sizes, parts),
            multiprocessing_context=plain.multiprocessing_context,
            **{name: getattr(plain, name) for name in kept},
        )
        return self.accelerator.prepare(loader)
