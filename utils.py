"""Load models, write files atomically, log, and end a script with the right exit code."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hub import cached_file, why_unreachable

log = logging.getLogger("unlearning")


# -------------------------------------------------------------------------------------- how a script ends
class UsageError(Exception):
    """Wrong options or input: one line that says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """The run itself failed: one line. Exit code 1."""


def run_script(main) -> None:
    """Call `main` and end the process. Exit codes: 0 done, 1 failed while running, 2 wrong use or input, 130 Ctrl-C."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        print(f"{name}: {' '.join(str(error).split())[:200]} Use --gradient_checkpointing, --use_lora, --load_in_4bit, "
              "--gradient_accumulation or smaller batches of answers (--set own_answers.batch_size=8; in an evaluation "
              "--generation_batch 8); --dry_run says what a run takes", file=sys.stderr)  # fmt: skip
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    finally:  # without this, the process group's threads sometimes abort a process that is done
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class StopSignals:
    """Note SIGTERM and Ctrl-C inside the `with` block instead of obeying them, so that a step is finished and saved.

    signalled: this process got one; asked: the run must stop (the loop sets it, on all processes alike).
    A second signal ends the process at once.
    """

    def __init__(self):
        self.signalled = self.asked = False
        self._number, self._before = signal.SIGTERM, {}

    def _note(self, number, frame) -> None:
        self.signalled, self._number = True, number
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def __enter__(self):
        self._before = {which: signal.signal(which, self._note) for which in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def farewell(self, text: str) -> int:
        """Print one line; return the exit code: 143 for SIGTERM, 130 for Ctrl-C."""
        name = signal.Signals(self._number).name
        print(f"{Path(sys.argv[0]).name}: stopped by {name}: {text}", file=sys.stderr)
        return 128 + self._number


# ----------------------------------------------------------------------------------------- atomic writing
def atomic_write_text(path: str | Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, content) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def write_json_lines(path: str | Path, rows) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: str | Path) -> list:
    """Read what `write_json_lines` wrote. Only a newline ends a line: an answer may hold other ones, such as U+2028."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


@contextlib.contextmanager
def atomic_dir(path: str | Path):
    """Give a temporary folder to fill; it is renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    beside.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the user's umask decides
    try:
        yield beside
        for file in beside.rglob("*"):  # safetensors makes its files private too
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            sync(file)  # before the rename: after a power cut, the new name must not hold empty files
        sync(beside)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ----------------------------------------------------------------------------------------------- logging
class RunLog:
    """The readable log, and the same events as JSON lines; `docs/fields.md` explains every field.

    path: the readable log; write: False on processes other than the first; resume: append to both files.
    """

    def __init__(self, path: str | Path, *, write: bool = True, resume: bool = False):
        self.path = Path(path)
        self._json = None
        mode = "a" if resume else "w"
        log.handlers.clear()
        log.setLevel(logging.INFO if write else logging.ERROR)
        log.propagate = False
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(screen)
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            to_file = logging.FileHandler(self.path, mode=mode, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
            log.addHandler(to_file)
            self._json = open(self.twin(self.path), mode, encoding="utf-8", buffering=1)  # noqa: SIM115

    @staticmethod
    def twin(path: str | Path) -> Path:
        """Return where the events of the readable log `path` go as JSON lines."""
        return Path(path).with_name(Path(path).name.removesuffix(".log") + ".jsonl")

    def event(self, kind: str, line: str, **fields) -> None:
        """Log one readable line, and the same as one JSON object whose `event` is `kind`."""
        log.info(line)
        if self._json:
            self._json.write(json.dumps({"event": kind, **fields}, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ memory
def peak_memory_gib(device: torch.device) -> float:
    """Return the most GiB held so far on the GPU, or by this process on a CPU (NaN if the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return _proc_gib("/proc/self/status", "VmHWM")


def current_memory_gib(device: torch.device) -> float:
    """Return the GiB held now on the GPU, or by this process on a CPU (NaN if the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    return _proc_gib("/proc/self/status", "VmRSS")


def free_memory_gib(device: torch.device) -> float:
    """Return the GiB that are free on the GPU, or on the machine for a CPU (NaN if the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return _proc_gib("/proc/meminfo", "MemAvailable")


def trim_cpu_heap() -> None:
    """Return freed memory to the system, if the C library can (glibc).

    Each step has other shapes, so freed blocks do not fit the next ones, and the process would grow as long as it runs.
    A GPU's own allocator is left alone.
    """
    if _trim is not None:
        _trim(0)


try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError, TypeError):  # not glibc (musl, macOS, Windows)
    _trim = None


def _proc_gib(file: str, field: str) -> float:
    """Read a field that /proc gives in kB; return GiB, or NaN if it cannot be read."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20
    except (OSError, StopIteration, ValueError, IndexError):
        return math.nan


# ------------------------------------------------------------------------------------------------- seeds
def seed_everything(seed: int, threads: int = 0, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch; set torch's CPU threads (0: leave them). deterministic: take torch's kernels that
    give the same bits in every run, where it has them, and warn where not. Call it before a GPU is used."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ models
def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return fp32 or bf16; `auto` is bf16 if the hardware computes in it (a GPU, or a CPU with AVX512-BF16 or AMX)."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:
            native = torch.cpu.get_capabilities()
            name = "bf16" if native.get("avx512_bf16") or native.get("amx_bf16") else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def load_model(
    name: str, *, kind=AutoModelForCausalLM, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False,
    allow_pickle: bool = False, **settings,
):  # fmt: skip
    """Load a causal language model (or another `kind` of auto class) in `dtype`, in training mode, without dropout.

    Dropout is off because the KL is measured against an original without it: an unchanged model would have a loss.
    A local folder that holds its weights as a pickle is refused unless `allow_pickle`; hub models are read as
    transformers reads them (safetensors if there are any, else with the weights-only unpickler).
    settings: further arguments of from_pretrained, such as a quantisation.
    Raises UsageError if the model cannot be loaded, or lacks tensors, or holds weights that are not finite.
    """
    folder = Path(name)
    if folder.is_dir() and not allow_pickle and not any(folder.glob("*.safetensors*")):
        pickles = sorted(f.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(suffix))
        if pickles:
            raise UsageError(f"{name}: holds its weights as a pickle ({pickles[0]}), which can carry code; convert it "
                             "to safetensors, or pass --allow_pickle")  # fmt: skip
    if kind is AutoModelForCausalLM:
        kind = _text_model_class(name, trust_remote_code)
    model, found = from_pretrained(kind, name, dtype=dtype, use_safetensors=None, trust_remote_code=trust_remote_code,
                                   output_loading_info=True, ignore_mismatched_sizes=True, **settings)  # fmt: skip
    wrong = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if wrong:  # transformers initialises them at random: the model would look as if it had forgotten
        raise UsageError(f"{name}: {len(wrong)} tensors of {type(model).__name__} are missing or of another shape (the "
                         f"first: {wrong[0]}); save the whole model under its own names")  # fmt: skip
    broken = next((n for n, tensor in model.named_parameters()
                   if tensor.is_floating_point() and not torch.isfinite(tensor).all()), None)  # fmt: skip
    if broken:
        raise UsageError(f"{name}: holds weights that are not finite ({broken}); take a copy that is whole")
    return without_dropout(model).train()


def _text_model_class(name: str, trust_remote_code: bool):
    """Return the auto class of a model that writes text; models with a vision tower may have one of their own."""
    config = type(load_config(name, trust_remote_code=trust_remote_code))
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind for kind in kinds if config in kind._model_mapping), AutoModelForCausalLM)


def adapter_base(name: str) -> str | None:
    """Return the base that an adapter's folder names; None for a model. Raises UsageError if the base is missing."""
    file = Path(name) / "adapter_config.json"
    if not file.is_file() or (Path(name) / "config.json").is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or (looks_local(base) and not Path(base).is_dir()):
        raise UsageError(f"model {name}: is an adapter of {base or 'no named base'}, and there is no such folder; "
                         f"write the base's folder into {file} (base_model_name_or_path)")  # fmt: skip
    return base


def load_config(name: str, *, trust_remote_code: bool = False):
    """Load a model's config. Raises UsageError if that fails."""
    return from_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)


def model_folder(name: str) -> Path | None:
    """Return the folder of a local model (of an adapter: its base's), or a hub model's cached snapshot, or None."""
    if (folder := Path(adapter_base(name) or name)).is_dir():
        return folder
    config = cached_file(name, "config.json")
    return config.parent if config else None


def context_length(config) -> int | None:
    """Return how many tokens a model can read at most; None if its config does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def attention_window(config) -> int | None:
    """Return the shortest attention window of the layers in tokens; None if every layer attends to all tokens."""
    config = config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size")  # Mistral and Gemma, Llama 4, GPT-Neo
    return min((w for name in names if isinstance(w := getattr(config, name, None), int) and w > 0), default=None)


def without_dropout(model):
    """Set every dropout and layer-drop rate in the model's modules to 0; its config is left as it was."""
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if "drop" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def looks_local(name: str) -> bool:  # a path, not the name of a hub model
    return name.startswith((".", "/", "~", "models/")) or os.path.sep in name.strip("/").replace("/", "", 1)


def from_pretrained(auto_class, name: str, **kwargs):
    """Load a config, tokenizer or model with an auto class. Raises UsageError if the folder or hub name fails."""
    if looks_local(name) and not Path(name).is_dir():
        raise UsageError(f"model {name}: no such folder")
    if base := adapter_base(name):
        is_saved_beside = auto_class is AutoTokenizer and (Path(name) / "tokenizer_config.json").is_file()
        name = name if is_saved_beside else base
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"model {name}: not a model folder (it has no config.json)")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        if not Path(name).is_dir() and (why := why_unreachable(name)):
            raise OSError(why)
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(name).is_dir():
            raise UsageError(f"{name}: cannot be loaded ({_first_line(error)})") from error
        raise UsageError(
            f"model {name} is not in a local folder and cannot be downloaded: copy it to models/{Path(name).name} "
            f"and pass --model_name=models/{Path(name).name} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def fingerprint(model) -> str:
    """Return a hash of a model's weights: names, shapes, sums and first values. It is the same on every machine."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        flat = flat.cpu() if flat.device.type == "mps" else flat  # which has no fp64
        digest.update(f"{name} {tuple(tensor.shape)} {flat.double().sum().item():.6e}".encode())
        digest.update(flat[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
