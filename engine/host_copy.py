"""Bring what the host has worked out for a step to the device in one copy.

A step's plan is some seventy small index tensors. One buffer in pinned memory takes all of them, so the device fetches
them at once while the host goes on, and each becomes a view of the buffer there.
"""

from __future__ import annotations

import dataclasses

import torch

ALIGN = 16  # bytes


def copied(thing, device: torch.device | str):
    """Return `thing` with its tensors of main memory on `device`: a dataclass, list or dict of them, of any depth.

    What has a method `gathered` (of no argument) is first replaced by what that returns.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return thing
    found: list[torch.Tensor] = []
    thing = _replaced(thing, lambda tensor: found.append(tensor) or tensor)
    starts, end = [], 0
    for tensor in found:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start in zip(found, starts, strict=True):
        _view(host, start, tensor).copy_(tensor)
    buffer = host.to(device, non_blocking=True)
    views = iter([_view(buffer, start, tensor) for tensor, start in zip(found, starts, strict=True)])
    return _replaced(thing, lambda tensor: next(views))


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `buffer` from `start` on as a tensor like another one."""
    size = like.numel() * like.element_size()
    return buffer[start : start + size].view(like.dtype).view(like.shape)


def _replaced(thing, replace):
    """Return `thing` with each tensor of main memory replaced, always in the same order."""
    if isinstance(thing, torch.Tensor):
        return replace(thing) if thing.device.type == "cpu" else thing
    if isinstance(thing, list):
        return [_replaced(part, replace) for part in thing]
    if isinstance(thing, dict):
        return {key: _replaced(part, replace) for key, part in thing.items()}
    if dataclasses.is_dataclass(thing) and not thing.__dataclass_params__.frozen:  # sequences hold no tensor
        thing = thing.gathered() if hasattr(thing, "gathered") else thing
        fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **{name: _replaced(value, replace) for name, value in fields.items()})
    return thing
