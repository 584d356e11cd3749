"""Check on one GPU what the optimizer, the memory estimate and the answers promise; at most 90 s on an H100.

    python benchmarks/gpu_memory.py            # needs torch, transformers, peft, accelerate and this project
    python benchmarks/gpu_memory.py --tiny     # small shapes, on any device: does it run?

Weights and rows are random. Each line of the output is one figure with its goal; peaks are those of torch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from engine.adapters import LoraSettings, add_lora, enable_gradient_checkpointing
from engine.generation import generate
from engine.memory import estimate_parts, measure_saved_bytes
from engine.optimizer import MasterWeightAdamW, OptimizerSettings

GIB = 2**30
TINY = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "vocabulary": 500}
OPT_1_3B = {"hidden": 2048, "inner": 8192, "layers": 24, "heads": 32, "vocabulary": 50272}
LLAMA_7B = {"hidden": 4096, "inner": 11008, "layers": 32, "heads": 32, "vocabulary": 32000}
SMOLLM2 = {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152, "tied": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    parts = ["update", "lora", "qlora", "whole", "answers"]
    parser.add_argument("--only", nargs="+", default=parts, help="parts to run")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    checks = {"update": check_update, "lora": check_lora, "qlora": check_qlora, "whole": check_whole,
              "answers": check_answers}  # fmt: skip
    for part in arguments.only:
        start = time.perf_counter()
        try:
            checks[part](device, arguments.tiny)
        except Exception as error:  # the other parts are worth their minute
            print(f"{part}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - start:.0f} s\n", flush=True)


# ------------------------------------------------------------------------------------------------- the update
def check_update(device: torch.device, tiny: bool) -> None:
    """Time the update of whole weights (goal: 15 ms for 1.3B) and of adapters; torch's fused fp32 AdamW beside it."""
    check_numbers(device)
    shape = TINY if tiny else OPT_1_3B
    weights = random_weights(opt_shapes(**shape), device)
    count = sum(p.numel() for p in weights)
    optimizer = MasterWeightAdamW(weights, OptimizerSettings(lr=1e-5, total_steps=100), torch.bfloat16)
    print(f"kernel: {optimizer.not_fused or 'fused'}")
    report_update("our update, bf16 with fp32 masters", optimizer, weights, count, "goal 15 ms")
    del optimizer, weights
    adapters = random_weights(lora_shapes(**(TINY if tiny else LLAMA_7B)), device)
    count = sum(p.numel() for p in adapters)
    optimizer = MasterWeightAdamW(adapters, OptimizerSettings(lr=1e-5, total_steps=100), torch.bfloat16)
    report_update(f"our update of {len(adapters)} adapters", optimizer, adapters, count, "")
    del optimizer, adapters
    weights = random_weights(opt_shapes(**shape), device).float()
    plain = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    gradients = [torch.randn_like(p) * 1e-3 for p in weights]
    times = []
    for _ in range(6):
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient
        times.append(timed(device, lambda: (torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0), plain.step())))
    print(f"torch's fused fp32 AdamW with clipping: {1e3 * min(times[2:]):.2f} ms")


def check_numbers(device: torch.device) -> None:
    """Compare six clipped updates with torch's AdamW."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.Linear(900, 33)).to(device)
    plain = torch.nn.ParameterList(p.detach().clone() for p in model.parameters())
    settings = OptimizerSettings(lr=1e-3, total_steps=100, schedule="constant", weight_decay=0.01)
    optimizer = MasterWeightAdamW(model, settings, torch.bfloat16)
    reference = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.01)
    for _ in range(6):
        for mine, theirs in zip(model.parameters(), plain, strict=True):
            mine.grad = torch.randn(mine.shape, device=device).bfloat16()
            theirs.grad = mine.grad.float()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        optimizer.step()
    pairs = zip(model.parameters(), plain, strict=True)
    apart = max((optimizer.master(mine) - theirs).abs().max().item() for mine, theirs in pairs)
    print(f"largest difference from torch's AdamW after 6 updates of 1e-3: {apart:.1e} (goal 1e-7)")


def report_update(label: str, optimizer, weights, count: int, goal: str) -> None:
    device, gradients, times, host = weights[0].device, [torch.randn_like(p) * 1e-3 for p in weights], [], []
    for _ in range(6):
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient

        def update():
            norm = optimizer.grad_norm().item()
            start = time.perf_counter()
            optimizer.step(norm)
            host.append(time.perf_counter() - start)

        times.append(timed(device, update))
    best = min(times[2:])
    print(f"{label}: {count / 1e9:.3f}B weights, {1e3 * best:.2f} ms with norm and clipping {goal}; host "
          f"{1e3 * min(host[2:]):.2f} ms; {28 * count / best / 1e12:.2f} TB/s of 28 bytes a weight; the first "
          f"{times[0]:.1f} s", flush=True)  # fmt: skip


def timed(device: torch.device, work) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def opt_shapes(hidden: int, inner: int, layers: int, vocabulary: int, **_) -> list[tuple[int, ...]]:
    layer = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner), (inner,)] + [(hidden,)] * 9
    return [(vocabulary, hidden), (2050, hidden), (hidden,), (hidden,)] + layers * layer


def lora_shapes(hidden: int, inner: int, layers: int, **_) -> list[tuple[int, ...]]:
    sides = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return layers * [shape for out, into in sides for shape in ((16, into), (out, 16))]


def random_weights(shapes, device: torch.device) -> torch.nn.ParameterList:
    return torch.nn.ParameterList(0.02 * torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)


# --------------------------------------------------------------------------------- the peak, against its estimate
def check_lora(device: torch.device, tiny: bool) -> None:
    """A LoRA step of a Llama of 7B: the peak against the estimate (goal: within 15 %)."""
    for checkpointing in (False, True):
        model = random_llama(device, **(TINY if tiny else LLAMA_7B))
        add_lora(model, LoraSettings(), None)
        label = f"LoRA, checkpointing {'on' if checkpointing else 'off'}"
        check_step(label, model, device, places=128 if tiny else 4096, checkpointing=checkpointing, kind="adamw",
                   adapters=True)  # fmt: skip
        del model
        gc.collect()


def check_qlora(device: torch.device, tiny: bool) -> None:
    """Adapters on a base in 4 bits (goal: a step of 7B in 12 GB with checkpointing). The base is quantised on the way:
    the peak is that of the step."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        print("QLoRA: skipped, bitsandbytes is not installed")
        return
    model = random_llama(device, **(TINY if tiny else LLAMA_7B))
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False,
                                                  compute_dtype=torch.bfloat16, quant_type="nf4")  # fmt: skip
                    weight = linear.weight.data
                    quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, quantised.to(device))
    gc.collect()
    add_lora(model, LoraSettings(), None)
    check_step("QLoRA, checkpointing on", model, device, places=128 if tiny else 4096, checkpointing=True, kind="adamw",
               adapters=True, in_4bit=True)  # fmt: skip


def check_whole(device: torch.device, tiny: bool) -> None:
    """Whole weights of 7B with 8-bit moments (goal: it runs in 80 GB)."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        print("whole weights with adamw8bit: skipped, bitsandbytes is not installed")
        return
    model = random_llama(device, **(TINY if tiny else LLAMA_7B))
    check_step("whole weights, adamw8bit, checkpointing on", model, device, places=128 if tiny else 4096,
               checkpointing=True, kind="adamw8bit", adapters=False)  # fmt: skip


def check_step(
    label: str, model, device, *, places: int, checkpointing: bool, kind: str, adapters: bool, in_4bit: bool = False
) -> None:
    if checkpointing:
        enable_gradient_checkpointing(model)
    optimizer = MasterWeightAdamW(
        model, OptimizerSettings(lr=1e-5, total_steps=100, kind=kind, adapters=adapters), torch.bfloat16
    )
    options = SimpleNamespace(optimizer=kind, kl_budget=0.0, gradient_accumulation=1, use_lora=adapters,
                              gradient_checkpointing=checkpointing, load_in_4bit=in_4bit)  # fmt: skip

    def loss_of(rows: int, width: int):
        ids = torch.randint(3, model.config.vocab_size, (rows, width), device=device)  # (R, T)
        states = model.base_model(input_ids=ids, use_cache=False)[0]  # (R, T, D); the head is the losses' business
        return states.float().square().mean()

    saved = measure_saved_bytes(model, lambda: loss_of(1, places // 8), places // 8, num_frozen=0,
                                checkpointing=checkpointing)  # fmt: skip
    parts = estimate_parts(model, options, saved, places)
    for _ in range(2):  # the moments are made by the first update
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(device, lambda: loss_of(4, places // 4).backward())
        optimizer.step()
    if device.type != "cuda":
        print(f"{label}: estimate {parts.total / GIB:.3f} GiB ({parts.line()}); a CPU's peak is not taken")
        return
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    print(f"{label}, {places} tokens: estimate {parts.total / GIB:.2f} GiB, peak {peak:.2f} ({reserved:.2f} reserved), "
          f"off by {100 * (parts.total / GIB / peak - 1):+.1f} %; {1e3 * seconds:.0f} ms; {parts.line()}",
          flush=True)  # fmt: skip


def random_llama(device, hidden, inner, layers, heads, vocabulary, kv_heads=None, tied=False):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


# ------------------------------------------------------------------------------------------------- the answers
def check_answers(device: torch.device, tiny: bool) -> None:
    """Sampled answers of the demo's size: 900 prompts, at most 96 tokens each (goal: 15 s). Random weights never end
    an answer, so this is the longest that it can take."""
    model = random_llama(device, **(TINY if tiny else SMOLLM2)).eval()
    draw = torch.Generator().manual_seed(1)
    count, new = (12, 8) if tiny else (900, 96)
    lengths = torch.randint(25, 60, (count,), generator=draw).tolist()
    shared = torch.randint(3, 400, (24,), generator=draw).tolist()  # the template's system message
    prompts = [shared + torch.randint(3, 400, (length,), generator=draw).tolist() for length in lengths]
    formatter = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), stop_ids=lambda: [2],
                                read_answer=lambda prompt, tokens: str(len(tokens)))  # fmt: skip
    generate(model, formatter, prompts[:4], max_new_tokens=4, batch_size=0, temperature=0.7)
    for size, number in ((0, count), (64, min(count, 128))):
        seconds = timed(device, lambda size=size, number=number: generate(
            model, formatter, prompts[:number], max_new_tokens=new, batch_size=size, temperature=0.7
        ))  # fmt: skip
        print(f"answers, {number} prompts, {new} tokens, batches of {size or 'what memory takes'}: {seconds:.1f} s, "
              f"{number * new / seconds:.0f} tokens/s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
