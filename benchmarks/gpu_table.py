"""Measure a step on a GPU at the sizes that docs/LOG.md's table names, one process a row, and print a line for each.

python benchmarks/gpu_table.py                 (about four minutes on an H100; a row that fails leaves the others)
python benchmarks/gpu_table.py --only batch-2  (rows whose name holds this)
python benchmarks/gpu_table.py --tiny          (the same rows at a tiny shape, on any device: does it run?)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_kinds import OURS, PUBLISHED
from bench_step import describe

OPT, LLAMA = ("--shape=opt-1.3b",), ("--shape=llama-7b", "--use_lora=True", "--rank=16")
ROWS = {
    "OPT-1.3B whole weights, batch-16": (OURS, *OPT, "--batch_size=16", "--steps=8", "--profile=True"),
    "OPT-1.3B whole weights, batch-2": (OURS, *OPT, "--batch_size=2", "--steps=20", "--profile=True"),
    "OPT-1.3B published fp32 step, batch-2": (PUBLISHED, *OPT, "--batch_size=2", "--steps=6"),
    "Llama-7B LoRA rank 16, batch-16": (OURS, *LLAMA, "--batch_size=16", "--steps=4", "--profile=True"),
    "Llama-7B LoRA rank 16, batch-16, checkpointing": (
        OURS, *LLAMA, "--batch_size=16", "--steps=4", "--gradient_checkpointing=True"
    ),
    "the demo's recipe, SmolLM2-135M's shape": (
        OURS, "--shape=smollm2-135m", "--config=configs/demo.yaml", "--steps=20", "--profile=True"
    ),
}  # fmt: skip


def measure(words: tuple[str, ...], limit: float) -> dict:
    """Return the figures of one row, or {"error": why there are none}; limit: seconds that it may take."""
    kind, *rest = words
    command = [sys.executable, str(ROOT / "benchmarks/bench_step.py"), f"--only={kind}", "--rows=full",
               "--answer_tokens=128", *rest]  # fmt: skip
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    if run.returncode:
        return {"error": " | ".join(run.stderr.strip().splitlines()[-12:])[-1500:] or f"exit code {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the rows whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, small batches and few steps")
    parser.add_argument("--row_seconds", type=float, default=150, help="a row that takes longer is given up")
    asked, known = parser.parse_args(), True
    for name, words in ROWS.items():
        if asked.only not in name:
            continue
        if asked.tiny:
            words = (*words, "--shape=tiny", "--batch_size=2", "--steps=2", "--answer_tokens=24")
        start = time.perf_counter()
        found = measure((*words, f"--known_graphs={known}"), asked.row_seconds)
        broken = "error" in found and "OutOfMemory" not in found["error"]
        if known and (broken or (found.get("known_graphs_off") or 0) > 0.01):
            print(name, *describe(found), "from here on compiled graphs are checked", sep="\n    ", flush=True)
            known = False
            found = measure((*words, f"--known_graphs={known}"), asked.row_seconds)
        print(f"{name} [{time.perf_counter() - start:.0f} s]", *describe(found), sep="\n    ", flush=True)
        for kernel, milliseconds, calls in found.get("profile", {}).get("top", ()):
            print(f"      {milliseconds:8.2f} ms  {calls:5d} x  {kernel[:110]}", flush=True)


if __name__ == "__main__":
    main()
