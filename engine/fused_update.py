"""AdamW on a flat buffer of weights by one kernel on a GPU: every number is read and written once.

An update in parts (optimizer.py) moves each fp32 form through the GPU's memory several times. Here 26 bytes a weight
move (weight, residual and two moments both ways, the gradient once), and 2 for the norm: 37 GB for 1.3 billion weights.
The kernel takes each gradient from where autograd has left it, by a table of addresses. Its numbers are those of
torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).
"""

from __future__ import annotations

import math

import torch

from engine.flat_weights import FlatWeights
from engine.processes import copy_to

try:  # comes with torch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 1024  # places a program instance works on


def why_not_fused(flat: FlatWeights) -> str | None:
    """Return why the kernel cannot update a buffer; None if it can."""
    if flat.weights.device.type != "cuda":
        return "the weights are not on a GPU"
    if triton is None:
        return "the package triton is missing"
    if flat.sharded:
        return "each process holds parts of parameters"
    return "moments are kept in 8 bits" if flat.eight_bit else None


class FusedAdamW:
    """The kernel's launches on one buffer, with the tables that they need."""

    def __init__(self, flat: FlatWeights):
        self.flat, device = flat, flat.weights.device
        blocks = [-(-size // BLOCK) for size in flat.sizes]
        counts = torch.tensor(blocks)
        owners = torch.repeat_interleave(torch.arange(len(blocks)), counts)  # (B,): each block's parameter
        firsts = torch.cumsum(counts, 0) - counts
        offsets = (torch.arange(len(owners)) - firsts[owners]) * BLOCK  # (B,): where in its parameter it begins
        self.num_blocks = len(owners)
        self.owners, self.offsets = owners.to(device, torch.int32), offsets.to(device)
        self.starts, self.sizes = torch.tensor(flat.starts, device=device), torch.tensor(flat.sizes, device=device)

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the buffer's gradients, a scalar fp32 tensor."""
        gradients = self._gradients()
        squares = torch.zeros(self.num_blocks, dtype=torch.float32, device=self.flat.weights.device)
        _square_kernel[(self.num_blocks,)](
            self._addresses(gradients), self.owners, self.offsets, self.sizes, squares,
            GRADIENT=self._gradient_type(), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return squares.sum().sqrt()

    def update(
        self, *, scale: float, lr: float, weight_decay: float, betas: tuple[float, float], epsilon: float
    ) -> None:
        """Update all parameters that have a gradient; scale: what clipping multiplies the gradients by."""
        flat, gradients = self.flat, self._gradients()
        flat.make_moments()
        flat.steps = [done + (g is not None) for done, g in zip(flat.steps, gradients, strict=True)]
        corrections = torch.tensor(
            [_corrections(done, lr, betas) for done in flat.steps], dtype=torch.float32
        )  # (T, 2)
        is_split = flat.residuals is not None
        _update_kernel[(self.num_blocks,)](
            self._addresses(gradients), copy_to(flat.weights.device, corrections), self.owners, self.offsets,
            self.starts, self.sizes, flat.weights.view(torch.int16) if is_split else flat.weights,
            flat.residuals if is_split else flat.weights, flat.moments["exp_avg"], flat.moments["exp_avg_sq"],
            scale, 1 - lr * weight_decay, betas[0], betas[1], 1 - betas[0], 1 - betas[1], epsilon,
            IS_SPLIT=is_split, GRADIENT=self._gradient_type(), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def _gradients(self) -> list[torch.Tensor | None]:
        """Return each parameter's gradient, contiguous and in the type of the buffer."""
        dtype = self.flat.weights.dtype
        for parameter in self.flat.parameters:
            gradient = parameter.grad
            if gradient is not None and not (gradient.is_contiguous() and gradient.data_ptr() % 16 == 0):
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            assert gradient is None or gradient.dtype == dtype, (gradient.dtype, dtype)
        return [parameter.grad for parameter in self.flat.parameters]

    def _addresses(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        """Return (T,) int64: the address of each parameter's gradient; 0 for none."""
        addresses = torch.tensor([0 if g is None else g.data_ptr() for g in gradients], dtype=torch.int64)
        return copy_to(self.flat.weights.device, addresses)

    def _gradient_type(self):
        return tl.bfloat16 if self.flat.weights.dtype == torch.bfloat16 else tl.float32


def _corrections(done: int, lr: float, betas: tuple[float, float]) -> tuple[float, float]:
    """Return (step size, square root of the second moment's bias correction) of a parameter's `done`-th update."""
    if not done:
        return 0.0, 1.0
    return lr / (1 - betas[0] ** done), math.sqrt(1 - betas[1] ** done)


if triton is not None:

    @triton.jit
    def _square_kernel(addresses, owners, offsets, sizes, squares, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
        """Write the sum of the squares of each block's gradients."""
        block = tl.program_id(0)
        owner = tl.load(owners + block)
        address = tl.load(addresses + owner)
        if address != 0:
            offset = tl.multiple_of(tl.load(offsets + block), BLOCK)
            size = tl.load(sizes + owner)
            gradients = tl.multiple_of(address.to(tl.pointer_type(GRADIENT)), 16)
            places = offset + tl.arange(0, BLOCK)
            if offset + BLOCK <= size:  # without a mask, a thread reads 16 bytes at once
                values = tl.load(gradients + places).to(tl.float32)
            else:
                values = tl.load(gradients + places, mask=places < size, other=0.0).to(tl.float32)
            tl.store(squares + block, tl.sum(values * values, axis=0))

    @triton.jit
    def _update_kernel(
        addresses, corrections, owners, offsets, starts, sizes, weights, residuals, first_moments, second_moments,
        scale, keep, beta1, beta2, new1, new2, epsilon,
        IS_SPLIT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Update a block of one parameter; keep: what weight decay leaves of a weight."""
        block = tl.program_id(0)
        owner = tl.load(owners + block)
        address = tl.load(addresses + owner)
        if address != 0:
            offset = tl.multiple_of(tl.load(offsets + block), BLOCK)
            size = tl.load(sizes + owner)
            start = tl.multiple_of(tl.load(starts + owner), 256)
            step_size = tl.load(corrections + 2 * owner)
            root = tl.load(corrections + 2 * owner + 1)
            gradients = tl.multiple_of(address.to(tl.pointer_type(GRADIENT)), 16) + offset
            begin = start + offset
            if offset + BLOCK <= size:  # without a mask, a thread reads 16 bytes at once
                _update_block(gradients, weights + begin, residuals + begin, first_moments + begin,
                              second_moments + begin, BLOCK, step_size, root, scale, keep, beta1, beta2, new1, new2,
                              epsilon, IS_SPLIT, False, BLOCK)  # fmt: skip
            else:
                _update_block(gradients, weights + begin, residuals + begin, first_moments + begin,
                              second_moments + begin, size - offset, step_size, root, scale, keep, beta1, beta2, new1,
                              new2, epsilon, IS_SPLIT, True, BLOCK)  # fmt: skip

    @triton.jit
    def _update_block(
        gradients, weights, residuals, first_moments, second_moments, count, step_size, root, scale, keep, beta1, beta2,
        new1, new2, epsilon, IS_SPLIT: tl.constexpr, IS_TAIL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        places = tl.arange(0, BLOCK)
        inside = places < count if IS_TAIL else None
        gradient = tl.load(gradients + places, mask=inside).to(tl.float32) * scale
        if IS_SPLIT:  # flat_weights.merge_fp32
            high = tl.load(weights + places, mask=inside).to(tl.int32) << 16
            bits = high + tl.load(residuals + places, mask=inside).to(tl.int32)
            master = bits.to(tl.float32, bitcast=True)
        else:
            master = tl.load(weights + places, mask=inside)
        first = beta1 * tl.load(first_moments + places, mask=inside) + new1 * gradient
        second = beta2 * tl.load(second_moments + places, mask=inside) + new2 * gradient * gradient
        master = master * keep - step_size * first / (tl.sqrt(second) / root + epsilon)
        if IS_SPLIT:  # flat_weights.split_fp32
            bits = master.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(weights + places, high.to(tl.int16), mask=inside)
            tl.store(residuals + places, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:
            tl.store(weights + places, master, mask=inside)
        tl.store(first_moments + places, first, mask=inside)
        tl.store(second_moments + places, second, mask=inside)
