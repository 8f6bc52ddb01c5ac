"""The exponential moving average of a model's weights while `Trainer` trains it, kept in CPU memory."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model

EMA_FILE = "ema.safetensors"  # in a checkpoint folder of Trainer


def ema_weights(checkpoint: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The fp32 average that `EMACallback` saved in a checkpoint folder, by the names of the model's own `state_dict()`.

    They go into the model that was trained, whose frozen weights they leave alone:

        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.load_state_dict(ema_weights(checkpoint), strict=False)

    Raises:
        ValueError: if the folder has no average.
    """
    file = Path(checkpoint, EMA_FILE)
    if not file.is_file():
        raise ValueError(f"{file} does not exist: no EMACallback was at work when this checkpoint was saved.")
    return load_file(file)


class EMACallback(TrainerCallback):
    """Averages the weights after every optimiser step, to preview what the decay of the learning rate will bring.

    DeepSeek-V3 (report, section 3.2.3) does so in CPU memory and beside the next step:

        average = decay * average + (1 - decay) * weights

    It starts at the weights that training starts from, in fp32, and covers trainable parameters and the buffers that are saved,
    as the router bias is: callbacks that change these at the end of a step go before this one. On CUDA a side stream copies
    them to pinned memory and a thread averages there, while the next step is computed; only its optimiser waits for the
    copies. The average is in every checkpoint folder (`ema.safetensors`), and a resumed run goes on with it. One rank keeps it:
    the main process.

    Args:
        decay: of the average, from 0 to 1; the report does not give its own.
        resume: what a resumed run goes on with: the average in the checkpoint of its step in `output_dir` (True), in the
            folder that is given, or none (False): a new one starts at the resumed weights.

    Raises:
        ValueError: for a decay that is none; when training begins, for sharded parameters (FSDP, ZeRO-3, tensor parallelism), and
            where a resumed run finds no average, or that of another model.
    """

    def __init__(self, decay: float = 0.999, resume: bool | str | os.PathLike = True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is from 0 to below 1, as in 0.999; got {decay!r}.")
        self.decay, self.resume = decay, resume
        self.model: nn.Module | None = None
        self.averages: dict[str, torch.Tensor] | None = None  # fp32, on the CPU
        self.pinned: dict[str, torch.Tensor] = {}  # the weights of the last step, in their own dtype
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self.pending: Future | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.wait()  # of a run that an error ended
        self.averages, self.pinned, self.streams = None, {}, {}
        self.model = _unwrapped(model)
        weights = _averaged_weights(self.model)
        if args.fsdp or any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights.values()):
            raise ValueError(
                f"EMACallback averages whole parameters; those of this {type(self.model).__name__} are sharded over ranks (FSDP, "
                "ZeRO-3 or tensor parallelism). Train with DDP or ZeRO-1/2, or leave the callback out."
            )
        if state.is_hyper_param_search:
            raise ValueError("EMACallback does not know the folders of a hyper-parameter search: leave it out of that.")
        if not state.is_world_process_zero:
            return
        if state.global_step and self.resume is not False:
            default = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.averages = _resumed(default if self.resume is True else Path(self.resume), weights)
        else:
            self.averages = {
                name: weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
                for name, weight in weights.items()
            }

    def on_step_end(self, args, state, control, **kwargs):
        if self.averages is None:
            return
        self.wait()
        weights = _averaged_weights(self.model)
        if any(weight.is_cuda for weight in weights.values()):
            copied = self._copy_beside(weights)
            self.pending = self.worker.submit(self._average, self.pinned, copied)
        else:
            self._average(weights)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for device, stream in self.streams.items():  # the step overwrites what they may still be reading
            torch.cuda.current_stream(device).wait_stream(stream)

    def on_save(self, args, state, control, **kwargs):
        if self.averages is not None:
            self.wait()
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", EMA_FILE)
            save_file(self.averages, file, metadata={"format": "pt"})

    def on_train_end(self, args, state, control, **kwargs):
        self.wait()

    def save_model(self, folder: str | os.PathLike) -> None:
        """Writes the model with the averaged weights, in its own dtype, for `from_pretrained`; of an adapted one, the adapter.

        Raises:
            ValueError: before training, and on ranks other than the main process.
        """
        if self.averages is None:
            raise ValueError(
                "There is no average to save: train first, and save where trainer.is_world_process_zero()."
            )
        self.wait()
        name_of = {id(weight): name for name, weight in _averaged_weights(self.model).items()}
        live = self.model.state_dict(keep_vars=True)
        # a tied weight stays one tensor under its names
        average = {name: self.averages[name].to(live[name].dtype) for name in self.averages}
        state = {name: average[name_of[id(x)]] if id(x) in name_of else x.detach() for name, x in live.items()}
        self.model.save_pretrained(folder, state_dict=state)

    def wait(self) -> None:
        """Until the average has the last step in it. An error of the thread is raised here."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _copy_beside(self, weights: dict[str, torch.Tensor]) -> list[torch.cuda.Event]:
        """Starts copies of `weights` to pinned memory, on a stream of their own per device; the events tell when they are done."""
        for name, weight in weights.items():
            if name not in self.pinned:
                self.pinned[name] = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
            if weight.is_cuda and weight.device not in self.streams:
                self.streams[weight.device] = torch.cuda.Stream(weight.device)
        # the next forward may already change a buffer: those, which are small, are copied on the device first
        sources = {
            name: weight.detach() if isinstance(weight, nn.Parameter) else weight.detach().clone()
            for name, weight in weights.items()
        }
        for device, stream in self.streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for name, source in sources.items():
            if source.is_cuda:
                stream = self.streams[source.device]
                source.record_stream(stream)
                with torch.cuda.stream(stream):
                    self.pinned[name].copy_(source, non_blocking=True)
            else:
                self.pinned[name].copy_(source)
        return [stream.record_event() for stream in self.streams.values()]

    @torch.no_grad()
    def _average(self, weights: dict[str, torch.Tensor], copied: list[torch.cuda.Event] = ()) -> None:
        for event in copied:
            event.synchronize()
        for name, average in self.averages.items():
            average.lerp_(weights[name].to("cpu", torch.float32), 1 - self.decay)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what accelerate and `torch.compile` put around it, whose names are those of a checkpoint."""
    model = unwrap_model(getattr(model, "_orig_mod", model))
    return getattr(model, "_orig_mod", model)


def _averaged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters and saved buffers of `model`, the live tensors; a tied one is there once, by its first name."""
    weights = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }
    first = {id(tensor): name for name, tensor in reversed(weights.items())}
    return {name: tensor for name, tensor in weights.items() if first[id(tensor)] == name}


def _resumed(checkpoint: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The average in `checkpoint`, if it is one of `weights`."""
    file = checkpoint / EMA_FILE
    if not file.is_file():
        raise ValueError(
            f"Training resumes without its average: {file} does not exist. Say where it is, EMACallback(resume=checkpoint_folder), "
            "or start a new one at the resumed weights, EMACallback(resume=False)."
        )
    averages = load_file(file)
    for name in sorted(averages.keys() | weights.keys()):
        saved, live = (tuple(found[name].shape) if name in found else None for found in (averages, weights))
        if saved != live:
            raise ValueError(
                f"{file} is the average of another model: {name} has shape {saved} there and {live} here. Give the folder of this "
                "one, EMACallback(resume=checkpoint_folder), or start anew, EMACallback(resume=False)."
            )
    return averages
