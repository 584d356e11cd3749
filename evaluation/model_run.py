"""Ask one model everything: its answers to the groups' prompts, its scores of given texts and of the forget answers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from tqdm.auto import tqdm

from engine.generation import generate
from engine.tree import AnswerLogitsModel, wrap_model
from evaluation.inputs import EvaluationInputs
from evaluation.likelihood import choices, perplexity
from evaluation.metrics.memorisation import perplexity_ratio
from evaluation.metrics.statistics import mean
from evaluation.scoring import ForgetScores, score_forget_answers
from prompts.formatter import PromptFormatter
from prompts.windows import fit_windows
from utils import fingerprint

PROBE_PROMPTS = 3  # real prompts on which packed and padded rows are compared


@dataclasses.dataclass(kw_only=True)
class ModelRun:
    """What one model said. A model retrained without the forget rows is scored only, and answers nothing."""

    name: str
    formatter: PromptFormatter
    forget_scores: ForgetScores
    seconds: float
    fingerprint: str | None = None
    answers: list[list[str]] | None = None  # one list per group
    text_scores: dict | None = None
    answer_model: AnswerLogitsModel | None = None  # kept loaded for attacks, and to read the answers of both models


def run_models(inputs: EvaluationInputs, options, load: Callable) -> dict[str, ModelRun]:
    """Return the runs of "retrained" (if there is one), "after" and "before", in this order.

    One model is loaded at a time. The original is asked last and stays loaded; for attacks the unlearned one stays too.
    """
    runs = {}
    if options.retrained_name:
        runs["retrained"] = score_model(options.retrained_name, inputs, options, load)
    runs["after"] = ask_model("after", options.model_name, inputs, options, load, keep=bool(inputs.attacks))
    runs["before"] = ask_model("before", options.original_name, inputs, options, load, keep=True)
    return runs


def score_model(name: str, inputs: EvaluationInputs, options, load: Callable) -> ModelRun:
    """Score the forget answers with one model. `load`: a model's name -> the model on its device."""
    start, formatter = time.time(), inputs.formatters["before"]
    model = load(name)
    fit_texts(formatter, model, inputs, options)
    answer_model, _ = wrap_model(model, formatter, probe_prompts(inputs))
    scores = score_forget_answers(answer_model, formatter, inputs.groups)
    return ModelRun(name=name, formatter=formatter, forget_scores=scores, seconds=round(time.time() - start, 1))


def ask_model(label: str, name: str, inputs: EvaluationInputs, options, load: Callable, *, keep: bool) -> ModelRun:
    """Answer all prompts and score all texts with one model. `keep`: leave it loaded in the run."""
    start, formatter, model = time.time(), inputs.formatters[label], load(name)
    weights = fingerprint(model)
    formatter.fit(model.config, options.max_new_tokens)
    fit_texts(formatter, model, inputs, options)
    answers = answer_groups(model, formatter, inputs, options, label)
    answer_model, _ = wrap_model(model, formatter, probe_prompts(inputs))
    return ModelRun(
        name=name, formatter=formatter, fingerprint=weights, answers=answers,
        text_scores=score_provided_text(answer_model, formatter, inputs, options),
        forget_scores=score_forget_answers(answer_model, formatter, inputs.groups),
        answer_model=answer_model if keep else None, seconds=round(time.time() - start, 1),
    )  # fmt: skip


def fit_texts(formatter: PromptFormatter, model, inputs: EvaluationInputs, options) -> None:
    """Tell the formatter how long passages are, if there are any. Raises UsageError if they do not fit the model."""
    if any(group.is_text for group in inputs.groups):
        fit_windows(formatter, model.config, options.text_window)


def probe_prompts(inputs: EvaluationInputs) -> list[str]:
    """Return a few prompts that show whether this kind of model takes packed rows."""
    return [row.prompt for group in inputs.groups for row in group.rows][:PROBE_PROMPTS]


def answer_groups(model, formatter: PromptFormatter, inputs: EvaluationInputs, options, label: str) -> list[list[str]]:
    """Return one model's greedy answers, a list per group. All prompts are answered in one pass, sorted by length."""
    prompts = [formatter.prompt_of(row, group.style, ask=True) for group in inputs.groups for row in group.rows]
    completions = iter(
        generate(
            model, formatter, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch,
            progress=lambda chunks: tqdm(chunks, desc=f"answers {label}", leave=False, disable=None),
        )
    )  # fmt: skip
    formatter.warn_of_unfinished_thoughts(f"model {label} unlearning", "--max_new_tokens")
    return [[next(completions)[0] for _ in group.rows] for group in inputs.groups]


def score_provided_text(
    answer_model: AnswerLogitsModel, formatter: PromptFormatter, inputs: EvaluationInputs, options
) -> dict:
    """Return one model's perplexity of --perplexity_text, and MC1 and MC2 of every row of --mc_data."""
    scores = {}
    if inputs.text:
        scores["perplexity"] = perplexity(answer_model.model, formatter.tokenizer, inputs.text)
    if inputs.choice_rows:
        scores |= choices(answer_model, formatter, inputs.choice_rows, options.mc_template,
                          lambda rows: tqdm(rows, desc="choices", leave=False, disable=None))  # fmt: skip
    return scores


def compare_text_scores(before: dict, after: dict) -> dict:
    """Return the two models' figures side by side, with paired differences where there are rows to pair."""
    compared = {}
    if "perplexity" in before:
        original, unlearned = before["perplexity"], after["perplexity"]
        compared["perplexity"] = {
            "before": original["word_perplexity"],
            "after": unlearned["word_perplexity"],
            "ratio": perplexity_ratio(unlearned["nll"], original["nll"], original["tokens"]),
            "tokens": sum(original["tokens"]),
        }
    for measure in ("mc1", "mc2"):
        if measure in before:
            change = [y - x for x, y in zip(before[measure], after[measure], strict=True)]
            compared[measure] = {"before": mean(before[measure]), "after": mean(after[measure]),
                                 "change": mean(change)}  # fmt: skip
    return compared
