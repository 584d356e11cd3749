"""Compare a model before and after unlearning on the same prompts, templates and decoding, and write a report.

    python evaluate_unlearning.py --model_name models/demo --original_name models/smollm2-135m-instruct

For a model that this project unlearned, data, template, splits and seed come from its unlearn_args.json, so that the
unseen prompts are the ones that it was never trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path

from engine.loading import load_causal_model
from engine.paths import refuse_folder, refuse_no_folder
from engine.processes import join_processes
from evaluation import verdict
from evaluation.attacks.runner import run_attacks
from evaluation.inputs import read_inputs
from evaluation.judges.embedder import SentenceEmbedder
from evaluation.judging import SCHEMA, judge_answers
from evaluation.model_run import run_models
from evaluation.parsing import parse_evaluation
from evaluation.report import print_report, write_model_card, write_report
from utils import (
    fingerprint,
    log,
    pick_dtype,
    read_json_lines,
    run_script,
    seed_everything,
    write_json,
    write_json_lines,
)  # fmt: skip

REQUIREMENT_FAILED = 3  # exit code
REPORT_FILES = ("report.json", "answers.jsonl", "report.html")
PRINT_ONLY = {"reuse", "examples"}  # options that change what is printed, not what is measured


def main() -> None:
    # ------------------------------------------------------------------------------------- options and prompts
    options = parse_evaluation()
    seed_everything(options.seed, options.threads, deterministic=options.deterministic)
    processes = join_processes()  # each answers its share of the prompts; the main one writes
    started = time.time()
    for name in ("perplexity_text", "mc_data", "train_log"):
        if value := getattr(options, name):
            refuse_folder(f"--{name}", value)
    folder = report_folder(options)
    inputs = read_inputs(options)  # refuses whatever cannot work, before a model is loaded
    if processes.is_main_process:
        name_other_reports(options, folder)
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
        update_card(Path(options.model_name), report)
        print_report(report, lines, options.examples)
        print(f"report: {folder / 'report.html'} ({time_line(report['seconds'])})")
        raise SystemExit(exit_code(report))


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
    old = [name for name in REPORT_FILES if (Path(options.model_name) / name).is_file()]
    if old and folder.resolve() != Path(options.model_name).resolve():
        log.warning("%s holds an earlier report with prompts and answers (%s): remove it before you pass the model on; "
                    "this one goes to %s", options.model_name, ", ".join(old), folder)  # fmt: skip


def write_files(folder: Path, report: dict, lines: list[dict], train_log) -> None:
    """Write the report, the answers and the page."""
    write_json(folder / "report.json", report)
    write_json_lines(folder / "answers.jsonl", lines)
    write_report(folder / "report.html", report, lines, train_log)


def update_card(model_folder: Path, report: dict) -> None:
    """Write the figures into the card of a model of this project; a folder that cannot be written to keeps its card."""
    if (model_folder / "unlearn_args.json").is_file():
        try:
            write_model_card(model_folder, report)
        except OSError as error:
            log.warning("%s: its card could not be written (%s)", model_folder, error)


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
