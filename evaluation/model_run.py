"""Stage 1: ask every model everything. Its answers to the prompts, its scores of given texts and of the references."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import chain, compress
from pathlib import Path

from tqdm.auto import tqdm

from engine.generation import generate
from engine.loading import release_memory
from engine.processes import join_processes
from engine.tree import AnswerLogitsModel, wrap_model
from engine.weights_hash import weights_hash
from evaluation.groups import Group
from evaluation.inputs import EvaluationInputs
from evaluation.likelihood import choices, perplexity
from evaluation.metrics.memorisation import perplexity_ratio
from evaluation.metrics.statistics import mean
from evaluation.paper import OwnScores, score_own
from evaluation.scoring import score_holdout, score_rows
from evaluation.stages import Keys, Known, Record, key_of, may_reuse, read_known, read_own, write_own, write_record
from prompts.formatter import PromptFormatter
from prompts.tokenizer import content_of
from prompts.windows import fit_windows
from sources.rows import Row

# what answers and scores depend on, beside weights, prompts and references
ANSWER_OPTIONS = ("max_new_tokens", "max_prompt_tokens", "dtype", "text_window", "mc_template", "deterministic")
PROBE_PROMPTS = 3  # real prompts on which packed and padded rows are compared


class Models:
    """The models of an evaluation, each loaded when it is first asked for, and kept until it is let go.

    load: a model's name -> the model on its device.
    """

    def __init__(self, inputs: EvaluationInputs, options, load: Callable):
        self.inputs, self.options, self.load = inputs, options, load
        self.names = inputs.models
        self._loaded: dict[str, AnswerLogitsModel] = {}

    def get(self, label: str) -> AnswerLogitsModel:
        """Return the model that is called "before", "after" or "retrained". Raises UsageError if it does not load."""
        if label not in self._loaded:
            model, formatter = self.load(self.names[label]), self.inputs.formatters[label]
            formatter.fit(model.config, self.options.max_new_tokens)
            if any(group.is_text for group in self.inputs.groups):
                fit_windows(formatter, model.config, self.options.text_window)
            self._loaded[label], _ = wrap_model(model, formatter, self._probe_prompts())
        return self._loaded[label]

    def drop(self, label: str) -> None:
        """Let a model go, and its memory."""
        if self._loaded.pop(label, None):
            release_memory(join_processes().device)

    def drop_all(self) -> None:
        """Let all models go, and their memory: a process beside this one may load its own."""
        self._loaded.clear()
        release_memory(join_processes().device)

    def _probe_prompts(self) -> list[str]:
        """Return a few prompts that show whether this kind of model takes packed rows."""
        return [row.prompt for group in self.inputs.groups for row in group.rows][:PROBE_PROMPTS]


def ask_models(
    inputs: EvaluationInputs, models: Models, folder: Path, options, before_asking: Callable
) -> dict[str, Record]:
    """Return what every model said, by label. What lies in `folder` from an earlier evaluation is taken from there.

    The original is asked last and stays loaded; with attacks the others stay too. before_asking: called before a model
    is loaded, to try the judges; not called if no model needs to be asked.
    """
    records = {}
    for label, name in models.names.items():
        started, weights = time.time(), weights_hash(name)
        keys = answer_keys(label, weights, inputs, options)  # before the model's own limits shorten the prompts
        known = read_known(folder, label, keys) if may_reuse(options) and weights else Known()
        is_new = known.misses(keys)
        if is_new:
            before_asking()
            models.get(label)
            if not weights:  # a hub's model has weights to name once it is here
                weights = weights_hash(name)
                keys = dataclasses.replace(keys, model=model_key(label, weights, inputs, options))
        record = ask_model(label, models, weights, keys, known, inputs, options)
        record.seconds = round(time.time() - started, 1) if is_new else known.seconds
        if known.key != keys.whole and join_processes().is_main_process:
            write_record(folder, record)
        if is_new and label != "before" and not inputs.attacks:
            models.drop(label)
        records[label] = record
    return records


def model_key(label: str, weights: str | None, inputs: EvaluationInputs, options) -> str:
    """Return the key of a model and of how all is asked of it, whatever the rows."""
    formatter, device = inputs.formatters[label], join_processes().device.type
    settings = {name: getattr(options, name) for name in ANSWER_OPTIONS}
    has_text = any(group.is_text for group in inputs.groups)  # passages leave more room for all answers
    template = formatter.prompt_of(Row("Who are you?"))  # and its system message, as tokens
    return key_of("answers", weights, settings, formatter.stop_ids(), formatter.style, template,
                  content_of(formatter.tokenizer), has_text, device)  # fmt: skip


def answer_keys(label: str, weights: str | None, inputs: EvaluationInputs, options) -> Keys:
    """Return the keys of a model's answers: weights, prompts as tokens, references, and how both are taken."""
    formatter = inputs.formatters[label]
    holdout = [row for rows in inputs.holdout.values() for row in rows]
    return Keys(
        model=model_key(label, weights, inputs, options),
        rows=[[key_of(group.style, formatter.prompt_of(row, group.style, ask=True), _scored(as_scored))
               for row, as_scored in zip(group.rows, of_scored.rows, strict=True)]
              for group, of_scored in zip(inputs.groups, inputs.scored, strict=True)],
        holdout=[key_of(formatter.prompt_of(row, formatter.style), _scored(row)) for row in holdout],
        texts=key_of(inputs.choice_rows, inputs.text),
    )  # fmt: skip


def _scored(row: Row) -> list:
    """Return what a model's scores of a row are of, whatever file it came from."""
    tokens = getattr(row, "token_ids", ())  # of a passage: its text alone may be cut otherwise at its ends
    return [row.prompt, row.response, row.complete, row.is_text, row.paraphrased, row.perturbed, tokens]


def ask_model(
    label: str, models: Models, weights: str | None, keys: Keys, known: Known, inputs: EvaluationInputs, options
) -> Record:  # fmt: skip
    """Answer all prompts and score all texts with one model, but for what is `known`; without any other the model is
    not loaded."""
    formatter = inputs.formatters[label]
    asked = [[key not in known.rows for key in of_group] for of_group in keys.rows]
    groups, scored = (_only(of, asked) for of in (inputs.groups, inputs.scored))
    rows, texts = known.rows.copy(), known.text_scores
    if any(map(any, asked)):
        answer_model = models.get(label)
        answers = answer_groups(answer_model.generator, formatter, groups, options, label)
        new = zip(chain(*answers), chain(*score_rows(answer_model, formatter, scored)), strict=True)
        rows |= zip((key for key in chain(*keys.rows) if key not in known.rows), new, strict=True)
    if texts is None:
        texts = score_provided_text(models.get(label), formatter, inputs, options)
    holdout = known.holdout
    if not set(keys.holdout) <= holdout.keys():
        holdout = dict(zip(keys.holdout, score_holdout(models.get(label), formatter, inputs.holdout), strict=True))
    return Record(
        label=label, name=models.names[label], weights=weights, keys=keys, text_scores=texts,
        answers=[[rows[key][0] for key in of_group] for of_group in keys.rows],
        scores=[[rows[key][1] for key in of_group] for of_group in keys.rows],
        holdout=[holdout[key] for key in keys.holdout],
        is_kept=not all(map(all, asked)),
    )  # fmt: skip


def _only(groups: list[Group], wanted: list[list[bool]]) -> list[Group]:
    """Return the groups with the rows that are wanted; wanted: a list a group, an entry a row."""
    return [dataclasses.replace(group, rows=list(compress(group.rows, of_group)))
            for group, of_group in zip(groups, wanted, strict=True)]  # fmt: skip


def answer_groups(model, formatter: PromptFormatter, groups: list[Group], options, label: str) -> list[list[str]]:
    """Return one model's greedy answers, a list per group. All prompts are answered in one pass, sorted by length."""
    prompts = [formatter.prompt_of(row, group.style, ask=True) for group in groups for row in group.rows]
    completions = iter(
        generate(
            model, formatter, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch,
            progress=lambda chunks: tqdm(chunks, desc=f"answers {label}", leave=False, disable=None),
        )
    )  # fmt: skip
    formatter.warn_of_unfinished_thoughts(f"model {label} unlearning", "--max_new_tokens")
    return [[next(completions)[0] for _ in group.rows] for group in groups]


def read_by_original(
    records: dict[str, Record], inputs: EvaluationInputs, models: Models, folder: Path, options
) -> dict[str, list[list[OwnScores | None]]]:
    """Return what the original says of every model's answers, by label."""
    key = key_of("own", records["before"].keys.whole, [record.answers for record in records.values()])
    own = read_own(folder, key) if may_reuse(options) and records["before"].weights else None
    if own is None:
        answers = {label: record.answers for label, record in records.items()}
        own = score_own(models.get("before"), inputs.formatters["before"], inputs.groups, answers)
        if join_processes().is_main_process:
            write_own(folder, own, key)
    return own


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


def compare_text_scores(scores: dict[str, dict]) -> dict:
    """Return the models' figures side by side, with paired differences where there are rows to pair.

    scores: "before", "after" and perhaps "retrained" -> what `score_provided_text` gave."""
    before, after, compared = scores["before"], scores["after"], {}
    if "perplexity" in before:
        original, unlearned = before["perplexity"], after["perplexity"]
        compared["perplexity"] = {
            **{label: of_model["perplexity"]["word_perplexity"] for label, of_model in scores.items()},
            "ratio": perplexity_ratio(unlearned["nll"], original["nll"], original["tokens"]),
            "tokens": sum(original["tokens"]),
        }
    for measure in ("mc1", "mc2"):
        if measure in before:
            change = [y - x for x, y in zip(before[measure], after[measure], strict=True)]
            compared[measure] = {**{label: mean(of_model[measure]) for label, of_model in scores.items()},
                                 "change": mean(change)}  # fmt: skip
    return compared
