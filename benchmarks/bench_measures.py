"""What the benchmark measures of a step: its operations, its matrix multiplies alone, and where the time goes."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time

import torch
from bench_kinds import OurStep, StepFigures
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from engine.head import OutputHead

# dense bf16 operations a second that the makers give, by a part of the device's name
PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


# ------------------------------------------------------------------------------------------ model operations
@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations that a step needs: 6 a weight and token (4 if the weights are frozen and only adapters learn), over
    the layers' weights and all tokens, and over the head's weights and the logit rows. No padding, nothing twice."""

    body: int
    head: int
    factor: int

    @classmethod
    def of(cls, step: OurStep) -> Operations:
        """Count the weights of a step's model."""
        head = step.model.get_output_embeddings()
        apart = {id(p) for p in (*head.parameters(), *step.model.get_input_embeddings().parameters())}
        apart |= {id(p) for name, p in step.model.named_parameters() if "lora_" in name or "embed_positions" in name}
        body = sum(p.numel() for p in step.model.parameters() if id(p) not in apart)
        vocabulary = OutputHead(step.model).vocabulary(torch.empty(0))
        width = step.model.config.get_text_config().hidden_size
        return cls(body, vocabulary * width, 4 if step.run.use_lora else 6)

    def of_step(self, figures: StepFigures) -> float:
        """Return the operations of one step."""
        return self.factor * (self.body * figures.tokens + self.head * figures.logit_rows)


def peak_operations(device: torch.device) -> tuple[float | None, str]:
    """Return (the device's dense bf16 operations a second as its maker gives them, its name); None if not listed."""
    if device.type != "cuda":
        return None, "CPU"
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None), name


# ------------------------------------------------------------------------------------- the matrix multiplies
class Products(TorchDispatchMode):
    """Recorder of the shapes, strides and types of all matrix multiplies that run inside."""

    def __init__(self):
        super().__init__()
        self.seen: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.seen[name, _layout(left), _layout(right)] += 1
        return function(*args, **(kwargs or {}))


def _layout(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def gemm_seconds(products: collections.Counter) -> tuple[float, float]:
    """Return (seconds, FLOPs) of the recorded products, each shape and layout timed by itself, best of three."""
    seconds = flops = 0.0
    for (name, left, right), count in products.items():
        a, b = (torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in (left, right))
        multiply = torch.bmm if name == "bmm" else torch.mm
        multiply(a, b)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply(a, b)
            times.append(time.perf_counter() - start)
        seconds += count * min(times)
        flops += count * 2 * a.numel() * b.shape[-1]
    return seconds, flops


# ------------------------------------------------------------------------------------------ where time goes
CPU_GROUPS = {
    "matrix multiply": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn", "aten::matmul", "aten::linear"),
    "attention": ("attention", "softmax"),
    "update": ("adam", "foreach", "linalg_vector_norm", "bitwise"),
    "casts and copies": ("copy_", "aten::_to_copy", "clone", "contiguous", "aten::to"),
    "zero-fills": ("fill_", "zero_", "aten::zeros"),
    "gather and scatter": ("index", "gather", "cat", "sort", "searchsorted", "scatter", "embedding"),
    "loss": ("logsumexp", "exp", "log_softmax"),
    "norms": ("rsqrt", "aten::mean", "aten::pow", "native_layer_norm"),
    "activations": ("silu", "gelu", "relu", "threshold"),
    "elementwise": ("aten::mul", "aten::add", "aten::sub", "aten::neg", "aten::div", "aten::sum"),
    "memory": ("aten::empty", "aten::resize", "empty_strided"),
}
GPU_GROUPS = {
    "attention": ("flex_attention", "triton_tem_fused", "flash", "fmha", "softmax_warp"),
    "update": ("adam", "_update_kernel", "_square_kernel", "multi_tensor"),
    "matrix multiply": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk"),
    "compiled elementwise": ("triton_",),
    "gather and scatter": ("index", "gather", "scatter", "sort", "embedding"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "cat"),
    "elementwise": ("elementwise", "reduce", "vectorized"),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclasses.dataclass
class Profile:
    """Of one profiled step: {kind of operation: fraction of the time}, the largest kernels as (name, ms, calls); on a
    GPU its busy milliseconds, and how often and for how many milliseconds the host waited for it."""

    shares: dict[str, float]
    top: list[tuple[str, float, int]]
    device_ms: float
    waits: float
    wait_ms: float


def profile_steps(step, numbers: range, device: torch.device) -> Profile:
    """Profile some steps; return the figures of one on average."""
    kinds = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        for number in numbers:
            step(number)
        if on_gpu:
            torch.cuda.synchronize()
    spent: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    waits, wait_ms, count = 0, 0.0, len(numbers)
    for event in profile.key_averages():
        if event.key in WAITS:
            waits, wait_ms = waits + event.count, wait_ms + event.self_cpu_time_total / 1e3
        if on_gpu and event.device_type == DeviceType.CPU:
            continue
        spent[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / count
        calls[event.key] += event.count // count
    shares: collections.Counter = collections.Counter()
    groups = GPU_GROUPS if on_gpu else CPU_GROUPS
    for name, milliseconds in spent.items():
        low = name.lower()
        group = next((g for g, parts in groups.items() if any(part.lower() in low for part in parts)), "other")
        shares[group] += milliseconds / spent.total()
    top = [(name, milliseconds, calls[name]) for name, milliseconds in spent.most_common(15)]
    return Profile(dict(shares.most_common()), top, spent.total(), waits / count, wait_ms / count)


def median_of(steps: list[StepFigures], name: str) -> float:
    """Return the median of one figure over steps."""
    return statistics.median(getattr(figures, name) for figures in steps)
