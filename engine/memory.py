"""What a run holds in the memory of its device, part by part, and which options make it fit.

Weights and what the optimizer keeps follow from the parameters. Activations are measured: what autograd saves in the
forward of a few tokens, which needs little memory, grows with the tokens of a step. Source of the parts: docs/scale.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time

import torch

from engine.adapters import disable_gradient_checkpointing, enable_gradient_checkpointing
from engine.processes import local_shard

BYTES_IN_4_BIT = 0.52  # a weight in NF4 with its quantised scales (arXiv 2305.14314, section 3)


@dataclasses.dataclass(frozen=True)
class MemoryParts:
    """Bytes on the device, of this process."""

    weights: float
    residuals: float  # of the fp32 masters, or those of a split model
    gradients: float
    moments: float
    best_state: float
    frozen_head: float
    activations: float  # at the step's peak, with the gradients of one layer
    in_parts: bool = False  # gradients are held while a step's later parts are computed

    @property
    def total(self) -> float:
        """The peak: as the backward goes down, gradients grow while activations shrink."""
        kept = self.weights + self.residuals + self.moments + self.best_state + self.frozen_head
        if self.in_parts:
            return kept + self.gradients + self.activations
        return kept + max(self.gradients, self.activations)

    def line(self) -> str:
        """Return the parts in GiB, the largest first."""
        named = {f.name: getattr(self, f.name) / 2**30 for f in dataclasses.fields(self) if f.name != "in_parts"}
        return ", ".join(f"{name.replace('_', ' ')} {gib:.2f}"
                         for name, gib in sorted(named.items(), key=lambda item: -item[1]) if gib)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd saves for each place (token or padding) of a step: in all layers, plain and with
    checkpointing, and in one layer."""

    plain: float
    checkpointing: float

    def activations(self, places: int, layers: int, *, checkpointing: bool) -> float:
        """Return the bytes at a step's peak. The backward of a layer holds as much again as the layer saved, and with
        checkpointing it first computes what the layer would have saved."""
        one_layer = (self.plain - self.checkpointing) / max(layers, 1)
        return places * (self.checkpointing + 2 * one_layer if checkpointing else self.plain + one_layer)


def measure_saved_bytes(model, forward, places: int, *, num_frozen: int, checkpointing: bool) -> SavedBytes:
    """Run `forward` (with or without its backward) plain and with checkpointing; return bytes a place of its `places`.

    checkpointing: whether the model has it on now, which is restored. A family that has none counts as plain.
    """
    found = {}
    try:
        for on in (False, True):
            _set_checkpointing(model, on, num_frozen)
            with count_saved_bytes(model) as counted:
                forward()
            found[on] = counted[0] / places
    finally:
        _set_checkpointing(model, checkpointing, num_frozen)
    return SavedBytes(plain=found[False], checkpointing=min(found[True], found[False]))


def _set_checkpointing(model, on: bool, num_frozen: int) -> None:
    with contextlib.suppress(ValueError):  # a family without it
        if on:
            enable_gradient_checkpointing(model, num_frozen)
        else:
            disable_gradient_checkpointing(model)


def run_measured(device: torch.device, work) -> tuple[float, float]:
    """Run `work` to its end; return (seconds, bytes that it held at most beyond those held before; NaN on a CPU)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    work()
    if not on_gpu:
        return time.perf_counter() - start, math.nan
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - held


@contextlib.contextmanager
def count_saved_bytes(model):
    """Inside, count in a list's one number the bytes that autograd saves, without the model's own weights."""
    own = {local_shard(t).untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # by address; what is kept is not freed, so no address comes twice
    counted = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage, root = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base
        if isinstance(root, torch.nn.Parameter):  # of a split model: a layer's weights, gathered
            return tensor
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            counted[0] += storage.nbytes()
        # without its history: a node that keeps its own output would hold itself, and all that it saved, for ever
        return tensor.detach().requires_grad_(tensor.requires_grad)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    kept.clear()


def estimate_parts(model, options, saved: SavedBytes, places: int) -> MemoryParts:
    """Return what a run of `model`, as it is loaded, holds when a step has `places` places."""
    weights = sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(local_shard(p).numel() for p in trained)
    rounded = sum(local_shard(p).numel() for p in trained if p.dtype == torch.bfloat16)
    head = model.get_output_embeddings()
    copied = head is not None and head.weight.requires_grad
    layers = model.config.get_text_config().num_hidden_layers
    activations = saved.activations(places, layers, checkpointing=options.gradient_checkpointing)
    return MemoryParts(
        weights=weights, residuals=2 * rounded, gradients=sum(map(_bytes, trained)),
        moments={"adamw": 8, "adamw8bit": 2.03}[options.optimizer] * count,
        best_state=4 * count * bool(options.kl_budget),
        frozen_head=head.weight.numel() * head.weight.element_size() if copied else 0, activations=activations,
        in_parts=options.gradient_accumulation > 1,
    )  # fmt: skip


def switch_that_fits(model, options, rank: int, saved: SavedBytes, places: int, available: float) -> list[str]:
    """Return the options, cheapest first, that bring a run below `available` bytes; [] if none of these does."""
    parts = estimate_parts(model, options, saved, places)
    checkpointed = saved.activations(places, model.config.get_text_config().num_hidden_layers, checkpointing=True)
    linears = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    adapters = sum(rank * (m.in_features + m.out_features) for m in linears)
    in_linears = sum(m.weight.numel() * m.weight.element_size() for m in linears)

    def changed(switches: tuple[str, ...]) -> MemoryParts:
        new = {}
        if "--gradient_checkpointing" in switches:
            new["activations"] = checkpointed
        if "--optimizer adamw8bit" in switches:
            new["moments"] = parts.moments * 2.03 / 8
        if "--use_lora" in switches:
            new |= {"residuals": 2 * adapters, "gradients": 2 * adapters, "moments": 8 * adapters, "frozen_head": 0,
                    "best_state": 4 * adapters * bool(options.kl_budget),
                    "weights": parts.weights + 2 * adapters}  # fmt: skip
        if "--load_in_4bit" in switches:
            base = sum(m.weight.numel() for m in linears)
            new["weights"] = new.get("weights", parts.weights) - in_linears + BYTES_IN_4_BIT * base
        return dataclasses.replace(parts, **new)

    has = {"--gradient_checkpointing": options.gradient_checkpointing, "--use_lora": options.use_lora,
           "--optimizer adamw8bit": options.optimizer == "adamw8bit",
           "--load_in_4bit": options.load_in_4bit}  # fmt: skip
    for switches in (("--gradient_checkpointing",), ("--optimizer adamw8bit",),
                     ("--gradient_checkpointing", "--optimizer adamw8bit"), ("--use_lora",),
                     ("--use_lora", "--gradient_checkpointing"),
                     ("--use_lora", "--gradient_checkpointing", "--load_in_4bit")):  # fmt: skip
        new = tuple(switch for switch in switches if not has[switch])
        needless = has["--use_lora"] and "--optimizer adamw8bit" in switches
        if new and not needless and changed(new).total <= available:
            return list(new)
    return []


def _bytes(tensor: torch.Tensor) -> int:
    return local_shard(tensor).numel() * tensor.element_size()
