"""Record what a run was made of: enough to repeat it, compare two runs, and audit one (run_manifest.json).

Fields that only inform (versions, commit, energy, hashes of files) never stop a run: one that cannot be had is None.
"""

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
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")  # the CPU's counter in microjoules, on some machines


class RunMetadata:
    """Collect the facts of a run from its start on.

    options: the run's; rows: a side's name ("forget", "normal") -> every row that was read for it.
    Raises UsageError if --from_manifest names a run with other rows, or a file that no run wrote.
    """

    def __init__(self, options, rows: dict[str, list]):
        self.options, self.base_model = options, ""
        self.dtype: str | None = None
        self._answers = None  # a running hash of the model's own answers
        self._then: str | None = None  # the fingerprint of the base model of the run that is to be repeated
        self.rows_hash = {side: _hash_rows(side_rows) for side, side_rows in rows.items()}
        self.files = [
            name
            for name in (*options.forget_data, *options.normal_data, *options.forget_text, *options.normal_text)
            if _is_file(name)
        ]
        self.started, self.energy = time.time(), _microjoules()
        if options.from_manifest:
            then, self._then = _read_manifest(options.from_manifest)
            if then != self.rows_hash:
                differ = [side for side in self.rows_hash if then.get(side) != self.rows_hash[side]]
                raise UsageError(f"--from_manifest {options.from_manifest}: the {' and '.join(differ) or 'other'} rows "
                                 "are not those of that run")  # fmt: skip

    def set_base_model(self, base_model: str, dtype: torch.dtype | None = None) -> None:
        """Note the fingerprint of the model that the run starts from, and the dtype that it trains in.

        Raises UsageError if the run that is to be repeated started from another model.
        """
        if self._then not in (None, base_model):
            raise UsageError(f"--from_manifest {self.options.from_manifest}: {self.options.model_name} holds other "
                             "weights than that run started from")  # fmt: skip
        self.base_model = base_model
        self.dtype = None if dtype is None else str(dtype).removeprefix("torch.")

    def add_answers(self, rows: list) -> None:
        """Add rows that the model answered itself to what makes this run the same one; order counts."""
        for row in rows:
            self._answers = self._answers or hashlib.sha256()
            self._answers.update(json.dumps([row.prompt, row.response, row.complete]).encode())

    @property
    def has_own_answers(self) -> bool:
        """Tell whether the model has answered rows itself."""
        return self._answers is not None

    def identity(self) -> dict:
        """Return what a checkpoint must agree with to be this run's (checkpoint.identity_of)."""
        return checkpoint.identity_of(dataclasses.asdict(self.options), self.rows_hash, self.base_model,
                                      dtype=self.dtype,
                                      answers_hash=self._answers and self._answers.hexdigest())  # fmt: skip

    def manifest(self, account: list, accelerator, seconds: float, tokens: int, before: dict, after: dict) -> dict:
        """Return the content of run_manifest.json.

        account: what became of the rows, a dataclass a source; seconds: the run's; before, after: an evaluation of
        the original, and of the saved state.
        """
        return {
            "arguments": {k: v for k, v in dataclasses.asdict(self.options).items() if k != "from_manifest"},
            "data": {
                "rows_sha256": self.rows_hash,
                "rows": [dataclasses.asdict(source) for source in account],
                "files_sha256": {str(Path(name)): _or_none(checkpoint.sha256, Path(name)) for name in self.files},
            },
            "base_model": {"name": self.options.model_name, "fingerprint": self.base_model},
            "packages": {name: _or_none(importlib.metadata.version, name) for name in PACKAGES},
            "python": platform.python_version(),
            "git_commit": _or_none(_git_commit),
            "seed": self.options.seed,
            "device": str(accelerator.device),
            "processor": _or_none(platform.machine),
            "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes,
            "started": _or_none(lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))),
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "energy_joules": self._joules(),
            "before": before,
            "after": after,
        }

    def _joules(self) -> int | None:
        """Return the CPU's energy since the start; None if the machine does not count it, or its counter began anew."""
        now = _microjoules()
        if now is None or self.energy is None or now < self.energy:
            return None
        return round((now - self.energy) / 1e6)


def _read_manifest(name: str) -> tuple[dict, str]:
    """Return (rows_sha256 by side, the base model's fingerprint) of a run_manifest.json."""
    try:
        made = json.loads(Path(name).read_text(encoding="utf-8"))
        rows, base_model = made["data"]["rows_sha256"], made["base_model"]["fingerprint"]
        if not isinstance(rows, dict) or not isinstance(base_model, str):
            raise TypeError("rows_sha256 must be an object and fingerprint a text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"--from_manifest {name}: is not the run_manifest.json of a run ({error!r})") from error
    return rows, base_model


def _or_none(read, *arguments):
    """Return what `read` gives; None if it fails in whatever way, since the run does not depend on it."""
    try:
        return read(*arguments)
    except Exception:
        return None


def _is_file(name: str) -> bool:
    return bool(_or_none(Path(name).is_file))


def _hash_rows(rows: list) -> str:
    digest = hashlib.sha256()
    for row in rows:
        more = [part for part in (row.wanted, row.earlier) if part]  # rows without them keep the hash they always had
        digest.update(json.dumps([row.prompt, row.response, row.category, row.true_answers, *more]).encode())
    return digest.hexdigest()


def _git_commit() -> str | None:
    """Return the commit of this project's own checkout, marked if files differ from it; None outside of one."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _microjoules() -> int | None:
    return _or_none(lambda: int(ENERGY.read_text()))
