"""Compare a model before and after unlearning on the same prompts, templates and decoding, and write a report.

    python evaluate_unlearning.py --model_name models/demo --original_name models/smollm2-135m-instruct

For a model that this project unlearned, data, template, splits and seed come from its unlearn_args.json, so that the
unseen prompts are the ones that it was never trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import time
from pathlib import Path

from engine.loading import load_causal_model
from engine.paths import read_args, refuse_folder, refuse_no_folder
from engine.processes import join_processes
from evaluation import verdict
from evaluation.aggregate import make_report
from evaluation.attacks.stage import attack
from evaluation.harness import run_harness
from evaluation.inputs import read_inputs
from evaluation.judges.panel import Panel
from evaluation.judging import score_answers
from evaluation.model_run import Models, ask_models, read_by_original
from evaluation.parsing import parse_evaluation
from evaluation.report import write_model_card, write_report
from evaluation.terminal import next_steps, print_report
from utils import (
    log,
    pick_dtype,
    run_script,
    seed_everything,
    write_json,
)  # fmt: skip

REQUIREMENT_FAILED = 3  # exit code
REPORT_FILES = ("report.json", "answers.jsonl", "scores.jsonl", "report.html")


def main() -> None:
    # ------------------------------------------------------------------------------------- options and prompts
    options = parse_evaluation()
    seed_everything(options.seed, options.threads, deterministic=options.deterministic)
    processes = join_processes()  # each answers its share of the prompts; the main one writes
    show_log(processes.is_main_process)
    started = time.time()
    for name in ("perplexity_text", "mc_data", "train_log"):
        if value := getattr(options, name):
            refuse_folder(f"--{name}", value)
    folder = report_folder(options)
    inputs = read_inputs(options)  # refuses whatever cannot work, before a model is loaded
    if processes.is_main_process:
        name_other_reports(options, folder)
    models = Models(inputs, options, lambda name: load_for(name, options))
    panel = Panel(options, processes.device)

    # ----------------------------------------------- stage 1, answers; stage 2, scores: each from its file if it can
    records = ask_models(inputs, models, folder, options, before_asking=panel.check)
    own = read_by_original(records, inputs, models, folder, options)
    if not inputs.attacks:
        models.drop_all()  # judges may be as large as the models
    scores = score_answers(inputs, records, own, panel, folder, options)
    seconds = {label: record.seconds for label, record in records.items()}

    # ------------------------------------------------------------------------------------------------- attacks
    report = make_report(inputs, records, scores, options)
    if inputs.attacks:
        attacks_started = time.time()
        report |= attack(inputs, models, records, scores.lines, panel, folder, options)
        seconds["attacks"] = round(time.time() - attacks_started, 1)
    if inputs.harness:
        models.drop_all()  # the harness loads its own
        if processes.is_main_process:
            report["lm_eval_plan"] = dataclasses.asdict(inputs.harness)
            report["lm_eval"] = run_harness(inputs.harness, inputs.models, options, weights=report["weights"],
                                            folder=folder)  # fmt: skip

    # ---------------------------------------------------------------------------------------- stage 3, the report
    report["verdict"] = dataclasses.asdict(verdict.judge(report, options.require))
    report["seconds"] = {**seconds, "whole": round(time.time() - started, 1), **unlearning_seconds(options.model_name)}
    if processes.is_main_process:
        write_files(folder, report, scores.lines, inputs.train_log)
        update_card(Path(options.model_name), report)
        print_report(report, scores.lines, options.examples)
        any_kept = any(record.is_kept for record in records.values())
        print(f"report: {folder / 'report.html'} ({time_line(report['seconds'], any_kept=any_kept)})")
        for step in next_steps(report):
            print(f"next: {step}")
        raise SystemExit(exit_code(report))


def show_log(is_main: bool) -> None:
    """Send the log to stderr, a line a message, with what is taken from an earlier evaluation; from processes other
    than the main one its errors alone."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    log.propagate = False  # a library may give the root logger a handler of its own, and each line would come twice


def exit_code(report: dict) -> int:
    """Return 3 if a requirement failed, else 0."""
    return REQUIREMENT_FAILED if report["verdict"]["failed"] else 0


def report_folder(options) -> Path:
    """Return the folder of the report: --report_dir, else reports/NAME of the model's name, without its folders.

    It is not the model's own, since a report holds prompts and answers, and the model may be passed on. A NAME that
    holds the report of another model gets a number. Raises UsageError if a file stands in the way.
    """
    if options.report_dir:
        refuse_no_folder("--report_dir", options.report_dir)
        return Path(options.report_dir)
    folder = first = Path("reports") / Path(os.path.abspath(options.model_name)).name
    for number in itertools.count(2):
        refuse_no_folder("--report_dir is not given, and its default", folder)
        if not holds_other_report(folder, options.model_name):
            return folder
        folder = first.with_name(f"{first.name}-{number}")


def holds_other_report(folder: Path, model_name: str) -> bool:
    """Return whether a folder holds a report that is not known to be of this model."""
    if not (folder / "report.json").is_file():
        return False
    try:
        reported = json.loads((folder / "report.json").read_text(encoding="utf-8"))["after"]
        return Path(reported).resolve() != Path(model_name).resolve()  # a hub name, too, is equal to itself alone
    except (OSError, ValueError, KeyError, TypeError):
        return True


def name_other_reports(options, folder: Path) -> None:
    """Say which report keeps this one from reports/NAME, and that one lies in the model's folder, where earlier
    versions wrote it; neither is touched."""
    name = Path(os.path.abspath(options.model_name)).name
    if not options.report_dir and folder.name != name:
        log.warning("%s holds the report of another model, so this one goes to %s", folder.with_name(name), folder)
    if (folder / "answers.jsonl").is_file():
        log.warning("%s is of an earlier version, and stays as it is; what is written now is scores.jsonl",
                    folder / "answers.jsonl")  # fmt: skip
    old = [name for name in REPORT_FILES if (Path(options.model_name) / name).is_file()]
    if old and folder.resolve() != Path(options.model_name).resolve():
        log.warning("%s holds an earlier report with prompts and answers (%s): remove it before you pass the model on; "
                    "this one goes to %s", options.model_name, ", ".join(old), folder)  # fmt: skip


def write_files(folder: Path, report: dict, lines: list[dict], train_log) -> None:
    """Write the report and the page."""
    write_json(folder / "report.json", report)
    write_report(folder / "report.html", report, lines, train_log)


def update_card(model_folder: Path, report: dict) -> None:
    """Write the figures into the card of a model of this project; a folder that cannot be written to keeps its card."""
    if read_args(model_folder):
        try:
            write_model_card(model_folder, report)
        except OSError as error:
            log.warning("%s: its card could not be written (%s)", model_folder, error)


def load_for(name: str, options):
    """Load a model for evaluation, on this process's device. Dropout and the like are off."""
    device = join_processes().device
    model = load_causal_model(name, dtype=pick_dtype(options.dtype, device), **options.trust())
    return model.to(device).eval()  # in training mode Phi-3.5-MoE draws its experts


# ---------------------------------------------------------------------------------------------------- times
def unlearning_seconds(model_name: str) -> dict[str, float]:
    """Return {"unlearning": seconds of the run that made the model}; {} for a model of another origin."""
    seconds = ((read_args(model_name) or {}).get("run") or {}).get("seconds")  # old versions have none
    return {} if seconds is None else {"unlearning": float(seconds)}


def time_line(seconds: dict[str, float], *, any_kept: bool) -> str:
    """Return the times of an evaluation as they are printed. any_kept: whether answers of an earlier one were used."""
    line = f"{seconds['whole']:.0f} s"
    if "attacks" in seconds:
        line += f", {seconds['attacks']:.0f} s of them attacks"
    if "unlearning" in seconds and not any_kept:
        share = seconds["whole"] / (seconds["whole"] + seconds["unlearning"])
        line += f"; unlearning took {seconds['unlearning']:.0f} s, so evaluation is {100 * share:.0f} % of both"
    return line


if __name__ == "__main__":
    run_script(main)
