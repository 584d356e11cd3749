"""Load tasks of lm-evaluation-harness, with their data, and say what they are. No model is loaded.

    python evaluation/harness_probe.py '{"tasks": ["mmlu"], "folder": null, "model_args": {}}' probe.json

Run by the harness's own Python (--lm_eval_python), so it may import nothing of this project. Writes {"version",
"tasks": names as the harness spells them, "hashes": {task with data: hash of its definition and data}, "metrics":
{task or group: its metrics as results name them, or null where they show only when it has run}}, or {"refused": one
line}.
"""

import difflib
import hashlib
import json
import sys
from pathlib import Path

import yaml
from lm_eval import __version__
from lm_eval.tasks import TaskManager


class Refused(Exception):
    """One line: which task, and why it cannot be run."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    manager = TaskManager(include_path=asked["folder"], metadata=asked["model_args"])
    try:
        refuse_broken_files(asked["folder"])
        found = {"version": __version__, **load_tasks(manager, asked["tasks"])}
    except Refused as refused:
        found = {"refused": str(refused)}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def refuse_broken_files(folder: str | None) -> None:
    """Raise Refused for a task file that is no YAML: the harness passes over it, and its task would be unknown."""
    for file in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise Refused(f"{file}: is no task file ({one_line(error)})") from error


def load_tasks(manager, names: list[str]) -> dict:
    """Return {"tasks", "hashes", "metrics"} of tasks, groups, tags or patterns such as mmlu_*. Raises Refused."""
    tasks, hashes, metrics = [], {}, {}
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.7)
            raise Refused(
                f"{name}: no such task"
                + (f" (near it: {', '.join(near)})" if near else "")
                + f"; {sys.executable} -m lm_eval ls tasks lists the harness's own"
            )
        tasks += [match for match in matches if match not in tasks]
        try:
            found = manager.load(matches)
            for task_name, task in found["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise Refused(f"{name}: it runs code that the model writes; leave it out")
                if getattr(task, "MULTIMODAL", False):
                    raise Refused(f"{name}: it asks about pictures; leave it out")
                hashes[task_name], metrics[task_name] = hash_of(task), metrics_of(task)
            metrics |= dict.fromkeys(found.get("groups", ()))
        except Refused:
            raise
        except ImportError as error:
            raise Refused(f"{name}: needs a package that {sys.executable} lacks ({one_line(error)})") from error
        except Exception as error:  # of a hub, a data file, or the task's own code
            raise Refused(
                f"{name}: cannot be loaded ({one_line(error)}); a task of the harness's own takes its data "
                "from the hub or its cache, a task of yours from a file"
            ) from error
    try:
        manager.load(tasks)  # together: one task may not be named twice
    except ValueError as error:
        raise Refused(one_line(error)) from error
    return {"tasks": tasks, "hashes": hashes, "metrics": metrics}


def metrics_of(task) -> list[str] | None:
    """Return a task's metrics as results name them ("acc,none"), or None if its own code may add others."""
    if getattr(task.config, "process_results", None) is not None:
        return None
    filters = [ensemble.name for ensemble in getattr(task, "_filters", ())]
    return [f"{metric},{name}" for metric in task.aggregation() for name in filters] or None


def hash_of(task) -> str:
    """Return a hash of a task's settings, functions and data: all splits, as the library datasets fingerprints them."""
    settings = {name: value for name, value in vars(task.config).items() if name != "metadata"}  # names the model
    splits = getattr(task, "dataset", None) or {}
    prints = {name: getattr(split, "_fingerprint", None) for name, split in splits.items()}
    if not prints or None in prints.values():
        prints = list(task.eval_docs)
    content = json.dumps([settings, prints], sort_keys=True, default=as_plain)
    return hashlib.sha256(content.encode()).hexdigest()


def as_plain(value):
    """Return what JSON does not know in a form that is the same in every process: a function as its whole file."""
    if hasattr(value, "__code__"):
        return [value.__qualname__, Path(value.__code__.co_filename).read_text(encoding="utf-8")]
    return vars(value) if hasattr(value, "__dict__") else str(value)


def one_line(error: Exception) -> str:
    """Return an error's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
