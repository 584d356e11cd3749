"""AdamW for bf16 training with exact fp32 master weights, with clipping and a learning rate schedule.

Each master weight is a bf16 weight, which the model computes with, and an int16 rounding residual; together they
restore it bit for bit, in the memory of one fp32 number. An update goes through a tensor part by part, so the fp32
forms of gradient and weight exist only for one part, which stays in the cache.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from engine.processes import full_tensor, gather_to_main_cpu, local_shard, shard_like
from options import COUNT, WEIGHT, number, option
from utils import UsageError

# Elements that are held in fp32 at a time: on a CPU 1 MiB an array, which stays in the cache.
PART = {"cpu": 1 << 18, "gpu": 1 << 24}
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's settings. total_steps: where the linear schedule reaches 0; schedule: linear or constant; kind: adamw or
    adamw8bit; adapters: only low-rank adapters are trained, so the base's rounding residuals are not kept."""

    lr: float
    total_steps: int
    schedule: Literal["linear", "constant"] = option("linear", "after the warm-up: down to zero, or level")
    warmup_steps: COUNT = option(0, "steps over which the learning rate rises")
    weight_decay: WEIGHT = option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: number(float, 0, above=True) = option(1.0, "gradients are clipped to this global norm")
    kind: str = "adamw"
    adapters: bool = False


class MasterWeightAdamW:
    """AdamW on the trainable parameters of a model whose forward may run in bf16.

    The model is given in fp32. With `dtype` bf16 its parameters are rounded in place and the residuals are kept: at a
    learning rate of 1e-5, an update is smaller than half the distance of neighbouring bf16 numbers and would be lost.
    Trained are the parameters that require a gradient. A step whose gradient norm is not finite changes nothing.
    """

    def __init__(self, model, settings: OptimizerSettings, dtype: torch.dtype):
        names: dict[torch.nn.Parameter, list[str]] = {}  # a tied weight has several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.names = [names[p] for p in self.parameters]  # of each trained parameter: its names in the model
        self._adapters = settings.adapters
        self._residuals: dict[torch.nn.Parameter, torch.Tensor] = {}  # int16; none if rounding lost nothing
        for parameter in model.parameters():
            if dtype == torch.float32 or parameter.dtype != torch.float32:  # 4- and 8-bit codes must not be cast
                continue
            master, parameter.data = parameter.data, parameter.data.to(dtype)
            # Frozen weights are saved exactly, too. Adapters are merged into a base that is loaded afresh.
            if parameter.requires_grad or not self._adapters:
                residual = torch.empty_like(master, dtype=torch.int16)
                split_fp32(master, parameter.data, residual)
                if parameter.requires_grad or residual.any():
                    self._residuals[parameter] = residual
        self._scratch = WorkBuffers(self.parameters)
        self._moments: list[dict] = [{} for _ in self.parameters]  # filled by a parameter's first update
        self._update = adamw_8bit if settings.kind == "adamw8bit" else adamw_32bit
        self.settings = settings
        self.num_updates, self.lr_scale = 0, 1.0  # of the updates so far; of the learning rate

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update: a linear warm-up, then linear decay to 0, or constant."""
        settings, done = self.settings, self.num_updates
        if done < settings.warmup_steps:
            factor = (done + 1) / (settings.warmup_steps + 1)
        else:
            left = max(settings.total_steps - done, 0) / max(settings.total_steps - settings.warmup_steps, 1)
            factor = left if settings.schedule == "linear" else 1.0
        return settings.lr * factor * self.lr_scale

    @torch.no_grad()
    def step(self) -> float:
        """Clip, update and clear the gradients; return the gradient norm before clipping.

        If the norm is not finite, weights, moments and schedule stay as they are.
        """
        norms = [self._scratch.norm(p.grad) for p in self.parameters if p.grad is not None]
        norm = full_tensor(torch.linalg.vector_norm(torch.stack(norms))).item() if norms else 0.0
        scale, lr = min(1.0, self.settings.max_grad_norm / (norm + 1e-6)), self.lr
        for parameter, moments in zip(self.parameters, self._moments, strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and math.isfinite(norm):
                self._update_one(parameter, gradient, moments, scale, lr)
        self.num_updates += math.isfinite(norm)
        return norm

    def _update_one(self, parameter, gradient, moments: dict, scale: float, lr: float) -> None:
        moments["step"] = moments.get("step", torch.zeros((), device=parameter.device)) + 1
        residual = self._residuals.get(parameter)
        flat, grads = local_shard(parameter.detach()).view(-1), local_shard(gradient).reshape(-1)
        for part in parts_of(flat):
            weights, grad = flat[part], self._scratch.fp32(grads[part]).mul_(scale)
            if residual is None:
                self._update(weights, grad, moments, parameter, part, lr=lr, weight_decay=self.settings.weight_decay)
            else:
                master = merge_fp32(weights, residual.view(-1)[part], out=self._scratch.master[: len(weights)])
                self._update(master, grad, moments, parameter, part, lr=lr, weight_decay=self.settings.weight_decay)
                split_fp32(master, weights, residual.view(-1)[part], high_bits=self._scratch.high_bits[: len(weights)])

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    # ---- master weights, and the state in a checkpoint
    @torch.no_grad()
    def master(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight of the model in fp32, with its residual; with adapters, a weight of the base as it is."""
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor.detach()
        residual = self._residuals.get(tensor)
        if residual is not None:
            return merge_fp32(tensor.detach(), residual)
        return tensor.detach() if self._adapters else tensor.detach().float()

    @torch.no_grad()
    def _set_master(self, parameter, master: torch.Tensor) -> None:
        if parameter in self._residuals:
            split_fp32(master.contiguous(), parameter.detach(), self._residuals[parameter])
        else:
            parameter.copy_(master)

    def state(self, *, masters: bool = True) -> dict[str, torch.Tensor]:
        """Return AdamW's moments and, with `masters`, the master weights, by the parameter's number: NNNNN.NAME.

        With `progress`, that is all the next update depends on. The tensors are whole, in main memory; in processes
        other than the first, each is None. Every process must call it.
        """
        kept = {}
        for i, (parameter, moments) in enumerate(zip(self.parameters, self._moments, strict=True)):
            if masters:
                kept[f"{i:05d}.master"] = gather_to_main_cpu(self.master(parameter))
            for name, tensor in moments.items():
                kept[f"{i:05d}.{name}"] = gather_to_main_cpu(tensor)
        return kept

    def progress(self) -> dict:
        return {"taken": self.num_updates, "lr_scale": self.lr_scale}

    def load_state(self, kept: dict[str, torch.Tensor], progress: dict) -> None:
        """Take up what `state` (with masters) and `progress` gave, on the same trained parameters."""
        for i, parameter in enumerate(self.parameters):
            mine = {name.partition(".")[2]: t for name, t in kept.items() if name.startswith(f"{i:05d}.")}
            self._set_master(parameter, shard_like(mine.pop("master"), parameter))
            self._moments[i] = {name: shard_like(tensor, parameter) for name, tensor in mine.items()}
        self.num_updates, self.lr_scale = progress["taken"], progress["lr_scale"]

    def halve_lr_and_reset(self) -> None:
        """Halve the learning rate and reset AdamW's moments, which still point towards the failed step."""
        self.lr_scale /= 2
        self._moments = [{} for _ in self.parameters]

    def snapshot(self) -> list[torch.Tensor]:
        """Return copies of the trained master weights, on their device."""
        return [self.master(parameter).clone() for parameter in self.parameters]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Set the trained weights to those of a `snapshot`; the moments stay."""
        for parameter, kept in zip(self.parameters, snapshot, strict=True):
            self._set_master(parameter, kept)


# ------------------------------------------------------------------------------------- one part of one tensor
def adamw_32bit(master, grad, moments: dict, parameter, part: slice, *, lr: float, weight_decay: float) -> None:
    """Update `part` of a parameter by AdamW with fp32 moments. master, grad (P,) fp32; master is changed in place."""
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in moments:
            moments[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    first, second = (local_shard(moments[name]).view(-1)[part] for name in ("exp_avg", "exp_avg_sq"))
    adamw([master], [grad], [first], [second], [], [moments["step"] - 1], fused=True, amsgrad=False, maximize=False,
          lr=lr, weight_decay=weight_decay, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON)  # fmt: skip


def adamw_8bit(master, grad, moments: dict, parameter, part: slice, *, lr: float, weight_decay: float) -> None:
    """Do the same with 8-bit moments, scaled in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861).

    Tensors below 4,096 elements (norms and biases) keep fp32 moments, as in the paper.
    """
    if parameter.numel() < 4096:
        return adamw_32bit(master, grad, moments, parameter, part, lr=lr, weight_decay=weight_decay)
    from bitsandbytes import functional

    if not moments.keys() - {"step"}:
        size = local_shard(parameter).numel()
        for name, signed in (("1", True), ("2", False)):
            moments["state" + name] = torch.zeros(size, dtype=torch.uint8, device=parameter.device)
            moments["absmax" + name] = torch.zeros(-(-size // 256), device=parameter.device)
            moments["qmap" + name] = functional.create_dynamic_map(signed=signed).to(parameter.device)
    blocks = slice(part.start // 256, -(-part.stop // 256))
    functional.optimizer_update_8bit_blockwise(
        "adam", grad, master, moments["state1"][part], moments["state2"][part], *BETAS, 0.0, 0.0, EPSILON,
        int(moments["step"]), lr, moments["qmap1"], moments["qmap2"], moments["absmax1"][blocks],
        moments["absmax2"][blocks], weight_decay,
    )  # fmt: skip


def refuse_missing_8bit(options) -> None:
    """Raise UsageError if --optimizer adamw8bit cannot run: with --shard, or without bitsandbytes."""
    if options.optimizer != "adamw8bit":
        return
    if options.shard:
        raise UsageError("--optimizer adamw8bit does not go with --shard, which splits the state already")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError("--optimizer adamw8bit: needs the package bitsandbytes: pip install bitsandbytes") from error


# ------------------------------------------------------------- a master weight as bf16 and rounding residual
def split_fp32(master: torch.Tensor, rounded: torch.Tensor, residual: torch.Tensor, *, high_bits=None) -> None:
    """Write the nearest bf16 to `rounded` and its distance, in units of fp32's last place, to `residual` (int16).

    Ties round away from zero, so that the residual always fits. high_bits: an int32 buffer of that length, if any.
    """
    bits = master.view(torch.int32)
    high_bits = torch.add(bits, 0x8000, out=high_bits).bitwise_right_shift_(16)
    rounded.view(torch.int16).copy_(high_bits)
    residual.copy_(torch.sub(bits, high_bits.bitwise_left_shift_(16), out=high_bits))


def merge_fp32(rounded: torch.Tensor, residual: torch.Tensor, *, out=None) -> torch.Tensor:
    """Return the fp32 master of a bf16 tensor and its residual: the exact inverse of `split_fp32`."""
    bits = torch.empty_like(residual, dtype=torch.int32) if out is None else out.view(torch.int32)
    return bits.copy_(rounded.view(torch.int16)).bitwise_left_shift_(16).add_(residual).view(torch.float32)


class WorkBuffers:
    """Buffers for one part in fp32, used again for each: allocating them would cost more than the arithmetic."""

    def __init__(self, parameters):
        size, device = max((min(_part(p), local_shard(p).numel()) for p in parameters), default=0), parameters[0].device
        self.master, self.grad = torch.empty(2, size, device=device)
        self.high_bits = torch.empty(size, dtype=torch.int32, device=device)

    def fp32(self, part: torch.Tensor) -> torch.Tensor:
        """Return a part of a gradient in fp32: itself, if it is fp32 already."""
        return part if part.dtype == torch.float32 else self.grad[: len(part)].copy_(part)

    def norm(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient's norm in fp32, without the fp32 copy of the whole tensor that torch would make."""
        if isinstance(gradient, DTensor) or gradient.dtype == torch.float32:
            return torch.linalg.vector_norm(gradient, dtype=torch.float32)
        flat = gradient.reshape(-1)
        return torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(self.fp32(flat[part])) for part in parts_of(flat)])
        )


def parts_of(flat: torch.Tensor) -> list[slice]:
    """Return the slices in which a flat tensor is updated."""
    return [slice(start, min(start + _part(flat), len(flat))) for start in range(0, len(flat), _part(flat))]


def _part(tensor: torch.Tensor) -> int:
    return PART["cpu" if tensor.device.type == "cpu" else "gpu"]
