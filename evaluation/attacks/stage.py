"""The attacks of an evaluation between its files: asked, or read from an earlier one; judged, or read likewise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.processes import join_processes
from evaluation.attacks.base import AskedRow
from evaluation.attacks.rows import forgotten_rows
from evaluation.attacks.runner import AttackAnswers, ask_attacks, judge_attacks, num_prompts, read_probes
from evaluation.inputs import EvaluationInputs
from evaluation.judges.base import Judgement
from evaluation.judges.panel import OUTCOME, Panel
from evaluation.judging import JUDGING_CODE
from evaluation.model_run import Models
from evaluation.stages import Record, code_hash, key_of, may_reuse, read_keyed, write_keyed
from utils import log

# what the answers depend on, beside rows and weights
ATTACK_OPTIONS = ("attacks", "attack_prompts", "relearn_lr", "quick", "max_new_tokens", "max_prompt_tokens", "seed",
                  "dtype", "deterministic")  # fmt: skip


class PanelOfAttacks:
    """What the attacks ask of the judges: each row's own deciding judge decides over the answers to it."""

    def __init__(self, panel: Panel):
        self.panel = panel

    def given(self, rows: list[AskedRow], answers: list[str]) -> list[bool | None]:
        """Return whether each answer gives what its row asked for, None if its judge says nothing of it."""
        return [self.panel.gives(judge, judgement) for judge, judgement in self._judged(rows, answers)]

    def labels(self, rows: list[AskedRow], answers: list[str]) -> list[str]:
        """Return what each row's judge calls the answer."""
        return [judgement.label for _, judgement in self._judged(rows, answers)]

    def _judged(self, rows: list[AskedRow], answers: list[str]) -> list[tuple[str, Judgement]]:
        """Return each answer's judge and what it says; a judge is asked about all its answers at once."""
        names = [row.judge or OUTCOME for row in rows]
        found: dict[int, Judgement] = {}
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            asked = [(dataclasses.replace(rows[i].row, response=rows[i].reference), answers[i]) for i in places]
            found |= dict(zip(places, self.panel.judge(name, asked), strict=True))
        return [(name, found[i]) for i, name in enumerate(names)]


def attack(
    inputs: EvaluationInputs, models: Models, records: dict[str, Record], lines: list[dict], panel: Panel, folder: Path,
    options,
) -> dict:  # fmt: skip
    """Return report.json's entries of the attacks and probes. lines: those of scores.jsonl.

    A changed judge judges the answers anew; the models are asked again only where it calls other prompts forgotten.
    """
    forgotten = forgotten_rows(lines, inputs.formatters["after"].style, num_prompts(options), options.seed)
    settings = {name: getattr(options, name) for name in ATTACK_OPTIONS}
    prompts = {label: [formatter.prompt_of(row.row, ask=True) for row in forgotten.rows]
               for label, formatter in inputs.formatters.items()}  # fmt: skip
    key = key_of("attacks", settings, {label: record.weights for label, record in records.items()},
                 [repr((row.id, row.row)) for row in forgotten.rows], repr((inputs.splits, inputs.relearn_sets)),
                 prompts, join_processes().device.type,
                 code_hash(Path(__file__).parent))  # fmt: skip
    judges, reuse = PanelOfAttacks(panel), may_reuse(options) and all(record.weights for record in records.values())
    kept = asked_before(folder, key) if reuse else None
    if kept is None:
        answers = ask_attacks(forgotten.rows, inputs, models.get, judges.given, options)
        kept = answers, read_probes(forgotten.rows, inputs, models.get)
        if join_processes().is_main_process:
            lines = [dataclasses.asdict(line) for line in answers]
            write_keyed(folder / "answers" / "attacks.jsonl", lines, key, kept[1])
    answers, probes = kept
    judged_key = key_of("judged attacks", key, panel.identity(), code_hash(*JUDGING_CODE))
    if not reuse or (judged := read_keyed(folder / "attacks.jsonl", judged_key)) is None:
        judged = judge_attacks(answers, forgotten.rows, judges.given, judges.labels), None
        if join_processes().is_main_process:
            write_keyed(folder / "attacks.jsonl", judged[0], judged_key)
    return {"attacks": judged[0], "attacked": forgotten.summary(), **probes}


def asked_before(folder: Path, key: str) -> tuple[list[AttackAnswers], dict] | None:
    """Return the answers and the probes' findings of an earlier evaluation, if they are of this key."""
    if (kept := read_keyed(folder / "answers" / "attacks.jsonl", key)) is None:
        return None
    log.info("attacks: answers as they stand in %s", folder / "answers" / "attacks.jsonl")
    return [AttackAnswers(**line) for line in kept[0]], kept[1]
