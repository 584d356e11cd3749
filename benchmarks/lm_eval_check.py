"""Compare our MC1, MC2 and word perplexity with lm-evaluation-harness's, on local files and offline.

    make lm-eval MC_DATA=truthfulqa_mc_task.json TEXT=wikitext2_test.txt

Both sides read a task file of our own, written below: our prompt, our scoring functions, the text as one document. So
this compares the arithmetic of two programs, and its figures are not those of the harness's tasks truthfulqa_mc1,
truthfulqa_mc2 and wikitext, whose prompts and documents are others. evaluate_unlearning.py --lm_eval runs these.
Prints both figures and their relative difference; exit code 1 if a difference is above 0.5 %.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from command_line import OneLineParser
from engine.tree import wrap_model
from evaluation.likelihood import choices, labels_of, perplexity, read_choices
from options import POSITIVE, option
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from utils import load_model, pick_dtype, run_script

MAX_DIFFERENCE = 0.005  # relative
WINDOW = 1024  # tokens

CHOICE_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "### Question: {{{{question}}}}\\n ### Answer:"
doc_to_choice: "{{{{{name}_targets.choices}}}}"
doc_to_target: 0
process_results: !function results.{name}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
TEXT_TASK = """\
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
process_results: !function results.text
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1}}
"""
RESULTS = """\
import math

def mc1(doc, results):
    scores = [score for score, _ in results]
    labels = doc["mc1_targets"]["labels"]
    return {"acc": float(labels[scores.index(max(scores))] == 1)}

def mc2(doc, results):
    scores = [score for score, _ in results]
    top = max(scores)
    chance = [math.exp(score - top) for score in scores]
    return {"acc": sum(c for c, label in zip(chance, doc["mc2_targets"]["labels"]) if label) / sum(chance)}

def text(doc, results):
    return {"word_perplexity": (results[0], len(doc["page"].split()))}
"""


@dataclasses.dataclass
class CheckOptions:
    """Options of the comparison."""

    models: list[str] = option(["models/smollm2-135m-instruct", "models/demo"], "model folders or hub names")
    mc_data: str = option("data/mc_task.json", "TruthfulQA's mc_task.json")
    text: str = option("data/wikitext2_test.txt", "a text file, such as WikiText-2's test part")
    rows: POSITIVE = option(100, "number of questions, from the first on")
    characters: POSITIVE = option(150_000, "number of characters of the text, from the first on")
    dtype: Literal["auto", "fp32", "bf16"] = option("fp32", "precision of both sides")


def theirs(name: str, dtype: torch.dtype, rows: list[dict], text: str, starts_with_special: bool) -> dict[str, float]:
    """Return lm-evaluation-harness's figures {measure: value} of one model."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "results.py").write_text(RESULTS)
        records = [
            {"question": row["question"]}
            | {field: {"choices": list(labels_of(row[field])), "labels": list(labels_of(row[field]).values())}
               for field in ("mc1_targets", "mc2_targets")}
            for row in rows
        ]  # fmt: skip
        (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in records))
        (folder / "text.json").write_text(json.dumps({"page": text}) + "\n")
        for task in ("mc1", "mc2"):
            (folder / f"{task}.yaml").write_text(CHOICE_TASK.format(name=task, file=folder / "rows.json"))
        (folder / "text.yaml").write_text(TEXT_TASK.format(file=folder / "text.json"))
        model = HFLM(pretrained=name, dtype=str(dtype)[6:], batch_size=16, max_length=WINDOW, device="cpu",
                     add_bos_token=starts_with_special)  # fmt: skip
        tasks = TaskManager(include_path=str(folder), include_defaults=False)
        output = lm_eval.simple_evaluate(model=model, tasks=["mc1", "mc2", "text"], bootstrap_iters=0,
                                         task_manager=tasks)  # fmt: skip
    results = output["results"]
    return {"mc1": results["mc1"]["acc,none"], "mc2": results["mc2"]["acc,none"],
            "word_perplexity": results["text"]["word_perplexity,none"]}  # fmt: skip


def ours(model, formatter: PromptFormatter, rows: list[dict], text: str) -> dict[str, float]:
    """Return our figures {measure: value} of one model."""
    answer_model, _ = wrap_model(model, formatter, [row["question"] for row in rows[:3]])
    scores = choices(answer_model, formatter, rows, "qa")
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return means | {"word_perplexity": perplexity(model, formatter.tokenizer, text, window=WINDOW)["word_perplexity"]}


def main() -> None:
    """Compare both on each model and print a table."""
    options = CheckOptions(**vars(OneLineParser(CheckOptions).parse_args()))
    rows = read_choices(options.mc_data, "--mc_data")[: options.rows]
    text = Path(options.text).read_text(encoding="utf-8")[: options.characters]
    tokenizers = {name: load_tokenizer(name) for name in options.models}  # fails early for a missing folder
    dtype, worst = pick_dtype(options.dtype, torch.device("cpu")), 0.0
    lines = [f"{'model':32s} {'measure':16s} {'ours':>10s} {'lm-eval':>10s} {'apart':>8s}"]
    for name, tokenizer in tokenizers.items():
        formatter = PromptFormatter(tokenizer, "qa", 512, 128)
        mine = ours(load_model(name, dtype=dtype).eval(), formatter, rows, text)
        other = theirs(name, dtype, rows, text, bool(formatter.start))
        for measure, value in mine.items():
            apart = abs(value - other[measure]) / max(abs(other[measure]), 1e-9)
            worst = max(worst, apart)
            lines.append(f"{name:32s} {measure:16s} {value:10.4f} {other[measure]:10.4f} {100 * apart:7.3f}%")
    print("\n".join(lines))
    print(f"{len(rows)} questions, {len(text):,} characters; at most {100 * worst:.3f} % apart, both on a task file of "
          "our own (the harness's own tasks: evaluate_unlearning.py --lm_eval)")  # fmt: skip
    sys.exit(worst > MAX_DIFFERENCE)


if __name__ == "__main__":
    run_script(main)
