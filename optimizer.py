"""The step on the weights: fp32 master copies, clipping, warm-up, and the refusal of what is not finite."""

from __future__ import annotations

import contextlib

import torch


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
        device = self.masters[0].device
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=options.lr, weight_decay=options.weight_decay, fused=device.type in ("cpu", "cuda")
        )

        def factor(step: int) -> float:  # of the peak rate, at step 0, 1, 2, ...
            if step < options.warmup_steps:
                return (step + 1) / (options.warmup_steps + 1)
            total = options.max_unlearn_steps
            left = max(total - step, 0) / max(total - options.warmup_steps, 1)
            return left if options.lr_schedule == "linear" else 1.0

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def lr(self) -> float:
        return self.schedule.get_last_lr()[0]

    @torch.no_grad()
    def step(self) -> float:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping.

        Where the norm is not finite the weights, the moments and the schedule stay as they are.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm).item()
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
            self.schedule.step()
            self._round()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _round(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

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
