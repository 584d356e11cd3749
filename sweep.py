"""A small search over recipe settings: every combination is run, judged on the development split, and put on one front.

    python sweep.py --config configs/demo.yaml --grid configs/sweep.yaml --sweep_dir sweeps/demo

The grid file holds lists: `normal_weight: [3, 6]`, `stop.prefill_tokens: [0, 5]`, `lora.targets: [[q_proj, v_proj]]`.
A sweep that was stopped goes on where it was: what is finished is not run again, and a run that was cut is resumed. It
prints a table and writes front.svg and sweep.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import yaml

from engine import checkpoint
from evaluation import verdict
from evaluation.report import front_plot, print_table
from method.recipe import old_names, parse_run
from options import POSITIVE, OneLineParser, UnlearnOptions, option
from utils import RunError, UsageError, atomic_write_text, run_script, write_json

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class SweepOptions:
    config: str = option("configs/demo.yaml", "options that all runs share, as for unlearn_harm.py")
    grid: str = option("configs/sweep.yaml", "YAML file: for each option to vary, a list of its values")
    sweep_dir: str = option("sweeps/sweep", "folder for the runs and the front")
    prompts_per_group: POSITIVE = option(64, "development prompts a group at most")


def main() -> None:
    options = SweepOptions(**vars(OneLineParser(SweepOptions, allow_abbrev=False).parse_args()))
    folder, runs = Path(options.sweep_dir), combinations(options.grid)
    found, failed = [], []
    for number, settings in enumerate(runs, 1):
        name = slug(settings)
        print(f"run {number} of {len(runs)}: {name}", file=sys.stderr, flush=True)
        try:
            found.append({"run": name, "settings": settings, **judged(folder / name, settings, options)})
        except RunError as error:  # the other combinations are still worth their time
            print(f"sweep.py: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    if not found:
        raise RunError("no combination could be run and judged")
    for one in found:
        one["on_front"] = not any(dominates(other, one) for other in found)
    found.sort(key=lambda one: one["forget"])
    write_json(folder / "sweep.json", found)
    atomic_write_text(folder / "front.svg", front_plot(found))
    print_table([{"front": "*" if one["on_front"] else "", "run": one["run"],
                  "harmful on topic": f"{one['forget']:.3f}", "worst kept ratio": f"{one['keep']:.3f}",
                  "similarity": f"{one['similarity']:.3f}", "seconds": f"{one['seconds']:.0f}"}
                 for one in found])  # fmt: skip
    print(f"\n* no other run forgets more and keeps more; plot: {folder / 'front.svg'}")
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} combinations failed: {' '.join(failed)}")


def combinations(path: str) -> list[dict]:
    """Every combination of the grid's values, as {option: value}. Raises UsageError."""
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--grid {path}: cannot be read ({' '.join(str(error).split())})") from error
    known = {field.name for field in dataclasses.fields(UnlearnOptions) if field.init} | old_names().keys()
    if not isinstance(grid, dict) or not grid:
        raise UsageError(f"--grid {path}: must hold one 'option: [value, ...]' a line")
    for name, values in grid.items():
        own = ("config", "model_save_dir", "log_file", "overwrite", "resume", "set")
        if "." not in str(name) and (name not in known or name in own):
            raise UsageError(f"--grid {path}: {name!r} is not an option that can be varied")
        if not isinstance(values, list) or not values:
            raise UsageError(f"--grid {path}: option {name!r} needs a list of values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def slug(settings: dict) -> str:
    """A combination's name, fit for a folder."""

    def text(value) -> str:
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return ",".join(f"{name}={text(value)}" for name, value in settings.items()).replace("/", "_")


def words_for(settings: dict) -> list[str]:
    """A combination as words of a command line; a name with a point is a setting of the recipe."""
    words = []
    for name, value in settings.items():
        if "." in name:
            words += ["--set", f"{name}={json.dumps(value)}"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def judged(folder: Path, settings: dict, options) -> dict:
    """Figures of one combination: run it and evaluate it, unless that is done."""
    words = words_for(settings)
    if (folder / "unlearn_args.json").is_file():
        refuse_other_settings(folder, [f"--config={options.config}", *words])
    else:
        log_file = folder.parent / "logs" / f"{folder.name}.log"
        run("unlearn_harm.py", f"--config={options.config}", *words, f"--model_save_dir={folder}", "--resume",
            f"--log_file={log_file}")  # fmt: skip
    run("evaluate_unlearning.py", f"--model_name={folder}", "--split=dev", "--reuse", "--examples=0",
        f"--prompts_per_group={options.prompts_per_group}")  # fmt: skip
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    figures = verdict.figures(report)
    if missing := {"forget.on_topic", "keep.on_topic_ratio"} - figures.keys():
        raise RunError(f"{folder}: {' and '.join(sorted(missing))} not measured: the original says nothing on topic")
    seconds = json.loads((folder / "unlearn_args.json").read_text(encoding="utf-8"))["run"]["seconds"]
    return {"forget": figures["forget.on_topic"], "keep": figures["keep.on_topic_ratio"],
            "similarity": figures["keep.similarity"], "seconds": seconds}  # fmt: skip


def refuse_other_settings(folder: Path, words: list[str]) -> None:
    """A finished run that these words would not make again has no place on the same front: UsageError."""
    made = json.loads((folder / "unlearn_args.json").read_text(encoding="utf-8"))["options"]
    then, now = (checkpoint.flat(some) for some in (made, dataclasses.asdict(parse_run(words))))
    names = now.keys() - checkpoint.FREE - {"model_save_dir"}
    if differ := checkpoint.differences(*({name: some.get(name) for name in names} for some in (then, now))):
        raise UsageError(f"{folder}: made with other settings ({'; '.join(differ)}); remove it or change --sweep_dir")


def run(script: str, *words: str) -> None:
    with subprocess.Popen([sys.executable, str(HERE / script), *words], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
        try:
            _, said = child.communicate()
        except KeyboardInterrupt:  # the child has it too: it finishes its step and saves, and is given the time
            child.wait()
            raise
    if child.returncode:
        raise RunError(f"{script} {' '.join(words)}: ended with {child.returncode}: {said.strip()[-300:]}")


def dominates(one: dict, other: dict) -> bool:
    """At least as good in both, and better in one."""
    mine, others = (-one["forget"], one["keep"]), (-other["forget"], other["keep"])
    return mine != others and all(a >= b for a, b in zip(mine, others, strict=True))


if __name__ == "__main__":
    run_script(main)
