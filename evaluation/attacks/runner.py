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
from evaluation.attacks.base import CONTROL_NAMES, AskedRow, AttackConfig, AttackData, AttackResult, AttackTarget
from evaluation.attacks.relearning import choose_learning_rate
from evaluation.attacks.rows import ExampleMaker, Judge, collect_data
from evaluation.inputs import EvaluationInputs
from evaluation.metrics.statistics import Estimate, rate
from evaluation.options import AUTO
from utils import UsageError, log

QUICK_PROMPTS = 6
FEWEST_OF_GROUP = 2  # prompts that are attacked of each group at least, if it has forgotten ones
QUICK_TOKENS = 24  # of an answer at most
QUICK = {"num_rephrasings": 4, "num_samples": 4, "num_examples": 4, "num_keep_sets": 0, "relearn_steps": 8,
         "relearn_answers": 1, "quantised_bits": (4,), "pruned_shares": (0.3,), "ablated_layers": 4}  # fmt: skip
NUM_EXAMPLES = 3  # answers that are shown of a variant
WHOLE = {"adapters": (False,), "whole": (True,), "both": (False, True)}  # --relearn_weights
CONTROLS = {"before": "original", "retrained": "retrained"}  # a model -> what it is called as a control
GIVEN_LABEL = "given"  # of an example that no judge decides about


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
    names: list[str], rows: list[AskedRow], inputs: EvaluationInputs, get_model: Callable[[str], AnswerLogitsModel],
    judge: Judge, options, keep: Callable[[str, list[AttackAnswers]], None] | None = None,
) -> list[AttackAnswers]:  # fmt: skip
    """Return the answers of the named attacks and of their controls, variant by variant.

    keep: called with each attack's name and answers as soon as they are there, since a later one may fail.
    get_model: "before", "after" or "retrained" -> the model; the last, the control of all attacks, is asked for only if
    --retrained_name is given. judge: says which example prompts the original answers. Prompts and passages are attacked
    each with examples of their kind. An attack that cannot be done is named in the log, and the others still run.
    """
    if not rows or not names:
        return []
    config = make_config(options)
    maker = ExampleMaker(original=get_model("before").model, formatter=inputs.formatters["before"], judge=judge,
                         options=options, config=config)  # fmt: skip
    kinds = [of_kind for is_text in (False, True) if (of_kind := [row for row in rows if row.row.is_text == is_text])]
    needs = set().union(*(ATTACKS[name].needs for name in names))
    data = [collect_data(of_kind, inputs.splits, inputs.relearn_sets, needs, maker) for of_kind in kinds]

    def target(label: str, of_kind: AttackData) -> AttackTarget:
        wrapped = get_model(label)
        return AttackTarget(model=wrapped.model, formatter=inputs.formatters[label], packed=wrapped.packed,
                            data=of_kind, config=config)  # fmt: skip

    lines, control = [], "retrained" if options.retrained_name else "before"
    for name in tqdm(names, desc="attacks", leave=False, disable=None):
        of_attack = []
        for of_kind, examples in zip(kinds, data, strict=True):
            run = ATTACKS[name].on_text if of_kind[0].row.is_text else ATTACKS[name].run
            if run is None:
                log.info("attack %s: not on the passages: it has no form for text", name)
                continue
            try:
                if name == "relearn" and config.relearn_lr == AUTO:
                    config.relearn_lr = choose_learning_rate(target(control, examples))
                results, controls = run(target("after", examples)), run(target(control, examples))
            except UsageError as error:  # such as a model that takes no adapters: the other attacks still run
                log.warning("attack %s: not done: %s", name, error)
                continue
            of_attack += lines_of(name, results, controls, of_kind, CONTROLS[control])
        if keep and of_attack:
            keep(name, of_attack)
        lines += of_attack
    return lines


def make_config(options) -> AttackConfig:
    """Return the size of the attacks that the options ask for."""
    tokens = min(QUICK_TOKENS, options.max_new_tokens) if options.quick else options.max_new_tokens
    return AttackConfig(max_new_tokens=tokens, batch_size=options.generation_batch, seed=options.seed,
                        relearn_lr=options.relearn_lr, relearn_whole=WHOLE[options.relearn_weights],
                        **(QUICK if options.quick else {}))  # fmt: skip


def num_prompts(options, num_groups: int) -> int:
    """Return how many forgotten prompts are attacked at most. num_groups: that they are drawn from."""
    return max(QUICK_PROMPTS if options.quick else options.attack_prompts, FEWEST_OF_GROUP * num_groups)


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
        judged = result.judged and control in (attack.control, "retrained")
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
    names: list[str], rows: list[AskedRow], inputs: EvaluationInputs, get_model: Callable[[str], AnswerLogitsModel]
) -> dict[str, dict | None]:
    """Return what each named probe reads in both models, by name: None if nothing was forgotten, or if it cannot read
    this kind of model."""
    findings = {}
    for name in names:
        probe = ATTACKS[name]
        both = {label: probe.measure(get_model(label).model, inputs.formatters[label], [asked.row for asked in rows])
                for label in ("before", "after") if rows}  # fmt: skip
        findings[name] = both if both and all(both.values()) else None
    return findings


# ---------------------------------------------------------------------------------------------------- judge
@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedLine:
    """A line with what came back. hits: of its answers; labels: what the judge calls them, None if no judge decides;
    control_hits: of its control's answers, None if it has none."""

    line: AttackAnswers
    hits: list[bool | None]
    labels: list[str] | None
    control_hits: list[bool | None] | None


def judge_attacks(lines: list[AttackAnswers], rows: list[AskedRow], judge: Judge) -> list[dict]:
    """Return report.json's `attacks`, an entry a variant. A prompt is back if any of its answers is given again.

    rows: those that are forgotten under these judges; lines of others are left out. judge: is called once, with all
    answers, since a judge model is loaded anew for every call.
    """
    by_id = {row.id: row for row in rows}
    lines = [line for line in lines if line.id in by_id]
    asked = [(by_id[line.id], text) for line in lines
             for texts, hits in ((line.answers, line.hits), (line.control, line.control_hits))
             if hits is None for text in texts or ()]  # fmt: skip
    judged = iter(judge([row for row, _ in asked], [text for _, text in asked]) if asked else [])
    variants: dict[tuple, list[JudgedLine]] = {}
    for line in lines:
        hits, labels, control_hits = line.hits, None, line.control_hits
        if hits is None:
            said = [next(judged) for _ in line.answers]
            hits, labels = [answer.given for answer in said], [answer.label for answer in said]
        if control_hits is None and line.control is not None:
            control_hits = [next(judged).given for _ in line.control]
        member = JudgedLine(line=line, hits=hits, labels=labels, control_hits=control_hits)
        variants.setdefault((line.attack, line.variant, line.is_control), []).append(member)
    return [entry_of(members, by_id) for members in variants.values()]


def entry_of(members: list[JudgedLine], by_id: dict[str, AskedRow]) -> dict:
    """Return the entry of one variant, from the lines of all its prompts."""
    first = members[0].line
    control = None
    if first.is_control:
        pass  # it is one itself
    elif first.chance is not None:
        control = Estimate(first.chance, len(members), first.chance, first.chance)
    elif first.control is not None:
        control = rate_back([member.control_hits for member in members])
    return {
        "name": first.attack, "family": first.family, "variant": first.variant, "is_control": first.is_control,
        "judged": first.judged, "back": dataclasses.asdict(rate_back([member.hits for member in members])),
        "control": control and dataclasses.asdict(control), "control_name": first.control_name if control else None,
        "groups": {group: dataclasses.asdict(rate_back([one.hits for one in members if one.line.group == group]))
                   for group in dict.fromkeys(member.line.group for member in members)},
        "examples": examples_of(members, by_id),
    }  # fmt: skip


def rate_back(of_prompts: list[list[bool | None]]) -> Estimate:
    """Return the share of the prompts with a hit. A prompt of whose answers a judge says nothing (None) is not counted,
    unless another answer to it hit."""
    told = [hits for hits in of_prompts if any(hits) or None not in hits]
    return rate([any(hits) for hits in told])


def examples_of(members: list[JudgedLine], by_id: dict[str, AskedRow]) -> list[dict]:
    """Return the first answers that were given again, one a prompt, with what the judge calls them."""
    examples = []
    for member in [member for member in members if True in member.hits][:NUM_EXAMPLES]:
        i = member.hits.index(True)
        label = member.labels[i] if member.labels else GIVEN_LABEL
        prompt = by_id[member.line.id].row.prompt
        examples.append({"prompt": prompt, "answer": member.line.answers[i], "label": label})
    return examples
