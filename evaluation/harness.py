"""Run lm-evaluation-harness's named tasks on every model of an evaluation, in an environment of its own.

The harness holds some packages back, so it runs as a program of another Python (--lm_eval_python). `check_harness`
loads the tasks with their data there before any model is asked. `run_harness` runs them on one model after the other
and keeps each model's raw result beside the report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from engine.processes import join_processes
from evaluation.harness_figures import HarnessResult, compare_models, read_output
from evaluation.stages import key_of
from prompts.chat_template import default_template, read_template_args
from prompts.tokenizer import load_tokenizer
from utils import RunError, UsageError, adapter_base, log, pick_dtype, write_json

PROBE = Path(__file__).with_name("harness_probe.py")
CPU_BATCH = 8
# what launchers of several processes set: the harness would wait for the others
LAUNCHER = re.compile("(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(ACCELERATE|TORCHELASTIC|OMPI|PMI|MV2)_.*")
TO_MAKE_IT = "make lm-eval-env makes .venv-lm-eval/bin/python, which has lm-evaluation-harness"


@dataclasses.dataclass(frozen=True)
class HarnessPlan:
    """What the harness will be asked: its tasks as it spells them, and everything that its figures depend on.

    hashes: every task with data, groups resolved -> a hash of its definition and data. metrics: every task and group ->
    the metrics that it gives, None where they show only when it has run. chat: whether prompts are asked in the model's
    chat template.
    """

    version: str
    tasks: tuple[str, ...]
    hashes: dict[str, str]
    metrics: dict[str, list[str] | None]
    chat: bool


def check_harness(options) -> HarnessPlan | None:
    """Load the tasks of --lm_eval with their data; return the plan, or None without --lm_eval.

    Raises UsageError if the harness's Python or a task is missing, or a task's data; no model has been loaded by then.
    """
    if not options.lm_eval:
        refuse_options_without_tasks(options)
        return None
    if options.lm_eval_tasks and not Path(options.lm_eval_tasks).is_dir():
        raise UsageError(f"--lm_eval_tasks {options.lm_eval_tasks}: no such folder; name the folder of your task files")
    chat = asks_in_chat(options)
    asked = {"tasks": [name for words in options.lm_eval for name in words.split(",") if name],
             "folder": options.lm_eval_tasks, "model_args": model_args(options.model_name, options, chat)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "probe.json"
        try:
            run = subprocess.run([options.lm_eval_python, PROBE, json.dumps(asked), answer], capture_output=True,
                                 text=True, errors="replace", env=environment())  # fmt: skip
        except OSError as error:
            raise UsageError(f"--lm_eval_python {options.lm_eval_python}: {error.strerror}; {TO_MAKE_IT}") from error
        if run.returncode or not answer.is_file():
            raise UsageError(f"--lm_eval_python {options.lm_eval_python}: cannot load lm-evaluation-harness "
                             f"({last_lines(run.stderr, 1)}); {TO_MAKE_IT}")  # fmt: skip
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "refused" in found:
        raise UsageError(f"--lm_eval {found['refused']}")
    return HarnessPlan(found["version"], tuple(found["tasks"]), found["hashes"], found["metrics"], chat)


def refuse_options_without_tasks(options) -> None:
    """Raise UsageError if an option of the harness was given and no task: it would be dropped without a word."""
    defaults = {field.name: field.default for field in dataclasses.fields(options) if field.name.startswith("lm_eval_")}
    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    if given:
        raise UsageError(f"--{given[0]}: changes nothing without --lm_eval TASKS; name tasks, or leave it out")


def asks_in_chat(options) -> bool:
    """Return whether the harness asks in the models' chat templates. Raises UsageError if a model has none."""
    if options.lm_eval_template == "none":
        return False
    names = [options.original_name, options.model_name] + [options.retrained_name] * bool(options.retrained_name)
    templates = {name: default_template(load_tokenizer(name, trust_remote_code=options.trust_remote_code))
                 for name in names}  # fmt: skip
    evaluation_chats = options.template == "chat" or (options.template == "auto" and templates[options.original_name])
    if options.lm_eval_template == "auto" and not evaluation_chats:
        return False
    for name, template in templates.items():
        if not template:
            raise UsageError(f"--lm_eval_template {options.lm_eval_template}: the tokenizer of {name} has no chat "
                             "template; use none")  # fmt: skip
    if len(set(templates.values())) > 1:
        log.warning("--lm_eval: the models' chat templates differ, and lm-evaluation-harness takes each model's own")
    return True


# ---------------------------------------------------------------------------------------------- the models' runs
def run_harness(
    plan: HarnessPlan, names: dict[str, str | None], options, *, weights: dict[str, str], folder: Path
) -> dict:
    """Run the plan's tasks on every model; return {task: {metric: {before, after, retrained?, change, ratio?,
    higher_is_better}}}, as `compare_models` says.

    names: "before", "after" and "retrained" (None: there is none) -> folder or hub name; weights: the same labels -> a
    hash of the model's weights; folder: the report's. A model's raw result goes to folder/lm_eval/LABEL.json; it
    is taken from there (not with --ask_again), if weights, tasks, data and options are the same. Raises RunError if one
    fails.
    """
    labels = {label: name for label, name in names.items() if name}
    models = {}
    for label, name in tqdm(labels.items(), desc="lm-evaluation-harness", leave=False, disable=None):
        file = folder / "lm_eval" / f"{label}.json"
        args = model_args(name, options, plan.chat)
        key = result_key(plan, options, weights[label], args["dtype"])
        kept = None if options.ask_again else read_kept(file, key)
        models[label] = kept or run_model(label, args, plan, options, file)
        write_json(file, {"key": key, **dataclasses.asdict(models[label])})
    return compare_models(models)


def run_model(label: str, args: dict, plan: HarnessPlan, options, file: Path) -> HarnessResult:
    """Run the plan's tasks on one model; what the harness prints goes to a .log beside `file`. Raises RunError."""
    log_file = file.with_suffix(".log")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as output:
        words = [options.lm_eval_python, *command_words(args, plan, options, output)]
        with open(log_file, "w", encoding="utf-8") as text:
            code = subprocess.run(words, stdout=text, stderr=text, env=environment()).returncode
        try:
            if code == 0:
                return read_output(Path(output))
            reason = f"exit code {code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{error}"
    printed = last_lines(log_file.read_text(encoding="utf-8", errors="replace"), 2)
    raise RunError(f"lm-evaluation-harness failed on the model {label} unlearning, {args['pretrained']} ({reason}): "
                   f"{printed}; all that it printed is in {log_file}")  # fmt: skip


def command_words(args: dict, plan: HarnessPlan, options, output: str) -> list[str]:
    """Return the harness's command line, after its Python."""
    device = join_processes().device
    batch = options.lm_eval_batch or ("auto" if device.type == "cuda" else CPU_BATCH)
    words = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps(args), "--tasks", *plan.tasks,
             "--device", str(device), "--batch_size", str(batch), "--output_path", output, "--log_samples"]  # fmt: skip
    if options.lm_eval_tasks:
        words += ["--include_path", options.lm_eval_tasks]
    if options.lm_eval_limit:
        words += ["--limit", str(options.lm_eval_limit)]
    if options.lm_eval_fewshot is not None:
        words += ["--num_fewshot", str(options.lm_eval_fewshot)]
    if plan.chat:
        words += ["--apply_chat_template"] + (["--system_instruction", options.system] if options.system else [])
    return words + (["--trust_remote_code"] if options.trust_remote_code else [])


def model_args(name: str, options, chat: bool) -> dict:
    """Return the harness's --model_args of a model, an adapter's folder with its base. Raises UsageError if the base is
    missing."""
    dtype = pick_dtype(options.dtype, join_processes().device)
    args = {"pretrained": name, "dtype": str(dtype).removeprefix("torch.")}
    if base := adapter_base(name):
        has_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
        args |= {"pretrained": base, "peft": name, "tokenizer": name if has_tokenizer else base}
    if chat and options.template_args:
        args["chat_template_args"] = read_template_args(options.template_args)
    return args


def environment() -> dict[str, str]:
    """Return the environment of the harness: one process, and no module of the current folder before its own."""
    own = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    return own | {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}


# ---------------------------------------------------------------------------------------------- results that are kept
def result_key(plan: HarnessPlan, options, weights: str, dtype: str) -> str:
    """Return a hash of all that one model's figures depend on."""
    asked = [weights, dtype, dataclasses.asdict(plan), options.lm_eval_limit, options.lm_eval_fewshot]
    asked += [options.system, options.template_args] if plan.chat else []
    return key_of("harness", asked)


def read_kept(file: Path, key: str) -> HarnessResult | None:
    """Return the result in a file of an earlier evaluation if it has this key."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return HarnessResult(kept["results"], kept["samples"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_lines(text: str, count: int) -> str:
    """Return the last lines of a program's output as one line, without progress bars and blank lines."""
    lines = [line.strip() for line in re.split("[\r\n]+", text) if line.strip() and "%|" not in line]
    return " | ".join(lines[-count:])[-500:] or "it printed nothing"
