"""What a run was made of: enough to repeat it, to compare two runs, and to audit one (run_manifest.json)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

from engine import checkpoint
from utils import UsageError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors", "numpy", "pandas")
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")  # microjoules of the processor, where the machine tells


class RunMetadata:
    """Collected from the start of a run on; `rows` maps a side's name to every row that was read for it."""

    def __init__(self, options, rows: dict[str, list]):
        self.options, self.base_model = options, ""
        self._then = None  # the base model of the run that is to be repeated
        self.rows_hash = {side: _hash_rows(some) for side, some in rows.items()}
        self.started, self.energy = time.time(), _microjoules()
        if options.from_manifest:
            made = json.loads(Path(options.from_manifest).read_text(encoding="utf-8"))
            then, self._then = made["data"]["rows_sha256"], made["base_model"]["fingerprint"]
            if then != self.rows_hash:
                sides = " and ".join(side for side in self.rows_hash if then.get(side) != self.rows_hash[side])
                raise UsageError(f"--from_manifest {options.from_manifest}: the {sides} rows are not those of that run")

    def set_base_model(self, base_model: str) -> None:
        """Note the fingerprint of the model that the run starts from. UsageError where it is not that of the run to be
        repeated."""
        if self._then not in (None, base_model):
            raise UsageError(f"--from_manifest {self.options.from_manifest}: {self.options.model_name} holds other "
                             "weights than that run started from")  # fmt: skip
        self.base_model = base_model

    def identity(self) -> dict:
        return checkpoint.identity_of(dataclasses.asdict(self.options), self.rows_hash, self.base_model)

    def manifest(self, counts: dict, accelerator, seconds: float, tokens: int, before: dict, after: dict) -> dict:
        """`before`, `after`: what a look at the original gave, and one at the state that is saved."""
        energy = _microjoules()
        files = [Path(name) for name in (*self.options.forget_data, *self.options.normal_data)]
        return {
            "arguments": {k: v for k, v in dataclasses.asdict(self.options).items() if k != "from_manifest"},
            "data": {
                "rows_sha256": self.rows_hash,
                "rows": counts,
                "files_sha256": {str(file): checkpoint.sha256(file) for file in files if file.is_file()},
            },
            "base_model": {"name": self.options.model_name, "fingerprint": self.base_model},
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "git_commit": _git_commit(),
            "seed": self.options.seed,
            "device": str(accelerator.device),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "energy_joules": None if energy is None or self.energy is None else round((energy - self.energy) / 1e6),
            "before": before,
            "after": after,
        }


def _hash_rows(rows: list) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.response, row.category, row.true_answers]).encode())
    return digest.hexdigest()


def _git_commit() -> str | None:
    """The commit of this project's own checkout, marked where files differ from it; None outside of one."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _microjoules() -> int | None:
    try:
        return int(ENERGY.read_text())
    except (OSError, ValueError):
        return None
