"""Compare a model before and after unlearning on the same prompts, templates and decoding, and write a report.

    python evaluate_unlearning.py --model_name models/demo --original_name models/smollm2-135m-instruct

For a model that this project unlearned, data, template, splits and seed come from its unlearn_args.json, so that the
unseen prompts are the ones that it was never trained on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from engine.loading import load_causal_model
from engine.processes import join_processes
from evaluation import verdict
from evaluation.attacks.runner import run_attacks
from evaluation.inputs import read_inputs
from evaluation.judges import SentenceEmbedder
from evaluation.judging import SCHEMA, judge_answers
from evaluation.model_run import run_models
from evaluation.report import print_report, write_model_card, write_report
from options import EvaluateOptions, parse
from utils import (
    UsageError,
    fingerprint,
    pick_dtype,
    read_json_lines,
    run_script,
    seed_everything,
    write_json,
    write_json_lines,
)  # fmt: skip

REQUIREMENT_FAILED = 3  # exit code
PRINT_ONLY = {"reuse", "examples"}  # options that change what is printed, not what is measured


def main() -> None:
    # ------------------------------------------------------------------------------------- options and prompts
    options = parse(EvaluateOptions)
    seed_everything(options.seed, options.threads, deterministic=options.deterministic)
    processes = join_processes()  # each answers its share of the prompts; the main one writes
    started = time.time()
    inputs = read_inputs(options)  # refuses whatever cannot work, before a model is loaded
    folder = report_folder(options)
    if (
        options.reuse
        and processes.num_processes == 1
        and (cached := load_cached_report(folder, options, inputs.hash()))
    ):
        print_report(*cached, options.examples)
        print(f"report: {folder / 'report.html'} (as it was; without --reuse it is made anew)")
        raise SystemExit(exit_code(cached[0]))

    # ----------------------------------------------------------------------- both models' answers, then judged
    runs = run_models(inputs, options, lambda name: load_for(name, options))
    embed = SentenceEmbedder()
    report, lines = judge_answers(inputs, runs, embed, options)
    seconds = {label: run.seconds for label, run in runs.items()}

    # ------------------------------------------------------------------------------------ attacks, then verdict
    if inputs.attacks:
        if processes.is_main_process:
            write_json_lines(folder / "answers.jsonl", lines)  # the answers took minutes, attacks take longer
        attacks_started = time.time()
        report["attacks"], probes = run_attacks(inputs, runs, lines, embed, options)
        report |= probes
        seconds["attacks"] = round(time.time() - attacks_started, 1)
    report["verdict"] = dataclasses.asdict(verdict.judge(report, options.require))
    report["seconds"] = {**seconds, "whole": round(time.time() - started, 1), **unlearning_seconds(options.model_name)}

    # -------------------------------------------------------------------------------------------------- report
    if processes.is_main_process:
        write_files(folder, report, lines, inputs.train_log)
        print_report(report, lines, options.examples)
        print(f"report: {folder / 'report.html'} ({time_line(report['seconds'])})")
        raise SystemExit(exit_code(report))


def exit_code(report: dict) -> int:
    """Return 3 if a requirement failed, else 0."""
    return REQUIREMENT_FAILED if report["verdict"]["failed"] else 0


def report_folder(options) -> Path:
    """Return the folder of the report: the model's; for a hub name a folder under reports/, since a folder named as the
    model would be taken for the model the next time. Raises UsageError if it is a file."""
    name = options.report_dir or options.model_name
    folder = Path(name) if options.report_dir or Path(name).is_dir() else Path("reports") / Path(name).name
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report_dir {folder}: is a file; name a folder")
    return folder


def write_files(folder: Path, report: dict, lines: list[dict], train_log) -> None:
    """Write the report, the answers and the page; the model card too if the folder holds a model of this project."""
    write_json(folder / "report.json", report)
    write_json_lines(folder / "answers.jsonl", lines)
    write_report(folder / "report.html", report, lines, train_log)
    if (folder / "unlearn_args.json").is_file():
        write_model_card(folder)


def load_for(name: str, options):
    """Load a model for evaluation, on this process's device. Dropout and the like are off."""
    device = join_processes().device
    dtype = pick_dtype(options.dtype, device)
    return (
        load_causal_model(name, dtype=dtype, **options.trust()).to(device).eval()
    )  # Phi-3.5-MoE draws its experts else


def load_cached_report(folder: Path, options, inputs_hash: str) -> tuple[dict, list[dict]] | None:
    """Return the report and the answers in `folder` if the same options, inputs and weights would give them again."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        lines = read_json_lines(folder / "answers.jsonl")
        cached, current = ({k: v for k, v in values.items() if k not in PRINT_ONLY}
                           for values in (report["options"], dataclasses.asdict(options)))  # fmt: skip
        is_same = cached == current and (report["schema"], report["inputs"]) == (SCHEMA, inputs_hash)
        if not is_same or not (folder / "report.html").is_file():
            return None
        weights = {"before": fingerprint(load_for(options.original_name, options)),
                   "after": fingerprint(load_for(options.model_name, options))}  # fmt: skip
        return (report, lines) if report["fingerprints"] == weights else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------------------------------------------- times
def unlearning_seconds(model_name: str) -> dict[str, float]:
    """Return {"unlearning": seconds of the run that made the model}; {} for a model of another origin."""
    try:
        run = json.loads((Path(model_name) / "unlearn_args.json").read_text(encoding="utf-8"))["run"]
        return {"unlearning": float(run["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def time_line(seconds: dict[str, float]) -> str:
    """Return the times of an evaluation as they are printed."""
    line = f"{seconds['whole']:.0f} s"
    if "attacks" in seconds:
        line += f", {seconds['attacks']:.0f} s of them attacks"
    if "unlearning" in seconds:
        share = seconds["whole"] / (seconds["whole"] + seconds["unlearning"])
        line += f"; unlearning took {seconds['unlearning']:.0f} s, so evaluation is {100 * share:.0f} % of both"
    return line


if __name__ == "__main__":
    run_script(main)
