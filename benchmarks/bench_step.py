"""Time one training step of this project and of the published code, on the same rows, on a CPU or a GPU.

    python benchmarks/bench_step.py --model_name models/smollm2-135m-instruct
    python benchmarks/bench_step.py --shape opt-1.3b --batch_size 16        (random weights, nothing is downloaded)

The published step is reimplemented here: four calls over padded sequences in fp32, full logits, a second model for the
KL, a plain AdamW. Each kind of step has processes of its own, as in a run, since in a shared process one kind would
reuse the memory of another. The kinds take turns, since a machine's speed drifts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from bench_inputs import ROWS, SHAPES
from bench_kinds import KINDS, ONE_MORE, OURS, OURS_FP32, PUBLISHED, OurStep, StepFigures
from bench_measures import Operations, Products, gemm_seconds, median_of, peak_operations, profile_steps

from command_line import OneLineParser
from options import POSITIVE, option
from utils import UsageError, peak_memory_gib, run_script, seed_everything, write_json

WARM_UP = {"cpu": 1, "cuda": 5}  # steps that are not timed: on a GPU the first ones compile
PROFILED = 2  # steps, after the timed ones
GPU_KINDS = (PUBLISHED, OURS)


@dataclasses.dataclass
class BenchOptions:
    """Options of the benchmark."""

    model_name: str = option("models/smollm2-135m-instruct", "model folder or hub name")
    shape: Literal[(None, *SHAPES)] = option(None, "a published shape with random weights, in place of --model_name")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the steps run; auto: on a GPU if there is one")
    rows: Literal[(None, *ROWS)] = option(
        None, "lengths of the answers: long, short or full (not given: on a CPU long, then short; on a GPU full)"
    )
    steps: POSITIVE = option(4, "timed steps per process, after the warm-up")
    rounds: POSITIVE = option(3, "processes per kind of step, in turns (on a GPU: 1)")
    batch_size: POSITIVE = option(2, "forget rows per step, and normal rows per step")
    num_random_answers: POSITIVE = option(5, "replacement answers per forget prompt (K)")
    answer_tokens: POSITIVE = option(64, "maximum tokens of an answer")
    use_lora: bool = option(False, "train adapters")
    rank: POSITIVE = option(16, "rank of the adapters")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward")
    compile: Literal["auto", "on", "off"] = option("auto", "compile the layers on a GPU")
    known_graphs: bool = option(True, "leave out the checks of compiled graphs that are known")
    config: str | None = option(None, "take recipe, batch and lengths from this YAML file of options")
    threads: POSITIVE = option(2, "CPU threads")
    only: str | None = option(
        None, "run this kind of step alone; print its figures as JSON (the script calls itself so)"
    )
    profile: bool = option(False, "with --only: profile two more steps")
    json_file: str | None = option(None, "also write the figures to this file")

    @property
    def total_steps(self) -> int:
        """Steps of a process."""
        return WARM_UP[self.device] + self.steps + PROFILED


# ------------------------------------------------------------------------------------------- one kind, alone
def run_alone(options: BenchOptions, kind: str, *, profile: bool = False) -> dict:
    """Run one kind of step in a process of its own; return what `take_steps` returns, or {"error": its last line}."""
    left_out = ("only", "json_file", "profile")
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in left_out}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    run = subprocess.run(
        [sys.executable, __file__, *arguments, f"--only={kind}", f"--profile={profile}"],
        capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if run.returncode:
        if options.device == "cpu":
            raise RuntimeError(f"{kind}: {run.stderr}")
        return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1][:300]}
    return json.loads(run.stdout.splitlines()[-1])


def take_steps(options: BenchOptions) -> dict:
    """Run the steps of one kind; return its figures, those of the steps as lists."""
    device, started = torch.device(options.device), time.perf_counter()
    step = KINDS[options.only](options)
    built = time.perf_counter() - started
    warm_up = WARM_UP[options.device]
    for number in range(warm_up):
        step(number)
    off = step.checked() if getattr(step, "graphs", None) else None
    warm = time.perf_counter() - started - built
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    figures: list[StepFigures] = [step(warm_up + number) for number in range(options.steps)]
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak_memory_gib(device)
    found = {"seconds": [f.seconds for f in figures], "gib": gib, "reserved_gib": peak_memory_gib(device),
             "build_seconds": built, "warm_up_seconds": warm, "compiled": step.compiled,
             "known_graphs_off": off}  # fmt: skip
    if isinstance(step, OurStep):
        operations, (peak, name) = Operations.of(step), peak_operations(device)
        rate = statistics.median(operations.of_step(f) / f.seconds for f in figures)
        found |= {f.name: median_of(figures, f.name) for f in dataclasses.fields(StepFigures) if f.name != "seconds"}
        found |= {"padding": 1 - sum(f.tokens for f in figures) / sum(f.places for f in figures), "device": name,
                  "operations_per_second": rate, "mfu": rate / peak if peak else None, "peak": peak,
                  "operations": dataclasses.asdict(operations)}  # fmt: skip
    if options.profile:
        first = warm_up + options.steps
        found["profile"] = dataclasses.asdict(profile_steps(step, range(first, first + PROFILED), device))
    return found


# --------------------------------------------------------------------------------------------------- the lines
def describe(found: dict) -> list[str]:
    """Return the lines about one kind of this suite's steps."""
    if "error" in found:
        return [f"failed: {found['error']}"]
    times = [1e3 * seconds for seconds in found["seconds"]]
    middle, made = statistics.median(times), "compiled" if found["compiled"] else "not compiled"
    lines = [
        f"{middle:.1f} ms a step ({min(times):.0f} to {max(times):.0f}); peak {found['gib']:.1f} GiB (reserved "
        f"{found['reserved_gib']:.1f}); built in {found['build_seconds']:.0f} s, warm-up "
        f"{found['warm_up_seconds']:.0f} s"
    ]
    if found["known_graphs_off"] is not None:
        made += f", their checks left out (gradient norm off by {found['known_graphs_off']:.1e})"
    if "padding" in found:
        peak = "no peak listed"
        if found["mfu"]:
            peak = f"MFU {100 * found['mfu']:.1f} % of {found['peak'] / 1e12:.0f} TFLOP/s"
        lines += [
            f"{1e3 * found['tokens'] / middle:,.0f} tokens/s; {found['operations_per_second'] / 1e12:.2f} TFLOP/s, "
            f"{peak} ({found['device']}, {found['operations']['factor']} operations a weight and token)",
            f"{found['tokens']:,.0f} tokens in {found['places']:,.0f} places (padding {100 * found['padding']:.1f} %), "
            f"{found['logit_rows']:,.0f} logit rows; layers {made}",
            f"host: prepares {1e3 * found['prepare']:.1f} ms, launches {1e3 * found['launch']:.1f} ms, waits "
            f"{1e3 * found['wait']:.1f} ms",
        ]
    if "profile" in found:
        profile = found["profile"]
        lines.append("where it goes: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in profile["shares"].items()))
        if found["device"] != "CPU":
            lines.append(
                f"profiled: device busy {profile['device_ms']:.1f} ms a step, the host waits {profile['waits']:.1f} "
                f"times for {profile['wait_ms']:.1f} ms"
            )
    return lines


def bench_gpu(options: BenchOptions) -> dict:
    """Time both kinds of step on a GPU, each in a process; print and return the figures."""
    figures = {}
    for kind in GPU_KINDS:
        figures[kind] = found = run_alone(options, kind, profile=kind == OURS)
        print(f"  {kind}:", *describe(found), sep="\n    ", flush=True)
    if not any("error" in found for found in figures.values()):
        published, ours = (statistics.median(figures[kind]["seconds"]) for kind in GPU_KINDS)
        print(f"  {published / ours:.2f} x as fast as the published step")
    return figures


def bench_cpu(options: BenchOptions) -> dict:
    """Time all kinds on a CPU in turns; print and return medians, memory, matrix multiplies and where the time goes."""
    rounds = [{kind: run_alone(options, kind) for kind in KINDS} for _ in range(options.rounds)]
    median = {kind: statistics.median(s for one in rounds for s in one[kind]["seconds"]) for kind in KINDS}
    memory = {kind: max(one[kind]["gib"] for one in rounds) for kind in KINDS}
    for kind, seconds in median.items():
        print(f"  {kind:28s} {seconds:6.2f} s a step   {median[PUBLISHED] / seconds:5.2f} x as fast as the published"
              f"   peak {memory[kind]:.2f} GiB ({memory[kind] / memory[PUBLISHED]:.2f})")  # fmt: skip
    extra = statistics.median(
        statistics.median(one[ONE_MORE]["seconds"]) / statistics.median(one[OURS]["seconds"]) - 1 for one in rounds
    )
    print(f"  K + 1, one more answer for each of {options.batch_size} rows: {100 * extra:+.1f} % of a step, "
          f"{100 * extra / options.batch_size:+.1f} % an answer")  # fmt: skip
    ours = rounds[-1][OURS]
    print(f"  a bf16 step: {ours['tokens']:,.0f} tokens in {ours['places']:,.0f} places (padding "
          f"{100 * ours['padding']:.1f} %), {ours['logit_rows']:,.0f} logit rows, "
          f"{ours['tokens'] / median[OURS]:,.0f} tokens/s")  # fmt: skip
    figures = {"median_seconds": median, "peak_gib": memory, "one_more_answer": extra, "gemm": {}}
    for kind in (OURS, OURS_FP32):
        step = KINDS[kind](options)
        step(0)
        with Products() as products:
            step(1)
        seconds, flops = gemm_seconds(products.seen)
        figures["gemm"][kind] = {"seconds": seconds, "flops": flops, "step_over_gemm": median[kind] / seconds}
        print(f"  {kind}: {flops / 1e12:.2f} TFLOP in matrix multiplies, {seconds:.2f} s by themselves "
              f"({flops / seconds / 1e9:.0f} GFLOP/s); the step takes {median[kind] / seconds:.2f} x that")  # fmt: skip
        if kind == OURS:
            profile = profile_steps(step, range(2, 4), torch.device("cpu"))
            shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in profile.shares.items())
            print(f"  where a bf16 step goes:    {shown}")
            figures["shares"] = profile.shares
    return figures


def main() -> None:
    """Time every kind of step on the rows asked for, and print the figures."""
    options = BenchOptions(**vars(OneLineParser(BenchOptions).parse_args()))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.only and options.only not in KINDS:
        raise UsageError(f"--only {options.only}: there are {', '.join(KINDS)}")
    seed_everything(8888, options.threads)
    rows = [options.rows] if options.rows else ["full"] if options.device == "cuda" else ["long", "short"]
    if options.only:
        options.rows = rows[0]
        print(json.dumps(take_steps(options)))
        return
    figures = {"options": dataclasses.asdict(options), "threads": torch.get_num_threads()}
    for options.rows in rows:
        print(f"\n{options.shape or options.model_name} on {options.device}, {options.rows} rows: {options.batch_size} "
              f"forget rows, K {options.num_random_answers}, {options.batch_size} normal rows, answers of at most "
              f"{options.answer_tokens} tokens; medians, {options.steps} steps a process", flush=True)  # fmt: skip
        figures[options.rows] = bench_gpu(options) if options.device == "cuda" else bench_cpu(options)
    if options.json_file:
        write_json(options.json_file, figures)


if __name__ == "__main__":
    run_script(main)
