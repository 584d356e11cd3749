"""How several processes act as one: who starts, who writes, who holds which part of the model.

Two ways share the work: each process holds the whole model and its own rows (DDP), or, with `--shard`,
weights, gradients and optimizer state are split as well (FSDP2). What every process must do alike - a
gather, a forward of a split model - is called by all of them; files are the first one's business.
"""

from __future__ import annotations

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
    """The processes that were asked for, or an error: never a run that is quietly another one.

    A launch file that asks for FSDP2 or ZeRO-3 switches `--shard` on: the suite splits the model itself.
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
    harmful = options.batch_size + options.empty_answer_rows
    smallest = min(harmful, (options.normal_batch_size or options.batch_size) + options.first_token_rows)
    if accelerator.num_processes > smallest:
        raise UsageError(f"{accelerator.num_processes} processes share {smallest} rows a step: raise --batch_size")
    if options.shard and asked == 1:
        raise UsageError("--shard splits the model over processes, and this is one: start several with "
                         "'accelerate launch --config_file configs/accelerate/fsdp2.yaml ...'")  # fmt: skip
    return accelerator


def join_processes() -> PartialState:
    """This process among those that were launched, for a script that does not train."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _asks_for_sharding() -> bool:
    """Whether the launch file asks for a split model; refuses the kinds of it that split less than all."""
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
    """The first process's value, on every process."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def parallel_map(items: list, work) -> list:
    """[work(number, item)], each process doing its share; all of them get the whole list, in order."""
    state = PartialState()
    if state.num_processes == 1:
        return [work(number, item) for number, item in enumerate(items)]
    mine = [(n, work(n, item)) for n, item in enumerate(items) if n % state.num_processes == state.process_index]
    return [result for _, result in sorted(gather_object(mine), key=lambda pair: pair[0])]


def local_microbatches(step_sequences: list, parts: int, processes) -> list[list]:
    """This process's sequences of a step in at most `parts` parts; a harmful row stays with its random answers.

    As many parts as the process with the fewest rows can fill: a split model needs the same forwards on all of them.
    """
    count = processes.num_processes
    groups = [sorted({s.group for s in step_sequences if s.group % count == process}) for process in range(count)]
    parts = min(parts, *map(len, groups))
    mine = groups[processes.process_index]
    return [[s for s in step_sequences if s.group in mine[part::parts]] for part in range(parts)]


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy that a GPU fetches while the processor goes on: only from pinned memory does it not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------- a split model
def shard(forward, dtype: torch.dtype, device_type: str) -> None:
    """Split the parameters of `forward` (an AnswerLogitsModel) over all processes, layer by layer (FSDP2, in place).

    The kept parts stay fp32 - they are the optimizer's master weights - and are gathered in `dtype` where a
    layer runs; gradients are added up in fp32. Source: torch.distributed.fsdp.fully_shard.
    """
    mesh = init_device_mesh(device_type, (PartialState().num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(forward.model)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # by default the outermost part stays gathered after a forward, and would not see what a resume puts into it
    fully_shard(forward, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    forward.dtype = dtype
    register_fsdp_forward_method(forward, "generate")  # it gathers what lies outside the layers, too


def is_sharded(module: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split, whole; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_to_main_cpu(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor that may be split, whole in the first process's main memory, None elsewhere: eight processes of one
    machine need not hold eight copies of what one of them writes. Every process must call it."""
    tensor = full_tensor(tensor)
    return tensor.cpu() if PartialState().is_main_process else None


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A whole tensor, split as `example` is, on its device."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor) and tensor.dim():
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
