"""Let several processes act as one: start them, share a step's rows and the prompts, split and gather the model.

Each process either holds the whole model and its own rows (DDP) or, with `--shard`, also only its part of weights,
gradients and optimizer state (FSDP2). Every process must call a gather and a forward of a split model; only the first
one writes files.
"""

from __future__ import annotations

import dataclasses
import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.adapters import decoder_layers
from utils import UsageError


def start_processes(options) -> Accelerator:
    """Start the processes that were asked for. Raises UsageError if fewer joined: the run would be another one.

    A launch file that asks for FSDP2 or ZeRO-3 switches `--shard` on, because the suite splits the model itself.
    """
    # `accelerate launch --cpu --num_processes N` starts one process and says nothing: it sets an address, no world
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if launched and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys():
        raise UsageError("accelerate launch was asked for several processes and started one; without GPUs use "
                         "'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...'")  # fmt: skip
    if _asks_for_sharding():
        options.shard = True
    accelerator = Accelerator(mixed_precision="no")  # precision is --dtype's business
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP
    ):  # fmt: skip
        raise UsageError(f"accelerate launch: {accelerator.distributed_type.value} is not supported; use plain DDP")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise UsageError(f"accelerate launch: {asked} processes asked for, {accelerator.num_processes} joined")
    if options.shard and asked == 1:
        raise UsageError("--shard splits the model over processes, and this is one: start several with "
                         "'accelerate launch --config_file configs/accelerate/fsdp2.yaml ...'")  # fmt: skip
    return accelerator


def refuse_idle_processes(accelerator, rows: dict[str, int]) -> None:
    """Raise UsageError if a step has fewer rows of a side than there are processes; rows: a side -> its rows a step."""
    smallest = min(count for count in rows.values() if count)
    if accelerator.num_processes > smallest:
        raise UsageError(f"{accelerator.num_processes} processes share {smallest} rows a step: raise --batch_size")


def join_processes() -> PartialState:
    """Return this process's place among those that were launched, for a script that does not train."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _asks_for_sharding() -> bool:
    """Say whether the launch file asks for a split model. Raises UsageError for kinds that split less than all."""
    environment = os.environ
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        if stage != "3":
            raise UsageError(f"accelerate launch: ZeRO stage {stage} is not supported; use stage 3, FSDP2 or DDP")
        # DeepSpeed has started the processes; its engine would take the loop's place, so it is left out
        environment["ACCELERATE_USE_DEEPSPEED"] = "false"
        return True
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UsageError("accelerate launch: FSDP version 1 is not supported; set fsdp_version: 2")
        return True
    return False


# ------------------------------------------------------------------------------------- one answer for all
def broadcast_from_main(value):
    """Return the first process's value on every process."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def parallel_map(items: list, work) -> list:
    """Return [work(number, item)]: each process does its share, and all of them get the whole list, in order."""
    state = PartialState()
    if state.num_processes == 1:
        return [work(number, item) for number, item in enumerate(items)]
    mine = [(n, work(n, item)) for n, item in enumerate(items) if n % state.num_processes == state.process_index]
    return [result for _, result in sorted(gather_object(mine), key=lambda pair: pair[0])]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """The sequences of one forward. If not `counts`, they are another process's: multiply losses and counts by 0."""

    sequences: list
    counts: bool = True


def local_microbatches(step_sequences: list, parts: int, processes) -> list[Microbatch]:
    """Return this process's sequences of a step in `possible_parts` micro-batches.

    step_sequences: those of all processes; processes: has num_processes and process_index. All sequences of an example
    stay together. A process without any sequence (its examples have no answer) gets the smallest example of another,
    which does not count: gradients are averaged over all processes, so each must run as many forwards and backwards.
    """
    by_example: dict[int, list] = {}
    for sequence in step_sequences:
        by_example.setdefault(sequence.example_id, []).append(sequence)
    count = possible_parts(step_sequences, parts, processes.num_processes)
    mine = [e for e in sorted(by_example) if e % processes.num_processes == processes.process_index]
    if not mine and count:
        smallest = min(by_example.values(), key=lambda sequences: sum(s.length for s in sequences))
        return [Microbatch(smallest, counts=False)] * count
    chosen = [set(mine[part::count]) for part in range(count)]
    return [Microbatch([s for s in step_sequences if s.example_id in examples]) for examples in chosen]


def possible_parts(step_sequences: list, parts: int, num_processes: int) -> int:
    """Return in how many micro-batches a step can run: `parts`, or fewer if a process has fewer examples.

    Processes without any example do not count. The number is the same on all processes, as a split model needs it.
    """
    examples = {sequence.example_id for sequence in step_sequences}
    shares = [sum(e % num_processes == process for e in examples) for process in range(num_processes)]
    return min(parts, *(share for share in shares if share)) if examples else 0


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to `device`; a GPU fetches it from pinned memory while the CPU goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------- a split model
def shard(forward, dtype: torch.dtype, device_type: str) -> None:
    """Split the parameters of `forward` (an AnswerLogitsModel) over all processes, layer by layer (FSDP2, in place).

    The parts are the optimizer's fp32 master weights; a layer is gathered in `dtype` while it runs, and gradients are
    summed in fp32. A process copies its own parts of the model, which may lie in a file's pages, and no more than one
    layer is ever whole in fp32. Source: torch.distributed.fsdp.fully_shard.
    """
    mesh = init_device_mesh(device_type, (PartialState().num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(forward.model)[1]:
        fully_shard(layer.float(), mesh=mesh, mp_policy=policy)
    for parameter in forward.parameters():  # what lies outside the layers
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    # by default the outermost module stays gathered after a forward, and would not see the weights of a resume
    fully_shard(forward, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    forward.dtype = dtype
    register_fsdp_forward_method(forward, "generate")  # it gathers what lies outside the layers, too


def is_sharded(module: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, which may be split, whole. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor; the tensor itself if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_to_main_cpu(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor whole in the first process's main memory, and None in the others. Every process must call it.

    Eight processes of one machine need not hold eight copies of what one of them writes.
    """
    tensor = full_tensor(tensor)
    return tensor.cpu() if PartialState().is_main_process else None


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """Split a whole tensor as `example` is, on its device."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor) and tensor.dim():
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
