"""The attacks of an evaluation between its files: asked, or read from an earlier one; judged, or read likewise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.processes import join_processes
from engine.weights_hash import weights_hash
from evaluation.attacks import ATTACKS
from evaluation.attacks.base import AskedRow, Probe
from evaluation.attacks.rows import Forgotten, Said, forgotten_rows
from evaluation.attacks.runner import AttackAnswers, ask_attacks, judge_attacks, num_prompts, read_probes
from evaluation.groups import unseen_groups
from evaluation.inputs import EvaluationInputs
from evaluation.judges.base import Judgement
from evaluation.judges.panel import OUTCOME, Panel
from evaluation.judging import JUDGING_CODE
from evaluation.model_run import Models
from evaluation.stages import Record, code_hash, key_of, may_reuse, read_keyed, write_keyed
from utils import log, read_json_lines, write_json_lines

# What the answers depend on, beside rows and weights. An attack may ask in another template than the evaluation does,
# so the prompts alone do not tell what it asks.
ATTACK_OPTIONS = ("attack_prompts", "relearn_lr", "relearn_weights", "quick", "max_new_tokens", "max_prompt_tokens",
                  "seed", "dtype", "deterministic", "template", "system", "template_args")  # fmt: skip


class PanelOfAttacks:
    """What the attacks ask of the judges: each row's own deciding judge decides over the answers to it."""

    def __init__(self, panel: Panel):
        self.panel = panel

    def judge(self, rows: list[AskedRow], answers: list[str]) -> list[Said]:
        """Return what is said of each answer. A judge is asked about all its answers at once."""
        names = [row.judge or OUTCOME for row in rows]
        found: dict[int, Judgement] = {}
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            asked = [(dataclasses.replace(rows[i].row, response=rows[i].reference), answers[i]) for i in places]
            found |= dict(zip(places, self.panel.judge(name, asked), strict=True))
        return [Said(found[i].label, self.panel.gives(name, found[i])) for i, name in enumerate(names)]


@dataclasses.dataclass(kw_only=True)
class AskedAttacks:
    """What answers/attacks.jsonl holds: a first line with each attack's key and the probes' findings, then the answers.

    keys: of all attacks and probes, as this evaluation would ask them. answers: by attack; findings: by probe. The file
    is written whole after each attack, so that one that fails costs no earlier one.
    """

    file: Path
    keys: dict[str, str]
    answers: dict[str, list[AttackAnswers]] = dataclasses.field(default_factory=dict)
    findings: dict[str, dict | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, keys: dict[str, str]) -> AskedAttacks:
        """Return what the file holds of these keys: nothing of an attack whose key is another."""
        asked = cls(file=file, keys=keys)
        try:
            header, *lines = read_json_lines(file)
            kept = {name for name, key in header["keys"].items() if keys.get(name) == key}
            asked.findings = {name: found for name, found in header["probes"].items() if name in kept}
            asked.answers = {name: [] for name in header["keys"] if name in kept - set(asked.findings)}
            for line in map(lambda line: AttackAnswers(**line), lines):
                if line.attack in kept:
                    asked.answers[line.attack].append(line)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(file=file, keys=keys)
        return asked

    def missing(self, names: list[str]) -> list[str]:
        """Return those of the attacks and probes that are still to be asked."""
        return [name for name in names if name not in self.answers and name not in self.findings]

    def add(self, name: str, answers: list[AttackAnswers]) -> None:
        """Take an attack's answers, and write the file."""
        self.answers[name] = answers
        self.write()

    def write(self) -> None:
        """Write the file, all or nothing of it."""
        if join_processes().is_main_process:
            keys = {name: self.keys[name] for name in (*self.answers, *self.findings)}
            lines = [dataclasses.asdict(line) for of_attack in self.answers.values() for line in of_attack]
            write_json_lines(self.file, [{"keys": keys, "probes": self.findings}, *lines])


def attack(
    inputs: EvaluationInputs, models: Models, records: dict[str, Record], lines: list[dict], panel: Panel, folder: Path,
    options,
) -> dict:  # fmt: skip
    """Return report.json's entries of the attacks and probes. lines: those of scores.jsonl.

    Each attack is asked again only where what it depends on has changed. A changed judge judges the answers anew; the
    models are asked again where it calls other prompts forgotten. --embedder is part of the built-in judge of outcomes,
    which chooses the examples that some attacks show or teach: those are asked again.
    """
    num_groups = len(unseen_groups(group.name for group in inputs.groups if group.side == "forget" and group.counts))
    forgotten = forgotten_rows(lines, inputs.groups, inputs.formatters["after"].style, num_prompts(options, num_groups),
                               options.seed, inputs.attacks)  # fmt: skip
    judges, reuse = PanelOfAttacks(panel), may_reuse(options) and all(record.weights for record in records.values())
    keys, file = attack_keys(forgotten, inputs, records, options), folder / "answers" / "attacks.jsonl"
    asked = AskedAttacks.read(file, keys) if reuse else AskedAttacks(file=file, keys=keys)
    missing = asked.missing(inputs.attacks)
    if len(missing) < len(inputs.attacks):
        log.info("attacks: answers as they stand in %s: %s", file,
                 ", ".join(name for name in inputs.attacks if name not in missing))  # fmt: skip
    probes = [name for name in missing if isinstance(ATTACKS[name], Probe)]
    ask_attacks([name for name in missing if name not in probes], forgotten.rows, inputs, models.get, judges.judge,
                options, keep=asked.add)  # fmt: skip
    if probes:
        asked.findings |= read_probes(probes, forgotten.rows, inputs, models.get)
        asked.write()

    answers = [line for name in inputs.attacks for line in asked.answers.get(name, ())]
    judged_key = key_of("judged attacks", [(name, keys[name]) for name in inputs.attacks if name in asked.answers],
                        panel.identity(), code_hash(*JUDGING_CODE))  # fmt: skip
    if not reuse or (judged := read_keyed(folder / "attacks.jsonl", judged_key)) is None:
        judged = judge_attacks(answers, forgotten.rows, judges.judge), None
        if join_processes().is_main_process:
            write_keyed(folder / "attacks.jsonl", judged[0], judged_key)
    findings = {probe.report_key: asked.findings.get(name) if name in inputs.attacks else None
                for name, probe in ATTACKS.items() if isinstance(probe, Probe)}  # fmt: skip
    return {"attacks": judged[0], "attacked": forgotten.summary(), **findings}


def attack_keys(
    forgotten: Forgotten, inputs: EvaluationInputs, records: dict[str, Record], options
) -> dict[str, str]:  # fmt: skip
    """Return the key of every attack and probe: a hash of all that its answers depend on."""
    settings = {name: getattr(options, name) for name in ATTACK_OPTIONS}
    prompts = {label: [formatter.prompt_of(row.row, ask=True) for row in forgotten.rows]
               for label, formatter in inputs.formatters.items()}  # fmt: skip
    shared = key_of("attacks", settings, {label: record.weights for label, record in records.items()},
                    [repr((row.id, row.row)) for row in forgotten.rows], repr((inputs.splits, inputs.relearn_sets)),
                    prompts, join_processes().device.type,
                    code_hash(Path(__file__).parent))  # fmt: skip
    embedder = options.embedder and [options.embedder, weights_hash(options.embedder)]
    chosen_by = [embedder, code_hash(*JUDGING_CODE)]  # examples are those that the built-in judge calls answered
    return {name: key_of(name, shared, chosen_by if getattr(entry, "needs", None) else None)
            for name, entry in ATTACKS.items()}  # fmt: skip
