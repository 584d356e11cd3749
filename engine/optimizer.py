"""AdamW for bf16 training with exact fp32 master weights, with clipping and a learning rate schedule.

Each master weight is a bf16 weight, which the model computes with, and an int16 rounding residual; together they
restore it bit for bit, in the memory of one fp32 number. The trained weights lie in flat buffers (flat_weights.py). On
a GPU, one kernel updates a buffer (fused_update.py); elsewhere an update goes through it part by part, so that the fp32
forms of gradient and weight exist only for one part, which stays in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from engine.flat_weights import ALIGN, FlatWeights, merge_fp32, split_fp32
from engine.fused_update import FusedAdamW, why_not_fused
from engine.processes import full_tensor, gather_to_main_cpu, local_shard, shard_like
from options import COUNT, WEIGHT, number, option
from utils import UsageError

__all__ = ["MasterWeightAdamW", "OptimizerSettings", "merge_fp32", "refuse_missing_8bit", "split_fp32"]

BETAS, EPSILON = (0.9, 0.999), 1e-8
SMALLEST_IN_8_BIT = 4096  # elements; smaller tensors (norms and biases) keep fp32 moments (arXiv 2110.02861)


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


def global_norm(tensors: list[torch.Tensor]) -> float:
    """Return the norm of all tensors together, worked out in fp32; 0 for none. It waits for the device."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.stack(norms).norm().item() if norms else 0.0


class MasterWeightAdamW:
    """AdamW on the trainable parameters of a model whose forward may run in bf16.

    The model is given as it was read. With `dtype` bf16 its parameters are rounded in place and the residuals are kept:
    at a learning rate of 1e-5, an update is smaller than half the distance of neighbouring bf16 numbers and would be
    lost. Trained are the parameters that require a gradient; they become views of a flat buffer. A step whose gradient
    norm is not finite changes nothing.
    """

    def __init__(self, model, settings: OptimizerSettings, dtype: torch.dtype):
        names: dict[torch.nn.Parameter, list[str]] = {}  # a tied weight has several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.names = [names[p] for p in self.parameters]  # of each trained parameter: its names in the model
        self.settings, self._adapters = settings, settings.adapters
        self._residuals: dict[torch.nn.Parameter, torch.Tensor] = {}  # of frozen weights, where rounding lost something
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16):
                self._round_frozen(parameter, dtype)  # 4- and 8-bit codes must not be cast
        self.flats = _flat_weights(self.parameters, dtype, eight_bit=settings.kind == "adamw8bit")
        self._of = {p: (flat, number) for flat in self.flats for number, p in enumerate(flat.parameters)}
        reasons = [why_not_fused(flat) for flat in self.flats]
        self.not_fused = next((reason for reason in reasons if reason), None)  # why the parts are gone through instead
        self._fused = {flat: FusedAdamW(flat) for flat, reason in zip(self.flats, reasons, strict=True) if not reason}
        self._work = WorkBuffers(self.flats)
        self.num_updates, self.lr_scale = 0, 1.0  # of the updates so far; of the learning rate
        self.restarted_at = 0  # the updates before the schedule began anew

    def _round_frozen(self, parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
        if parameter.dtype == dtype:
            return
        values, parameter.data = parameter.data, parameter.data.to(dtype)
        # Frozen weights are saved exactly, too. Adapters are merged into a base that is loaded afresh.
        if dtype == torch.bfloat16 and not self._adapters:
            residual = torch.empty_like(values, dtype=torch.int16)
            split_fp32(values.float(), parameter.data, residual)
            if residual.any():
                self._residuals[parameter] = residual

    @property
    def updates_of_run(self) -> int:
        """Return the updates since the schedule began."""
        return self.num_updates - self.restarted_at

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update: a linear warm-up, then linear decay to 0, or constant."""
        settings, done = self.settings, self.updates_of_run
        if done < settings.warmup_steps:
            factor = (done + 1) / (settings.warmup_steps + 1)
        else:
            left = max(settings.total_steps - done, 0) / max(settings.total_steps - settings.warmup_steps, 1)
            factor = left if settings.schedule == "linear" else 1.0
        return settings.lr * factor * self.lr_scale

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Return the norm of all gradients, a scalar fp32 tensor on their device; nothing waits for it."""
        norms: list[torch.Tensor] = []
        for flat in self.flats:
            if flat in self._fused:
                norms.append(self._fused[flat].grad_norm())
            else:
                norms += self._norms(flat)
        return full_tensor(torch.linalg.vector_norm(torch.stack(norms))) if norms else torch.zeros(())

    @torch.no_grad()
    def step(self, norm: float | None = None) -> float:
        """Clip, update and clear the gradients; return the gradient norm before clipping.

        norm: what `grad_norm` gave, if it has been read already; then nothing waits for the device here. If it is not
        finite, weights, moments and schedule stay as they are.
        """
        norm = self.grad_norm().item() if norm is None else norm
        scale, lr = min(1.0, self.settings.max_grad_norm / (norm + 1e-6)), self.lr
        if math.isfinite(norm):
            for flat in self.flats:
                for place in range(len(flat.parameters)):
                    flat.link(place)
                if flat in self._fused:
                    self._fused[flat].update(scale=scale, lr=lr, weight_decay=self.settings.weight_decay, betas=BETAS,
                                             epsilon=EPSILON)  # fmt: skip
                else:
                    self._update(flat, scale, lr)
            self.num_updates += 1
        self.drop_gradients()
        return norm

    def _norms(self, flat: FlatWeights) -> list[torch.Tensor]:
        """Return the norms of the parts of a buffer's gradient, or of a split parameter's whole gradient."""
        if flat.sharded:
            gradient = flat.parameters[0].grad
            return [] if gradient is None else [torch.linalg.vector_norm(gradient, dtype=torch.float32)]
        gradients = flat_gradients(flat)
        return [torch.linalg.vector_norm(flat.gradient(part, gradients, self._work.grad))
                for place, _ in flat.runs() for part in flat.parts(place)]  # fmt: skip

    def _update(self, flat: FlatWeights, scale: float, lr: float) -> None:
        """Update a buffer part by part."""
        update = adamw_8bit if flat.eight_bit else adamw_32bit
        settings = {"lr": lr, "weight_decay": self.settings.weight_decay}
        gradients, work = flat_gradients(flat), self._work
        for place, numbers in flat.runs():
            done = flat.steps[numbers[0]]
            for part in flat.parts(place):
                weights = flat.weights[part]
                grad = flat.gradient(part, gradients, work.grad).mul_(scale)
                if flat.residuals is None:
                    update(weights, grad, flat, part, done, **settings)
                    continue
                residuals = flat.residuals[part]
                master = merge_fp32(weights, residuals, out=work.master[: len(weights)])
                update(master, grad, flat, part, done, **settings)
                split_fp32(master, weights, residuals, high_bits=work.high_bits[: len(weights)])
            for number_in_flat in numbers:
                flat.steps[number_in_flat] = done + 1

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    # ---- master weights, and the state in a checkpoint
    @torch.no_grad()
    def master(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight of the model in fp32, with its residual; with adapters, a weight of the base as it is."""
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor.detach()
        if tensor in self._of:
            flat, place = self._of[tensor]
            return flat.master(place)
        residual = self._residuals.get(tensor)
        if residual is not None:
            return merge_fp32(tensor.detach(), residual)
        return tensor.detach() if self._adapters else tensor.detach().float()

    def state(self, *, masters: bool = True) -> dict[str, torch.Tensor]:
        """Return AdamW's moments and, with `masters`, the master weights, by the parameter's number: NNNNN.NAME.

        With `progress`, that is all the next update depends on. The tensors are whole, in main memory; in processes
        other than the first, each is None. Every process must call it.
        """
        kept = {}
        for i, parameter in enumerate(self.parameters):
            flat, place = self._of[parameter]
            if masters:
                kept[f"{i:05d}.master"] = gather_to_main_cpu(self.master(parameter))
            if flat.steps[place]:
                kept[f"{i:05d}.step"] = gather_to_main_cpu(torch.tensor(float(flat.steps[place])))
                for name, moment in flat.moments.items():
                    some = moment[flat.moment_place(name, place)]
                    some = some if name.startswith(("state", "absmax")) else flat.shaped(place, some)
                    kept[f"{i:05d}.{name}"] = gather_to_main_cpu(some)
        return kept

    def progress(self) -> dict:
        return {"taken": self.num_updates, "lr_scale": self.lr_scale, "restarted_at": self.restarted_at}

    @torch.no_grad()
    def load_state(self, kept: dict[str, torch.Tensor], progress: dict) -> None:
        """Take up what `state` (with masters) and `progress` gave, on the same trained parameters."""
        self._reset_moments()
        for i, parameter in enumerate(self.parameters):
            flat, place = self._of[parameter]
            mine = {name.partition(".")[2]: t for name, t in kept.items() if name.startswith(f"{i:05d}.")}
            flat.set_master(place, shard_like(mine.pop("master"), parameter))
            if "step" in mine:
                flat.steps[place] = int(mine["step"])
                flat.make_moments()
                for name, moment in flat.moments.items():
                    moment[flat.moment_place(name, place)] = local_shard(shard_like(mine[name], parameter)).view(-1)
        self.num_updates, self.lr_scale = progress["taken"], progress["lr_scale"]
        self.restarted_at = progress["restarted_at"]

    def _reset_moments(self) -> None:
        for flat in self.flats:
            flat.reset_moments()

    def halve_lr_and_reset(self) -> None:
        """Halve the learning rate and reset AdamW's moments, which still point towards the failed step."""
        self.lr_scale /= 2
        self._reset_moments()

    def restart(self, snapshot: list[torch.Tensor]) -> None:
        """Begin anew with the weights of a `snapshot`: no moments, and the schedule at its start."""
        self.restore(snapshot)
        self._reset_moments()
        self.restarted_at = self.num_updates

    def snapshot(self) -> list[torch.Tensor]:
        """Return copies of the trained master weights, on their device."""
        masters = [self.master(parameter) for parameter in self.parameters]
        return [m.clone() if p.dtype == m.dtype else m for m, p in zip(masters, self.parameters, strict=True)]

    @torch.no_grad()
    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Set the trained weights to those of a `snapshot`; the moments stay."""
        for parameter, kept in zip(self.parameters, snapshot, strict=True):
            flat, place = self._of[parameter]
            flat.set_master(place, kept)


def _flat_weights(parameters: list, dtype: torch.dtype, *, eight_bit: bool) -> list[FlatWeights]:
    """Return the buffers of some parameters: one a device and kind of moments; a split parameter is its own."""
    by_kind: dict[tuple, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        own = id(parameter) if isinstance(parameter, DTensor) else None
        in_8_bit = eight_bit and parameter.numel() >= SMALLEST_IN_8_BIT
        by_kind.setdefault((parameter.device, in_8_bit, own), []).append(parameter)
    return [FlatWeights(some, dtype, eight_bit=kind[1]) for kind, some in by_kind.items()]


def flat_gradients(flat: FlatWeights) -> list[torch.Tensor | None]:
    """Return each parameter's gradient, flat; None for none."""
    return [None if p.grad is None else local_shard(p.grad).reshape(-1) for p in flat.parameters]


# ------------------------------------------------------------------------------------------ one part of a buffer
def adamw_32bit(master, grad, flat: FlatWeights, part: slice, done: int, *, lr: float, weight_decay: float) -> None:
    """Update a part by AdamW with fp32 moments: master, grad (n,) fp32; master is changed in place.

    done: the updates of the part so far.
    """
    flat.make_moments()
    first, second = (flat.moments[name][part] for name in ("exp_avg", "exp_avg_sq"))
    step = torch.full((), done + 1.0, device=master.device)
    # torch.optim.adamw's own kernel; around it, torch spends as long on checks as the kernel on a small part
    torch._fused_adamw_([master], [grad], [first], [second], [], [step], lr=lr, beta1=BETAS[0], beta2=BETAS[1],
                        weight_decay=weight_decay, eps=EPSILON, amsgrad=False, maximize=False)  # fmt: skip


def adamw_8bit(master, grad, flat: FlatWeights, part: slice, done: int, *, lr: float, weight_decay: float) -> None:
    """Do the same with 8-bit moments, scaled in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861)."""
    from bitsandbytes import functional

    flat.make_moments()
    moments, blocks = flat.moments, slice(part.start // ALIGN, -(-part.stop // ALIGN))
    maps = [_dynamic_map(signed, master.device) for signed in (True, False)]
    functional.optimizer_update_8bit_blockwise(
        "adam", grad, master, moments["state1"][part], moments["state2"][part], *BETAS, 0.0, 0.0, EPSILON, done + 1,
        lr, *maps, moments["absmax1"][blocks], moments["absmax2"][blocks], weight_decay,
    )  # fmt: skip


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the 256 values that codes of 8-bit moments stand for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)


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


class WorkBuffers:
    """Buffers for one part in fp32, used again for each: allocating them would cost more than the arithmetic."""

    def __init__(self, flats: list[FlatWeights]):
        flats = [flat for flat in flats if why_not_fused(flat)]
        size = max((part.stop - part.start for flat in flats for part in flat.parts(slice(0, len(flat.weights)))[:1]),
                   default=0)  # fmt: skip
        device = flats[0].weights.device if flats else None
        self.master, self.grad = torch.empty(2, size, device=device)
        self.high_bits = torch.empty(size, dtype=torch.int32, device=device)
