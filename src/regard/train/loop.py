"""A short training loop on Lightning Fabric, for whatever can say its batches, its loss and its figures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from regard.train.checkpoint import load_checkpoint, save_checkpoint

Batch = tuple[Tensor, ...]
Curve = dict[str, list[float]]
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, linear warm-up and cosine decay to zero, clipped gradients.

    ``warmup`` is a share of all steps, ``clip`` the largest gradient norm. Weight decay is for matrices and kernels only.
    With ``ema`` above 0 what is measured and kept is the average of the weights, of which every step keeps that share.
    ``precision`` is that of the forward pass in training: 32-true, 16-mixed or bf16-mixed; the weights are in float32.
    """

    epochs: int = 6
    batch_size: int = 50
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: str = "32-true"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` out of ``steps``."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        learned = [p for p in model.parameters() if p.requires_grad]
        decayed, plain = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # The fused form undoes the scaling of half precision by itself, after the clipping that has to see it undone.
        return torch.optim.AdamW(groups, lr=self.lr, fused=self.precision != "16-mixed")


class Task(Protocol):
    """What there is to learn. Batches depend on epoch and step alone, so that they are the same for every model."""

    def __len__(self) -> int:
        """Steps in an epoch."""
        ...

    def batch(self, epoch: int, step: int) -> Batch:
        """Tensors that share their first axis."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the first axis of ``batch``."""
        ...

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Figures on data that is not learned from, in one process; nothing is chosen by them."""
        ...


class SingleAttention(TorchFunctionMode):
    """Fused attention on CPUs in single precision: its backward pass in bfloat16 takes several times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return func(*(x.float() for x in args[:3]), *args[3:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch depends on nothing but the seed and the epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    devices: int = 1,
    nodes: int = 1,
    logger: Any = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Curve:
    """Train ``model`` in place and return its curve: for each figure, and for ``loss``, one number an epoch.

    Args:
        model: what ``task`` knows how to call.
        task: batches, loss and figures.
        recipe: the optimiser's settings.
        seed: of dropout; the model's own initial values are the caller's, the order of the data is the task's.
        checkpoint: file to save the run's state in after each epoch. If it exists the run goes on from there, with the
            same numbers as if it had never stopped.
        device: an accelerator name that Lightning Fabric knows.
        devices: processes on each machine, all started by ``torchrun`` and with this call; each batch is divided among them.
        nodes: machines.
        logger: one logger of Lightning Fabric or several, for CSV files, TensorBoard, ...
        report: called after each epoch with its number and figures.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    from lightning_fabric import Fabric

    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=recipe.precision,  # type: ignore[arg-type]
        loggers=logger,
    )
    if fabric.world_size > 1:
        fabric.launch()
    optimizer, curve = recipe.optimizer(model), Curve()
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
    )
    kept = {"model": model} if average is None else {"model": model, "average": average}
    network, stepper = fabric.setup(model, optimizer)
    if checkpoint is not None and Path(checkpoint).exists():
        curve = load_checkpoint(checkpoint, kept, optimizer)
    steps = recipe.epochs * len(task)
    for epoch in range(len(curve.get("loss", [])), recipe.epochs):
        torch.manual_seed((seed * 1_000_003 + epoch) * fabric.world_size + fabric.global_rank)
        network.train()
        total, seen = 0.0, 0
        for i in range(len(task)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch * len(task) + i, steps)
            batch = task.batch(epoch, i)
            mine = tuple(fabric.to_device(t[fabric.global_rank :: fabric.world_size]) for t in batch)
            with nullcontext() if recipe.precision == "32-true" else SingleAttention():
                loss = task.loss(network, mine)
            stepper.zero_grad()
            fabric.backward(loss * (len(mine[0]) * fabric.world_size / len(batch[0])))
            fabric.clip_gradients(network, stepper, max_norm=recipe.clip, error_if_nonfinite=False)
            stepper.step()
            if average is not None:
                average.update_parameters(model)
            total, seen = total + loss.item() * len(mine[0]), seen + len(mine[0])
        mean = _mean(fabric, total, seen)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss became {mean} in epoch {epoch + 1}; try a smaller learning rate"
            )
        used = model if average is None else average.module
        known = measured(task, used, devices) if fabric.is_global_zero else {}
        figures = {"loss": mean, **fabric.broadcast(known)}
        for name, value in figures.items():
            curve.setdefault(name, []).append(value)
        fabric.log_dict(figures, step=(epoch + 1) * len(task))
        if checkpoint is not None and fabric.is_global_zero:
            save_checkpoint(checkpoint, kept, optimizer, curve)
        if report is not None and fabric.is_global_zero:
            report({"epoch": epoch + 1, "epochs": recipe.epochs, **figures})
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return curve


def _mean(fabric: Any, total: float, seen: int) -> float:
    sums = fabric.all_reduce(torch.tensor([total, float(seen)], dtype=torch.float64), reduce_op="sum")
    return (sums[0] / sums[1]).item()


def measured(task: Task, model: nn.Module, devices: int = 1) -> dict[str, float]:
    """The figures of ``model``, by as many threads as the ``devices`` processes have that wait for them."""
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(max(threads, min(threads * devices, os.cpu_count() or 1)))
    with torch.no_grad():
        figures = task.measure(model)
    torch.set_num_threads(threads)
    model.train(training)
    return figures
