"""Run every combination of some settings, evaluate it on the dev split, and plot the Pareto front.

    python sweep.py --config configs/demo.yaml --grid configs/sweep.yaml --sweep_dir sweeps/demo

The grid file has lists: `normal_weight: [3, 6]`, `stop.prefill_tokens: [0, 5]`, `lora.targets: [[q_proj, v_proj]]`.
A list of mappings, under any name, holds settings that go together: `loss: [{forget_loss: npo, bad_weight: 2}, ...]`.
With --evaluation, the runs are judged by that evaluation, such as one against a twin, and not on the dev split.
A stopped sweep continues when it is started again: finished runs are kept, and an interrupted run is resumed. The
sweep prints a table and writes front.svg and sweep.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Optional

import yaml

from command_line import OneLineParser
from engine import checkpoint
from engine.paths import read_args, refuse_no_folder
from evaluation.figures import point_values
from evaluation.report import front_plot
from evaluation.stages import ASKED_BY, take_answers
from evaluation.terminal import print_table
from options import COUNT, UnlearnOptions, option
from run.parsing import old_names, parse_run
from utils import RunError, UsageError, atomic_write_text, run_script, write_json

OptionalCount = Optional[COUNT]  # noqa: UP045 - a check is a function, which knows no |
HERE = Path(__file__).resolve().parent
EXTRA = {"similarity": "similarity", "back": "comes back"}  # figures of a run: their columns
DEV_PROMPTS = 64  # of a group
HELD_OUT = {"dev_share": 0.1, "test_share": 0.2}  # of both sides


@dataclasses.dataclass
class SweepOptions:
    """Run every combination of some settings, evaluate it, and plot the Pareto front."""

    EXAMPLES: ClassVar = {
        "the demo's search; goes on where it was stopped (setup_demo.py makes the model)": (
            "python sweep.py --config configs/demo.yaml --grid configs/sweep.yaml --sweep_dir sweeps/demo"
        )
    }

    config: str = option("configs/demo.yaml", "YAML file of the options that all runs share, as for unlearn_harm.py")
    grid: str = option("configs/sweep.yaml", "YAML file with a list of values for each option or setting to vary")
    sweep_dir: str = option("sweeps/sweep", "output folder of the runs and the front")
    evaluation: str | None = option(
        None, "YAML file of an evaluation, as for evaluate_unlearning.py, by which each run is judged (if unset: the "
        "dev split of its own rows)"
    )  # fmt: skip
    attacks: list[str] = option(
        [], "attacks on each run, as for evaluate_unlearning.py (if unset: as --evaluation says)"
    )
    prompts_per_group: OptionalCount = option(
        None, "maximum prompts per group (if unset: as --evaluation says, or 64 of the dev split)"
    )


def main() -> None:
    """Run the sweep and print its table. Raises RunError if a combination failed."""
    options = SweepOptions(**vars(OneLineParser(SweepOptions).parse_args()))
    refuse_no_folder("--sweep_dir", options.sweep_dir)
    folder, runs = Path(options.sweep_dir), combinations(options.grid)
    refuse_unknown_settings(runs, options.config)
    records, failed, earlier = [], [], None
    for number, settings in enumerate(runs, 1):
        name = slug(settings)
        print(f"run {number} of {len(runs)}: {name}", file=sys.stderr, flush=True)
        try:
            records.append({"run": name, "settings": settings, **judged(folder / name, settings, options, earlier)})
            earlier = earlier or report_of(folder / name)
        except RunError as error:  # the other combinations still run
            print(f"sweep.py: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    if not records:
        raise RunError("no combination could be run and judged")
    for one in records:
        one["on_front"] = not any(dominates(other, one) for other in records)
    records.sort(key=lambda one: one["forget"])
    write_json(folder / "sweep.json", records)
    atomic_write_text(folder / "front.svg", front_plot(records))
    extra = [key for key in EXTRA if any(one[key] is not None for one in records)]
    print_table([{"front": "*" if one["on_front"] else "", "run": one["run"],
                  "forget answered": f"{one['forget']:.3f}", "worst kept ratio": f"{one['keep']:.3f}",
                  **{EXTRA[key]: "-" if one[key] is None else f"{one[key]:.3f}" for key in extra},
                  "seconds": f"{one['seconds']:.0f}"}
                 for one in records])  # fmt: skip
    print(f"\n* no other run forgets more and keeps more; plot: {folder / 'front.svg'}")
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} combinations failed: {' '.join(failed)}")


def combinations(path: str) -> list[dict]:
    """Read the grid; return every combination as {option or setting: value}. Raises UsageError."""
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--grid {path}: cannot be read ({' '.join(str(error).split())})") from error
    known = {field.name for field in dataclasses.fields(UnlearnOptions) if field.init} | old_names().keys()
    if not isinstance(grid, dict) or not grid:
        raise UsageError(f"--grid {path}: must hold one 'option: [value, ...]' a line")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"--grid {path}: option {name!r} needs a list of values")
        mappings = [value for value in values if isinstance(value, dict)]
        if mappings and (len(mappings) < len(values) or not all(mappings)):
            raise UsageError(f"--grid {path}: {name!r} must hold mappings of settings alone, or values alone")
        for option_name in {key for value in mappings for key in value} or [name]:
            reserved = ("config", "model_save_dir", "log_file", "overwrite", "resume", "set")
            if "." not in str(option_name) and (option_name not in known or option_name in reserved):
                raise UsageError(f"--grid {path}: {option_name!r} is not an option that can be varied")
    choices = [[value if isinstance(value, dict) else {name: value} for value in values]
               for name, values in grid.items()]  # fmt: skip
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices)]


def refuse_unknown_settings(runs: list[dict], config: str) -> None:
    """Raise UsageError, or exit with 2, for a name or a value that no run takes, before the first one starts."""
    for settings in runs:
        parse_run([f"--config={config}", *words_for(settings)])


def slug(settings: dict) -> str:
    """Return a folder name for a combination."""

    def text(value) -> str:
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return ",".join(f"{name}={text(value)}" for name, value in settings.items()).replace("/", "_")


def words_for(settings: dict) -> list[str]:
    """Return a combination as command-line arguments; a name with a dot is a setting of the recipe."""
    arguments = []
    for name, value in settings.items():
        if "." in name:
            arguments += ["--set", f"{name}={json.dumps(value)}"]
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def held_out_words(settings: dict, config: str) -> list[str]:
    """Return the shares to hold out, where neither the combination nor the shared options name them: combinations are
    compared on prompts that none of them trains on."""
    given = parse_run([f"--config={config}", *words_for(settings)])
    return [f"--{name}={share}" for name, share in HELD_OUT.items() if getattr(given, name) is None]


def report_of(folder: Path) -> Path:
    """Return where the report of a run lies."""
    return folder.parent / "reports" / folder.name


def judged(folder: Path, settings: dict, options, earlier: Path | None) -> dict:
    """Run and evaluate one combination, unless it is finished; return its figures.

    earlier: another run's report, from which the answers of the models that all runs share are taken.
    """
    arguments = words_for(settings) + ([] if options.evaluation else held_out_words(settings, options.config))
    log_file = folder.parent / "logs" / f"{folder.name}.log"
    if read_args(folder):
        refuse_other_settings(folder, [f"--config={options.config}", *arguments])
    else:
        run("unlearn_harm.py", f"--config={options.config}", *arguments, f"--model_save_dir={folder}", "--resume",
            f"--log_file={log_file}")  # fmt: skip
    report_folder = report_of(folder)
    if earlier is not None:
        take_answers(earlier, report_folder)
    by = ["--split=dev", f"--prompts_per_group={options.prompts_per_group or DEV_PROMPTS}"]
    if options.evaluation:
        by = [f"--config={options.evaluation}", f"--train_log={log_file.with_suffix('.jsonl')}", f"--seed={ASKED_BY}"]
        by += [f"--prompts_per_group={options.prompts_per_group}"] if options.prompts_per_group else []
    by += ["--attacks", *options.attacks] if options.attacks else []
    run("evaluate_unlearning.py", *by, f"--model_name={folder}", "--examples=0", f"--report_dir={report_folder}")
    report = json.loads((report_folder / "report.json").read_text(encoding="utf-8"))
    figures = point_values(report)
    if missing := {"forget.answered.ratio", "keep.worst.answered.ratio"} - figures.keys():
        raise RunError(f"{folder}: {' and '.join(sorted(missing))} not measured: the original answers nothing")
    seconds = read_args(folder)["run"]["seconds"]
    back = [value for name, value in figures.items() if re.fullmatch(r"attack\.[^.]*\.counted", name)]
    return {"forget": figures["forget.answered"], "keep": figures["keep.worst.answered.ratio"],
            "similarity": figures.get("keep.similarity"), "back": max(back, default=None),
            "seconds": seconds}  # fmt: skip


def refuse_other_settings(folder: Path, argv: list[str]) -> None:
    """Raise UsageError if the finished run in a folder has other settings than these arguments ask for."""
    run_options = read_args(folder)["options"]
    finished, asked = (checkpoint.flat(tree) for tree in (run_options, dataclasses.asdict(parse_run(argv))))
    names = asked.keys() - checkpoint.FREE
    if differ := checkpoint.differences(*({name: flat.get(name) for name in names} for flat in (finished, asked))):
        raise UsageError(f"{folder}: made with other settings ({'; '.join(differ)}); remove it or change --sweep_dir")


def run(script: str, *argv: str) -> None:
    """Run one of this project's scripts. Raises RunError, with the end of its stderr, if it fails."""
    with subprocess.Popen([sys.executable, str(HERE / script), *argv], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
        try:
            _, stderr = child.communicate()
        except KeyboardInterrupt:  # the child gets Ctrl-C too; wait until it has finished its step and saved
            child.wait()
            raise
    if child.returncode:
        raise RunError(f"{script} {' '.join(argv)}: ended with {child.returncode}: {stderr.strip()[-300:]}")


def dominates(one: dict, other: dict) -> bool:
    """Return whether `one` is at least as good as `other` in both figures, and better in one."""
    mine, theirs = (-one["forget"], one["keep"]), (-other["forget"], other["keep"])
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


if __name__ == "__main__":
    run_script(main)
