"""Trained weights in one flat buffer, of which each parameter is a view, with their rounding residuals and moments.

A model has hundreds of parameters. One buffer for all of them is updated by a few launches on a GPU, and in parts that
fill the cache on a CPU. Letters: P places of a buffer, n places of a part.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from engine.processes import local_shard

ALIGN = 256  # places: a parameter starts at a multiple, so that no block of 8-bit moments holds two parameters
# Places that are held in fp32 at a time: on a CPU 1 MiB an array, which stays in the cache.
PART = {"cpu": 1 << 18, "gpu": 1 << 24}


class FlatWeights:
    """Some trained parameters of a model, one after another in a buffer `weights` (P,).

    With `dtype` bf16, `residuals` (P,) int16 restore the fp32 masters (`split_fp32`); with fp32 it is None.
    `moments`: AdamW's, by name, each for all places; `steps`: the updates of each parameter so far. Places between two
    parameters hold zeros. A part of a parameter that is split over processes (FSDP2) stays in its own memory, which
    then is the whole buffer.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], dtype: torch.dtype, *, eight_bit: bool = False):
        self.parameters, self.eight_bit = parameters, eight_bit
        self.sharded = isinstance(parameters[0], DTensor)
        self.sizes = [local_shard(p).numel() for p in parameters]
        self.starts, end = [], 0
        for size in self.sizes:
            self.starts.append(end)
            end += -(-size // ALIGN) * ALIGN
        device = parameters[0].device
        self.residuals = None
        if self.sharded:
            assert len(parameters) == 1 and dtype == parameters[0].dtype == torch.float32
            self.weights = local_shard(parameters[0].detach()).view(-1)
        else:
            self.weights = torch.zeros(end, dtype=dtype, device=device)
            if dtype == torch.bfloat16:
                self.residuals = torch.zeros(end, dtype=torch.int16, device=device)
            for number, parameter in enumerate(parameters):
                self._take_in(number, parameter)
        self._address = self.weights.data_ptr()
        self.reset_moments()
        self._segments: dict[tuple[int, int], list[tuple[int, slice, slice]]] = {}

    def _take_in(self, number: int, parameter: torch.nn.Parameter) -> None:
        """Move a parameter's values into the buffer and make the parameter a view of its place."""
        values, place = parameter.detach().reshape(-1), self.place(number)
        if self.residuals is None or values.dtype == torch.bfloat16:
            self.weights[place].copy_(values)  # what is stored in bf16 has no residuals
        else:
            split_fp32(values.float(), self.weights[place], self.residuals[place])
        parameter.data = self.weights[place].view(parameter.shape)

    def link(self, number: int) -> None:
        """Make a parameter a view of its place again, if something gave it other memory: a wrapper for several
        processes does when it moves the model from "cpu" to "cpu:0"."""
        parameter = self.parameters[number]
        if self.sharded:
            self.weights = local_shard(parameter.detach()).view(-1)
        elif parameter.data_ptr() != self._address + self.starts[number] * self.weights.element_size():
            view = self.weights[self.place(number)]
            view.copy_(parameter.detach().reshape(-1))
            parameter.data = view.view(parameter.shape)

    def reset_moments(self) -> None:
        """Forget all moments; they are made again by the next update."""
        self.moments: dict[str, torch.Tensor] = {}
        self.steps = [0] * len(self.parameters)

    def make_moments(self) -> None:
        """Make the moments, as zeros, if there are none yet; those in 8 bits have a scale for each block of ALIGN."""
        if self.moments:
            return
        size, device = len(self.weights), self.weights.device
        if not self.eight_bit:
            self.moments = {name: torch.zeros(size, dtype=torch.float32, device=device)
                            for name in ("exp_avg", "exp_avg_sq")}  # fmt: skip
            return
        for name in ("1", "2"):
            self.moments["state" + name] = torch.zeros(size, dtype=torch.uint8, device=device)
            self.moments["absmax" + name] = torch.zeros(-(-size // ALIGN), device=device)

    def moment_place(self, name: str, number: int) -> slice:
        """Return the place of a parameter in a moment."""
        place = self.place(number)
        return slice(place.start // ALIGN, -(-place.stop // ALIGN)) if name.startswith("absmax") else place

    def place(self, number: int) -> slice:
        """Return the place of a parameter in the buffer."""
        return slice(self.starts[number], self.starts[number] + self.sizes[number])

    def runs(self) -> list[tuple[slice, list[int]]]:
        """Return (place, parameters) of each stretch of neighbours that have a gradient and equally many updates."""
        runs: list[list[int]] = []
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if runs and runs[-1][-1] == number - 1 and self.steps[number - 1] == self.steps[number]:
                runs[-1].append(number)
            else:
                runs.append([number])
        return [(slice(self.starts[run[0]], self.place(run[-1]).stop), run) for run in runs]

    def parts(self, place: slice) -> list[slice]:
        """Return the slices in which a stretch of the buffer is worked on."""
        size = PART["cpu" if self.weights.device.type == "cpu" else "gpu"]
        return [slice(start, min(start + size, place.stop)) for start in range(place.start, place.stop, size)]

    def gradient(self, part: slice, gradients: list[torch.Tensor | None], buffer: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a part in fp32 (n,); it may be written to, and holds until the next call.

        gradients: a flat one of each parameter; buffer: fp32 memory, of which the result is a part unless one
        parameter's gradient is fp32 already and fills the part.
        """
        segments = self._segments_of(part)
        if len(segments) == 1:
            number, into, place = segments[0]
            if into.stop - into.start == part.stop - part.start and gradients[number].dtype == torch.float32:
                return gradients[number][place]
        gradient = buffer[: part.stop - part.start]
        if sum(into.stop - into.start for _, into, _ in segments) < len(gradient):
            gradient.zero_()  # the places between two parameters
        torch._foreach_copy_([gradient[into] for _, into, _ in segments],
                             [gradients[number][place] for number, _, place in segments])  # fmt: skip
        return gradient

    def _segments_of(self, part: slice) -> list[tuple[int, slice, slice]]:
        """Return (parameter, slice of the part, slice of the parameter) of all parameters that a part holds."""
        key = part.start, part.stop
        if key not in self._segments:
            found = []
            for number, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
                first, last = max(start, part.start), min(start + size, part.stop)
                if first < last:
                    found.append((number, slice(first - part.start, last - part.start),
                                  slice(first - start, last - start)))  # fmt: skip
            self._segments[key] = found
        return self._segments[key]

    # ---- one parameter at a time, for checkpoints
    def master(self, number: int) -> torch.Tensor:
        """Return the fp32 master of a parameter, in its shape; without residuals it is the parameter itself."""
        if self.sharded or self.residuals is None:
            return self.parameters[number].detach()
        place = self.place(number)
        return merge_fp32(self.weights[place], self.residuals[place]).view(self.parameters[number].shape)

    def set_master(self, number: int, master: torch.Tensor) -> None:
        """Set the fp32 master of a parameter (split like the parameter)."""
        self.link(number)
        place, values = self.place(number), local_shard(master).reshape(-1)
        if self.residuals is None:
            self.weights[place].copy_(values)
        else:
            split_fp32(values.contiguous(), self.weights[place], self.residuals[place])

    def shaped(self, number: int, flat: torch.Tensor) -> torch.Tensor:
        """Return a moment of a parameter in its shape, split as the parameter is."""
        parameter = self.parameters[number]
        local = flat.view(local_shard(parameter).shape)
        if not self.sharded:
            return local
        return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                                  shape=parameter.shape, stride=parameter.stride())  # fmt: skip


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
