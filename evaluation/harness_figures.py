"""The figures of lm-evaluation-harness: read from the files that it writes, and compared between models.

Nothing here starts the harness. What it writes is described by version 0.4.13: a file of results, in which a metric is
"acc,none" (name and filter) beside "acc_stderr,none", and a file of samples a task, with every document's own values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from evaluation.metrics.statistics import wilson
from utils import read_json_lines

DRAWS = 2000  # of the bootstrap
Z = 1.959964  # standard errors on either side of a 95 % interval

# How a metric follows from r = sum of the documents' tops / sum of their bottoms. A document has one number (its bottom
# is 1), or a log-likelihood and the number of its words or bytes.
FORMS = (
    lambda r: r,  # accuracy, exact match: the mean
    lambda r: np.exp(-r),  # word_perplexity, byte_perplexity
    lambda r: -r / math.log(2),  # bits_per_byte
)


@dataclasses.dataclass(frozen=True)
class HarnessResult:
    """What the harness said of one model.

    results: the content of its file of results. samples: task -> "metric,filter" -> document (its number and hash) ->
    [top, bottom]; a value that is no number, as those of BLEU are not, is left out.
    """

    results: dict
    samples: dict[str, dict[str, dict[str, list[float]]]]


def read_output(folder: Path) -> HarnessResult:
    """Read what the harness wrote under --output_path. Raises OSError or ValueError if a file is missing or broken."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: the harness wrote no results")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    stamp = files[-1].stem.removeprefix("results_")
    samples = {file.stem.removeprefix("samples_").removesuffix(f"_{stamp}"): values_of(read_json_lines(file))
               for file in sorted(files[-1].parent.glob("samples_*.jsonl"))}  # fmt: skip
    return HarnessResult(results, samples)


def values_of(lines: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return "metric,filter" -> document -> [top, bottom] of a file of samples."""
    values: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        document = f"{line['doc_id']}:{line['doc_hash'][:12]}"
        for metric in line["metrics"]:
            value = line[metric]
            pair = value if isinstance(value, list) and len(value) == 2 else [value, 1]
            if all(isinstance(v, int | float) and math.isfinite(v) for v in pair):
                values.setdefault(f"{metric},{line['filter']}", {})[document] = [float(v) for v in pair]
    return values


def compare_models(models: dict[str, HarnessResult]) -> dict:
    """Return {task: {metric: {before, after, retrained?, change, ratio?, higher_is_better}}}; groups are tasks too.

    A metric of a filter other than "none" is named "exact_match,strict-match". `before`, `after` and `retrained` hold
    value, stderr (the harness's own, None where it has none), n, low and high. The 95 % interval is Wilson's for a
    share, else value -+ 1.96 stderr, else the bootstrap's. `change` is after - before; paired: both models' values of
    the same documents were drawn together (2000 times), which gives perplexities their `ratio`, after / before, too.
    Without values that can be paired, the change's stderr is the root of the sum of both squares.
    """
    report: dict = {}
    for task, found in models["before"].results["results"].items():
        for key in [key for key in found if "," in key and not key.partition(",")[0].endswith("_stderr")]:
            if all(key in model.results["results"].get(task, {}) for model in models.values()):
                metric, _, filter_name = key.partition(",")
                name = metric if filter_name == "none" else key
                better = models["before"].results.get("higher_is_better", {}).get(task, {}).get(metric)
                report.setdefault(task, {})[name] = compare_metric(models, task, key) | {"higher_is_better": better}
    return report


def compare_metric(models: dict[str, HarnessResult], task: str, key: str) -> dict:
    """Return one metric's entry of `compare_models`, without its direction."""
    metric, _, filter_name = key.partition(",")
    found = {label: model.results["results"][task] for label, model in models.items()}
    values = {label: finite(of_model[key]) for label, of_model in found.items()}
    errors = {label: finite(of_model.get(f"{metric}_stderr,{filter_name}")) for label, of_model in found.items()}
    counts = {label: count_of(model, task) for label, model in models.items()}
    rows = paired_rows(models, task, key) or {}
    form = form_of(rows, values)
    draws = {label: bootstrap(of_model, form) for label, of_model in rows.items()} if form else {}  # (DRAWS,) each
    entry = {label: figure(value, errors[label], counts[label], rows.get(label) if form else None, draws.get(label))
             for label, value in values.items()}  # fmt: skip
    before, after, n = values["before"], values["after"], counts["after"]
    if before is None or after is None:
        return entry | {"change": figure(None, None, 0) | {"paired": False}}
    if draws:
        change = draws["after"] - draws["before"]
        entry["change"] = figure(after - before, None, n, draws=change)
        entry["change"] |= {"stderr": finite(change.std(ddof=1)), "paired": True}
        if is_share(rows["before"]) and np.array_equal(rows["before"], rows["after"]):
            bound = wilson(0, len(rows["after"]))[1]  # of the share of documents that changed: none was seen to
            entry["change"] |= {"low": -bound, "high": bound}
        if form is not FORMS[0] and before:
            entry["ratio"] = figure(after / before, None, n, draws=draws["after"] / draws["before"])
    else:
        has_errors = errors["before"] is not None and errors["after"] is not None
        error = math.hypot(errors["before"], errors["after"]) if has_errors else None
        entry["change"] = figure(after - before, error, n) | {"paired": False}
    return entry


def figure(value, stderr, n: int, rows=None, draws=None) -> dict:
    """Return {value, stderr, n, low, high}. rows: (n, 2) or None; draws: (DRAWS,) of the bootstrap, or None."""
    low = high = None
    if value is not None and n > 1:
        if rows is not None and is_share(rows):
            low, high = wilson(int(rows[:, 0].sum()), len(rows))
        elif stderr:  # a stderr of 0 bounds nothing
            low, high = value - Z * stderr, value + Z * stderr
        elif draws is not None:
            low, high = (finite(bound) for bound in np.quantile(draws, [0.025, 0.975]))
    return {"value": value, "stderr": stderr, "n": n, "low": low, "high": high}


def is_share(rows: np.ndarray) -> bool:
    """Return whether documents (n, 2) are hits and misses."""
    return bool(np.isin(rows[:, 0], (0, 1)).all() and np.all(rows[:, 1] == 1))


def paired_rows(models: dict[str, HarnessResult], task: str, key: str) -> dict[str, np.ndarray] | None:
    """Return {label: (n, 2)}, a row a document, the same documents in the same order for every model; None where some
    model has other documents, or no numbers of them, or where there is one document alone."""
    named: dict[str, dict] = {}
    for label, model in models.items():
        named[label] = {(leaf, document): pair for leaf in leaves_of(model, task)
                        for document, pair in model.samples.get(leaf, {}).get(key, {}).items()}  # fmt: skip
    documents = list(named["before"])
    if len(documents) < 2 or any(of_model.keys() != named["before"].keys() for of_model in named.values()):
        return None
    return {label: np.array([of_model[d] for d in documents]) for label, of_model in named.items()}


def form_of(rows: dict[str, np.ndarray], values: dict[str, float | None]):
    """Return the form in FORMS by which the documents give the harness's own value of every model, or None.

    The harness does not write how it aggregates. A group that weighs its tasks alike, not by size, has no form here.
    """
    for form in FORMS if rows else ():
        if all(values[label] is not None and np.isclose(values[label], total(form, of_model), rtol=1e-6, atol=1e-9)
               for label, of_model in rows.items()):  # fmt: skip
            return form
    return None


def total(form, rows: np.ndarray) -> float:
    """Return a metric of documents (n, 2)."""
    top, bottom = rows.sum(axis=0)
    with np.errstate(all="ignore"):
        return float(form(top / bottom))


def bootstrap(rows: np.ndarray, form) -> np.ndarray:
    """Return (DRAWS,): the metric of documents (n, 2) drawn with replacement; the same documents in every call."""
    generator, n = np.random.default_rng(0), len(rows)
    sums = np.stack([rows[generator.integers(n, size=n)].sum(axis=0) for _ in range(DRAWS)])  # (DRAWS, 2)
    with np.errstate(all="ignore"):
        return form(sums[:, 0] / sums[:, 1])


def leaves_of(model: HarnessResult, task: str) -> list[str]:
    """Return the tasks with documents under a group, or the task itself."""
    below = model.results.get("group_subtasks", {}).get(task) or []
    return [leaf for name in below for leaf in leaves_of(model, name)] if below else [task]


def count_of(model: HarnessResult, task: str) -> int:
    """Return how many documents a task or group asked."""
    counts = model.results.get("n-samples", {})
    return sum(counts.get(leaf, {}).get("effective", 0) for leaf in leaves_of(model, task))


def finite(value) -> float | None:
    """Return a number as JSON can hold it; None for "N/A", infinity and whatever is no number."""
    is_number = isinstance(value, int | float | np.floating) and math.isfinite(value)
    return float(value) if is_number else None
