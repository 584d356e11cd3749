"""Run the requested attacks and judge what they bring back.

An attack answers the same forget prompts again under its own conditions. What counts is how many of the forgotten
prompts (on topic before unlearning, not after) are on topic again. An attack sees the unlearned model, never its
answers; those that need harmful text use the original model's answers.
"""

from __future__ import annotations

import dataclasses

from tqdm.auto import tqdm

from data_module import sample
from engine.generation import generate
from engine.trained_on import TrainedOn
from evaluation.attacks import ATTACKS
from evaluation.attacks.base import CONTROL, Attack, AttackConfig, AttackData, AttackResult, AttackTarget, Probe
from evaluation.groups import trained_rows, unseen_groups
from evaluation.inputs import EvaluationInputs
from evaluation.metrics.statistics import rate
from evaluation.metrics.texts import on_topic
from evaluation.model_run import ModelRun
from prompts.formatter import PromptFormatter
from sources.rows import Row
from utils import UsageError, log

QUICK_PROMPTS = 6
QUICK = {"num_samples": 4, "relearn_steps": 8, "num_relearn_rows": 4}
EXAMPLES_DRAWN, EXAMPLES_USED = 30, 20  # rows of each kind: some get no answer that is on topic


def run_attacks(
    inputs: EvaluationInputs, runs: dict[str, ModelRun], lines: list[dict], embed, options
) -> tuple[list[dict], dict[str, dict | None]]:
    """Return report.json's entries, one per attack and variant, and what the probes found by `report_key`.

    lines: those of answers.jsonl. A probe's finding is None if it was not asked for, if nothing was forgotten, or if it
    cannot read this kind of model.
    """
    findings = {probe.report_key: None for probe in ATTACKS.values() if isinstance(probe, Probe)}
    count = QUICK_PROMPTS if options.quick else options.attack_prompts
    if texts := dict.fromkeys(line["group"] for line in lines if line["side"] == "forget" and line.get("text")):
        log.warning("attacks: not on %s: an attack asks prompts, and this is text", ", ".join(texts))
    rows = forgotten_rows(lines, inputs.formatters["after"].style, count, options.seed)
    if not rows:
        return [], findings
    attacks = {name: ATTACKS[name] for name in inputs.attacks if isinstance(ATTACKS[name], Attack)}
    probes = [ATTACKS[name] for name in inputs.attacks if isinstance(ATTACKS[name], Probe)]
    answer_examples = any(attack.needs_examples for attack in attacks.values())
    target = make_target(rows, inputs, runs, options, embed if answer_examples else None)
    prompt_vectors = embed([row.prompt for row in rows])  # (n, d)
    entries = []
    for name, attack in tqdm(attacks.items(), desc="attacks", leave=False, disable=None):
        try:
            results = attack.run(target)
        except UsageError as error:  # such as a model that takes no adapters: the other attacks still run
            log.warning("attack %s: not done: %s", name, error)
            continue
        entries += [judge_result(name, result, prompt_vectors, embed) for result in results]
    for probe in probes:
        both = {label: probe.measure(runs[label].answer_model.model, inputs.formatters[label], rows)
                for label in ("before", "after")}  # fmt: skip
        findings[probe.report_key] = both if all(both.values()) else None
    return entries, findings


def make_target(rows: list[Row], inputs: EvaluationInputs, runs: dict[str, ModelRun], options, embed) -> AttackTarget:
    """Return the unlearned model with the attacked rows; with `embed`, the example rows get answers."""
    before, after = runs["before"].answer_model, runs["after"].answer_model
    size = QUICK if options.quick else {}
    return AttackTarget(
        model=after.model, original=before.model, formatter=inputs.formatters["after"], packed=after.packed,
        data=collect_data(rows, inputs.splits, before.model, inputs.formatters["before"], options, embed),
        config=AttackConfig(max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch,
                            seed=options.seed, relearn_lr=options.relearn_lr, **size),
    )  # fmt: skip


def judge_result(name: str, result: AttackResult, prompt_vectors, embed) -> dict:
    """Return report.json's entry of one variant: a prompt is recovered ("back") if any of its answers is on topic.

    prompt_vectors: (n, d), unit length."""
    vectors = embed([text for texts in result.answers for text in texts])  # (n * answers per prompt, d)
    cosines = iter((vectors * prompt_vectors.repeat_interleave(len(result.answers[0]), 0)).sum(-1).tolist())
    recovered = [any([on_topic(next(cosines), text) for text in texts]) for texts in result.answers]
    examples = [texts[0] for texts, is_back in zip(result.answers, recovered, strict=True) if is_back][:3]
    return {"name": CONTROL if result.is_control else name, "variant": result.variant,
            "back": dataclasses.asdict(rate(recovered)), "examples": examples}  # fmt: skip


# ------------------------------------------------------------------------------------ the rows of an attack
def forgotten_rows(lines: list[dict], style: str, count: int, seed: int) -> list[Row]:
    """Return at most `count` forgotten prompts with the original's answers: unseen, on topic before and not after.
    Passages of text are no prompts, so no attack asks them.

    They are drawn from all groups together, since what holds for one kind of prompt need not hold for another.
    """
    judged = [line for line in lines if line["side"] == "forget" and line["counts"] and not line.get("text")]
    unseen = unseen_groups(line["group"] for line in judged)
    forgotten = [line for line in judged if line["group"] in unseen and line["style"] == style
                 and line["before"]["on_topic"] and not line["after"]["on_topic"]]  # fmt: skip
    rows = [Row(line["prompt"], line["before"]["answer"], earlier=tuple(line.get("earlier", ()))) for line in forgotten]
    return sample(rows, count, seed)


def collect_data(rows: list[Row], splits: dict, original, formatter: PromptFormatter, options, embed) -> AttackData:
    """Return the attacked rows with the example rows of each kind; with `embed`, the examples get answers.

    The examples that an adversary fine-tunes on or shows are forget rows that the run trained on, never attacked ones.
    """
    attacked, trained_on = {row.prompt for row in rows}, TrainedOn.read(options.model_name)
    forget_train = [row for parts in splits["forget"].values() for row in trained_rows(parts["train"], trained_on)
                    if row.prompt not in attacked and not row.is_text]  # fmt: skip
    retain = [row for parts in splits["keep"].values() for part in parts.values() for row in part
              if not row.is_text]  # fmt: skip
    borderline = [row for row in retain if "neighbour" in row.source]
    benign = [row for row in retain if "neighbour" not in row.source]
    kinds = [sample(kind, EXAMPLES_DRAWN, options.seed) for kind in (forget_train, benign, borderline)]
    if embed is not None:
        kinds = [add_original_answers(kind, original, formatter, options, embed)[:EXAMPLES_USED] for kind in kinds]
    return AttackData(rows=rows, forget_train_rows=kinds[0], benign_rows=kinds[1], borderline_rows=kinds[2])


def add_original_answers(rows: list[Row], model, formatter: PromptFormatter, options, embed) -> list[Row]:
    """Return the rows with the answer that came with them, else with the original model's own.

    Rows whose own answer is empty or off topic are left out: with them an adversary would teach refusal.
    """
    answered, bare = [row for row in rows if row.response], [row for row in rows if not row.response]
    if not bare:
        return answered
    texts = generate(model, formatter, [formatter.prompt_of(row, ask=True) for row in bare],
                     max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch)  # fmt: skip
    cosines = (embed([text for text, _ in texts]) * embed([row.prompt for row in bare])).sum(-1).tolist()  # (n,)
    return answered + [dataclasses.replace(row, response=text, complete=complete)
                       for row, (text, complete), cosine in zip(bare, texts, cosines, strict=True)
                       if on_topic(cosine, text)]  # fmt: skip
