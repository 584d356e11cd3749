"""The attacks of an evaluation, between their files: answers/attacks.jsonl, then report.json's entries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.processes import join_processes
from evaluation.attacks.base import AskedRow
from evaluation.attacks.rows import forgotten_rows
from evaluation.attacks.runner import AttackAnswers, ask_attacks, judge_attacks, num_prompts, read_probes
from evaluation.inputs import EvaluationInputs
from evaluation.judges.base import Judgement
from evaluation.judges.panel import Panel, decider
from evaluation.model_run import Models
from evaluation.stages import Record, code_hash, key_of, may_reuse
from utils import log, read_json_lines, write_json_lines

# options that change what an attack asks
SETTINGS = ("attacks", "quick", "seed", "max_new_tokens", "max_prompt_tokens", "relearn_lr", "dtype", "deterministic",
            "retrained_name")  # fmt: skip


def attack_models(
    inputs: EvaluationInputs, models: Models, records: dict[str, Record], lines: list[dict], panel: Panel, folder: Path,
    options,
) -> dict:  # fmt: skip
    """Return what report.json says of attacks: `attacks`, `attacked`, and what the probes read.

    lines: those of scores.jsonl. The answers are those in `folder` if the same models were asked the same prompts; they
    are judged in any case.
    """
    forgotten = forgotten_rows(lines, inputs.formatters["after"].style, num_prompts(options), options.seed)
    judges = JudgeOfAttacks(panel, options)
    settings = [getattr(options, name) for name in SETTINGS]
    weights = [record.weights for record in records.values()]
    given = [repr((row.row, row.reference)) for row in forgotten.rows], repr(inputs.splits), repr(inputs.relearn_sets)
    key = key_of("attacks", weights, settings, given, code_hash(Path(__file__).parent))
    path = folder / "answers" / "attacks.jsonl"
    kept = read_attacks(path, key) if may_reuse(options) and None not in weights else None
    if kept is not None:
        answers, probes = kept
    else:
        answers = ask_attacks(forgotten.rows, inputs, models.get, judges.given, options)
        probes = read_probes(forgotten.rows, inputs, models.get)
        if join_processes().is_main_process:
            write_json_lines(path, [{"key": key, "probes": probes}, *map(dataclasses.asdict, answers)])
    entries = judge_attacks(answers, forgotten.rows, judges.given, judges.labels)
    return {"attacks": entries, "attacked": forgotten.summary(), **probes}


def read_attacks(path: Path, key: str) -> tuple[list[AttackAnswers], dict] | None:
    """Return the answers under attack, and what the probes read, if the file is of this key."""
    try:
        header, *lines = read_json_lines(path)
        if header["key"] != key:
            return None
        kept = [AttackAnswers(**line) for line in lines], header["probes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("answers under attack: as they stand in %s", path)
    return kept


@dataclasses.dataclass
class JudgeOfAttacks:
    """Asks each row's deciding judge, all rows of a judge at once."""

    panel: Panel
    options: object

    def given(self, rows: list[AskedRow], answers: list[str]) -> list[bool]:
        """Return whether each answer gives what was asked for. What a judge cannot count is not given."""
        names = self._names(rows)
        return [bool(self.panel.gives(name, judgement))
                for name, judgement in zip(names, self._judgements(rows, answers), strict=True)]  # fmt: skip

    def labels(self, rows: list[AskedRow], answers: list[str]) -> list[str]:
        """Return what each row's judge calls its answer."""
        return [judgement.label for judgement in self._judgements(rows, answers)]

    def _names(self, rows: list[AskedRow]) -> list[str]:
        return [row.judge or decider(self.options, side="keep", has_reference=False) for row in rows]

    def _judgements(self, rows: list[AskedRow], answers: list[str]) -> list[Judgement]:
        """Return what each row's judge says of its answer, whose reference is the one that came with the row."""
        names, found = self._names(rows), {}
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            asked = [(dataclasses.replace(rows[i].row, response=rows[i].reference), answers[i]) for i in places]
            found |= dict(zip(places, self.panel.judge(name, asked), strict=True))
        return [found[i] for i in range(len(rows))]
