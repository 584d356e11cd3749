"""The step on the weights: fp32 master copies, clipping, warm-up, and the refusal of what is not finite."""

from __future__ import annotations

import contextlib
import math

import torch

from processes import like, whole


class Stepper:
    """AdamW on the trainable parameters of a model whose forward may run in bf16.

    The model comes in fp32. With `dtype` bf16 its parameters are rounded, and the fp32 originals stay
    as master copies: at a learning rate of 1e-5 an update is smaller than half the distance between
    neighbouring bf16 numbers and would be lost. Adapters (`use_lora`) are small and stay in fp32.
    """

    def __init__(self, model, options, dtype: torch.dtype):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if options.use_lora else p.detach() for p in self.parameters]  # share the fp32 memory
        for parameter in model.parameters():
            if not (options.use_lora and parameter.requires_grad):
                parameter.data = parameter.data.to(dtype)
        if dtype == torch.float32:
            self.masters = self.parameters
        self.max_grad_norm = options.max_grad_norm
        fused = self.masters[0].device.type in ("cpu", "cuda")
        # one a parameter: then gradients need no fp32 copy of their own all at once, and a parameter's cast,
        # update and rounding follow each other while it is in the cache
        self.optimizers = [torch.optim.AdamW([m], lr=options.lr, weight_decay=options.weight_decay, fused=fused)
                           for m in self.masters]  # fmt: skip
        self.peak_lr, self.warmup, self.linear = options.lr, options.warmup_steps, options.lr_schedule == "linear"
        self.total = options.max_unlearn_steps
        self.taken, self.lr_scale = 0, 1.0  # updates made so far; halved by `slow_down`

    @property
    def lr(self) -> float:
        """The learning rate of the next update: warm-up, then down to zero in a line, or level."""
        if self.taken < self.warmup:
            factor = (self.taken + 1) / (self.warmup + 1)
        else:
            left = max(self.total - self.taken, 0) / max(self.total - self.warmup, 1)
            factor = left if self.linear else 1.0
        return self.peak_lr * factor * self.lr_scale

    @torch.no_grad()
    def step(self) -> float:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping.

        Where the norm is not finite the weights, the moments and the schedule stay as they are.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = whole(torch.linalg.vector_norm(torch.stack(norms))).item() if norms else 0.0
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        lr = self.lr
        for parameter, master, optimizer in zip(self.parameters, self.masters, self.optimizers, strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or not math.isfinite(norm):
                continue
            master.grad = gradient.float().mul_(scale)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)
        self.taken += math.isfinite(norm)
        return norm

    def _round(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    # ---- what a checkpoint keeps
    def state(self) -> dict[str, torch.Tensor]:
        """Masters and AdamW's moments, by number, whole: all that the next update depends on, with `progress`."""
        kept = {}
        for i, (master, optimizer) in enumerate(zip(self.masters, self.optimizers, strict=True)):
            kept[f"{i:05d}.master"] = whole(master.detach())
            for name, tensor in optimizer.state.get(master, {}).items():
                kept[f"{i:05d}.{name}"] = whole(tensor)
        return kept

    def progress(self) -> dict:
        return {"taken": self.taken, "lr_scale": self.lr_scale}

    @torch.no_grad()
    def load_state(self, kept: dict[str, torch.Tensor], progress: dict) -> None:
        for i, (master, optimizer) in enumerate(zip(self.masters, self.optimizers, strict=True)):
            mine = {name.partition(".")[2]: t for name, t in kept.items() if name.startswith(f"{i:05d}.")}
            master.copy_(like(mine.pop("master"), master))
            optimizer.state[master] = {name: like(tensor, master) for name, tensor in mine.items()}
        self._round()
        self.taken, self.lr_scale = progress["taken"], progress["lr_scale"]

    def slow_down(self) -> None:
        """Half the learning rate from here on, and no moments: they point where the fault came from."""
        self.lr_scale /= 2
        for optimizer in self.optimizers:
            optimizer.state.clear()

    @torch.no_grad()
    def snapshot(self) -> list[torch.Tensor]:
        return [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def restore(self, snapshot: list[torch.Tensor]) -> None:
        for master, kept in zip(self.masters, snapshot, strict=True):
            master.copy_(kept)
        self._round()

    @contextlib.contextmanager
    def full_precision(self):
        """Inside, the model holds the fp32 masters themselves: what is saved there has lost nothing."""
        rounded = [p.data for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master.data
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, rounded, strict=True):
                parameter.data = data
