"""Run the requested attacks and their controls, and judge what they bring back.

Two steps, so that a file can lie between them: `ask_attacks` gives all answers, `judge_attacks` report.json's entries.
What counts is how many of the forgotten prompts (answered before unlearning, not after) are answered again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tqdm.auto import tqdm

from engine.tree import AnswerLogitsModel
from evaluation.attacks import ATTACKS
from evaluation.attacks.base import CONTROL_NAMES, AskedRow, Attack, AttackConfig, AttackResult, AttackTarget, Probe
from evaluation.attacks.rows import ExampleMaker, Given, collect_data
from evaluation.inputs import EvaluationInputs
from evaluation.metrics.statistics import Estimate, rate
from utils import UsageError, log

QUICK_PROMPTS = 6
QUICK = {"num_rephrasings": 5, "num_samples": 4, "num_examples": 4, "num_keep_sets": 0, "relearn_steps": 8,
         "relearn_answers": 1, "quantised_bits": (4,), "pruned_shares": (0.3,), "ablated_layers": 4}  # fmt: skip
NUM_EXAMPLES = 3  # answers that are shown of a variant
GIVEN_LABEL = "given"  # of an example, if nobody tells the judge's own label


@dataclasses.dataclass(kw_only=True)
class AttackAnswers:
    """One attacked prompt under one variant: a line of answers/attacks.jsonl.

    answers: the model's; control: those of the model `control_name`, None if the control is a share, `chance`.
    hits, control_hits: whether each answer is what the attack looked for; None: a judge of answers decides.
    group, prompt: as in scores.jsonl; id: tells the prompt, with its earlier turns, from all others.
    judged, is_control: as in report.json.
    """

    attack: str
    family: str
    variant: str
    group: str
    prompt: str
    id: str
    answers: list[str]
    judged: bool = True
    is_control: bool = False
    control: list[str] | None = None
    control_name: str | None = None
    chance: float | None = None
    hits: list[bool] | None = None
    control_hits: list[bool] | None = None


# ------------------------------------------------------------------------------------------------------ ask
def ask_attacks(
    rows: list[AskedRow], inputs: EvaluationInputs, get_model: Callable[[str], AnswerLogitsModel], given: Given, options
) -> list[AttackAnswers]:
    """Return the answers of every requested attack and of its control, variant by variant.

    get_model: "before", "after" or "retrained" -> the model; the last is asked for only if --retrained_name is given
    and an attack's control needs it. given: see `judge_attacks`; here it says which example prompts the original
    answers. An attack that cannot be done is named in the log, and the others still run.
    """
    names = [name for name in inputs.attacks if isinstance(ATTACKS[name], Attack)]
    if not rows or not names:
        return []
    config = make_config(options)
    maker = ExampleMaker(original=get_model("before").model, formatter=inputs.formatters["before"], given=given,
                         options=options, config=config)  # fmt: skip
    needs = set().union(*(ATTACKS[name].needs for name in names))
    data = collect_data(rows, inputs.splits, inputs.relearn_sets, needs, maker)

    def target(label: str) -> AttackTarget:
        wrapped = get_model(label)
        return AttackTarget(model=wrapped.model, formatter=inputs.formatters[label], packed=wrapped.packed, data=data,
                            config=config)  # fmt: skip

    lines = []
    for name in tqdm(names, desc="attacks", leave=False, disable=None):
        attack = ATTACKS[name]
        knows_none = attack.control == "retrained" and bool(options.retrained_name)
        try:
            results = attack.run(target("after"))
            controls = attack.run(target("retrained" if knows_none else "before"))
        except UsageError as error:  # such as a model that takes no adapters: the other attacks still run
            log.warning("attack %s: not done: %s", name, error)
            continue
        lines += lines_of(name, results, controls, rows, "retrained" if knows_none else "original")
    return lines


def make_config(options) -> AttackConfig:
    """Return the size of the attacks that the options ask for."""
    return AttackConfig(max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch, seed=options.seed,
                        relearn_lr=options.relearn_lr, **(QUICK if options.quick else {}))  # fmt: skip


def num_prompts(options) -> int:
    """Return how many forgotten prompts are attacked at most."""
    return QUICK_PROMPTS if options.quick else options.attack_prompts


def lines_of(
    name: str, results: list[AttackResult], controls: list[AttackResult], rows: list[AskedRow], control: str
) -> list[AttackAnswers]:
    """Return one line per variant and prompt of an attack. control: "original" or "retrained".

    A control is the same variant of the attack; there is none if its model cannot be asked so, such as in a chat
    template that it lacks. If guessing is the control, `controls` become entries of their own.
    """
    attack, lines, by_variant = ATTACKS[name], [], {beside.variant: beside for beside in controls}
    for result in results:
        beside, by_chance = by_variant.get(result.variant), result.chance is not None
        # without a model that never knew the rows, an attack that teaches them is only shown
        judged = result.judged and attack.control == control
        compared_to = CONTROL_NAMES["chance" if by_chance else control]
        for i, row in enumerate(rows if result.rows is None else [rows[i] for i in result.rows]):
            same = {"attack": name, "family": attack.family, "variant": result.variant, "group": row.group,
                    "prompt": row.row.prompt, "id": row.id, "judged": judged, "chance": result.chance,
                    "control_name": compared_to}  # fmt: skip
            line = AttackAnswers(**same, answers=result.answers[i], hits=result.hits and result.hits[i])
            lines.append(line)
            if beside is None:
                continue
            answers, hits = beside.answers[i], beside.hits and beside.hits[i]
            if by_chance:
                lines.append(AttackAnswers(**same, answers=answers, hits=hits, is_control=True))
            else:
                line.control, line.control_hits = answers, hits
    return lines


def read_probes(
    rows: list[AskedRow], inputs: EvaluationInputs, get_model: Callable[[str], AnswerLogitsModel]
) -> dict[str, dict | None]:
    """Return what each probe reads in both models, by `report_key`: None if it was not asked for, if nothing was
    forgotten, or if it cannot read this kind of model."""
    findings = {probe.report_key: None for probe in ATTACKS.values() if isinstance(probe, Probe)}
    for probe in (ATTACKS[name] for name in inputs.attacks if isinstance(ATTACKS[name], Probe)):
        both = {label: probe.measure(get_model(label).model, inputs.formatters[label], [asked.row for asked in rows])
                for label in ("before", "after") if rows}  # fmt: skip
        findings[probe.report_key] = both if both and all(both.values()) else None
    return findings


# ---------------------------------------------------------------------------------------------------- judge
def judge_attacks(
    lines: list[AttackAnswers], rows: list[AskedRow], given: Given,
    labels: Callable[[list[AskedRow], list[str]], list[str]] | None = None,
) -> list[dict]:  # fmt: skip
    """Return report.json's `attacks`, an entry a variant. A prompt is back if any of its answers is given again.

    rows: those that are forgotten under these judges; lines of others are left out. given: whether each row's deciding
    judge says that an answer gives what was asked for. labels: what that judge calls each answer, for the examples.
    """
    by_id = {row.id: row for row in rows}
    lines = [line for line in lines if line.id in by_id]
    asked = [(by_id[line.id], text) for line in lines
             for texts, hits in ((line.answers, line.hits), (line.control, line.control_hits))
             if hits is None for text in texts or ()]  # fmt: skip
    judged = iter(given([row for row, _ in asked], [text for _, text in asked]) if asked else [])
    variants: dict[tuple, list] = {}
    for line in lines:
        hits = line.hits if line.hits is not None else [next(judged) for _ in line.answers]
        of_control = line.control_hits
        if of_control is None and line.control is not None:
            of_control = [next(judged) for _ in line.control]
        variants.setdefault((line.attack, line.variant, line.is_control), []).append((line, hits, of_control))
    return [entry_of(members, by_id, labels) for members in variants.values()]


def entry_of(members: list[tuple], by_id: dict[str, AskedRow], labels) -> dict:
    """Return the entry of one variant. members: (line, its hits, its control's hits) of every prompt."""
    first = members[0][0]
    control = None
    if first.is_control:
        pass  # it is one itself
    elif first.chance is not None:
        control = Estimate(first.chance, len(members), first.chance, first.chance)
    elif first.control is not None:
        control = rate_back([of_control for _, _, of_control in members])
    return {
        "name": first.attack, "family": first.family, "variant": first.variant, "is_control": first.is_control,
        "judged": first.judged, "back": dataclasses.asdict(rate_back([hits for _, hits, _ in members])),
        "control": control and dataclasses.asdict(control), "control_name": first.control_name if control else None,
        "examples": examples_of(members, by_id, labels),
    }  # fmt: skip


def rate_back(of_prompts: list[list[bool | None]]) -> Estimate:
    """Return the share of the prompts with a hit. A prompt of whose answers a judge says nothing (None) is not counted,
    unless another answer to it hit."""
    told = [hits for hits in of_prompts if any(hits) or None not in hits]
    return rate([any(hits) for hits in told])


def examples_of(members: list[tuple], by_id: dict[str, AskedRow], labels) -> list[dict]:
    """Return the first answers that were given again, one a prompt, with what the judge calls them."""
    found = [(by_id[line.id], line.answers[hits.index(True)], line.hits is None)
             for line, hits, _ in members if True in hits][:NUM_EXAMPLES]  # fmt: skip
    said = [GIVEN_LABEL] * len(found)
    if labels and all(by_judge for *_, by_judge in found) and found:
        said = labels([row for row, _, _ in found], [text for _, text, _ in found])
    return [{"prompt": row.row.prompt, "answer": text, "label": label}
            for (row, text, _), label in zip(found, said, strict=True)]  # fmt: skip
