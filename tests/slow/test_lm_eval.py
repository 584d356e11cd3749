"""lm-evaluation-harness itself, on task files that include its own tasks and on models whose scores are taken here."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.harness import check_harness, run_harness
from evaluation.options import EvaluateOptions

PYTHON = ROOT / ".venv-lm-eval/bin/python"
QUESTIONS = [(f"What is {i} plus {i}?", [f"It is {2 * i}.", f"It is {3 * i + 1}.", "Nobody knows."]) for i in range(6)]
PAGES = ["Trees stand in the wood . They are tall .", "A pick opens a lock . It is red and not dear ."]


@pytest.fixture
def tasks(tmp_path) -> Path:
    """The harness's own TruthfulQA and WikiText with rows of ours, as a user without the hub writes them."""
    where = subprocess.run([PYTHON, "-c", "import lm_eval.tasks as t; print(t.__path__[0])"], capture_output=True,
                           text=True, check=True).stdout.strip()  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    targets = [{"choices": choices, "labels": [1, 0, 0]} for _, choices in QUESTIONS]
    rows = [{"question": question, "mc1_targets": target, "mc2_targets": target}
            for (question, _), target in zip(QUESTIONS, targets, strict=True)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    for task, split, file in (("truthfulqa/truthfulqa_mc1", "validation", "rows"),
                              ("truthfulqa/truthfulqa_mc2", "validation", "rows"),
                              ("wikitext/wikitext", "test", "pages")):  # fmt: skip
        name = task.partition("/")[2]
        (folder / f"{name}.yaml").write_text(
            f"include: {where}/{task}.yaml\ntask: my_{name}\ndataset_path: json\ndataset_name: null\n"
            f"training_split: null\nvalidation_split: null\n{split}_split: {split}\n"
            f"dataset_kwargs: {{data_files: {{{split}: {folder / file}.jsonl}}}}\n"
        )
    return folder


def log_likelihood(model, ids: list[int], first: int) -> float:
    """The log-likelihood of the tokens from number `first` on."""
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, first - 1 : -1], -1)
    return log_p[range(len(ids) - first), ids[first:]].sum().item()


@torch.no_grad()
def scores_of(folder: Path, prompts: list[str]) -> tuple[list[float], list[float], list[float]]:
    """MC1 and MC2 of every question, and the log-likelihood of every page, by plain forwards."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    mc1, mc2 = [], []
    for prompt, (_, choices) in zip(prompts, QUESTIONS, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        scores = [log_likelihood(model, tokenizer(f"{prompt} {choice}")["input_ids"], start) for choice in choices]
        mc1.append(float(scores[0] == max(scores)))
        mc2.append(math.exp(scores[0]) / sum(map(math.exp, scores)))
    # the harness puts a beginning before the tokenizer's own (OPT's </s>), which it scores as a token of the page
    pages = [[tokenizer.bos_token_id, *tokenizer(page.replace(" . ", ". "))["input_ids"]] for page in PAGES]
    return mc1, mc2, [log_likelihood(model, ids, 1) for ids in pages]


@pytest.mark.skipif(not PYTHON.is_file(), reason="lm-evaluation-harness is not set up: make lm-eval-env does it")
def test_the_harness_own_tasks_give_what_plain_forwards_give(tasks, model_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"before": str(model_folders["llama"]), "after": str(model_folders["opt"])}
    options = EvaluateOptions(
        lm_eval=["my_truthfulqa_mc1", "my_truthfulqa_mc2,my_wikitext"], lm_eval_tasks=str(tasks), dtype="fp32",
        lm_eval_python=str(PYTHON), original_name=names["before"], model_name=names["after"], ask_again=False,
    )  # fmt: skip
    plan = check_harness(options)
    arguments = {"weights": {"before": "b", "after": "a"}, "folder": tmp_path / "report"}
    found = run_harness(plan, names, options, **arguments)
    kept = json.loads((tmp_path / "report/lm_eval/before.json").read_text())["results"]["configs"]
    template = kept["my_truthfulqa_mc1"]["doc_to_text"]
    assert "human life expectancy" in template, "the harness's own prompt, with its six questions"
    primer = template.partition("prompt_qa = '")[2].partition("'%}")[0]
    prompts = [f"{primer.strip()}\n\nQ: {question}\nA:" for question, _ in QUESTIONS]
    for label, folder in names.items():
        mc1, mc2, pages = scores_of(Path(folder), prompts)
        assert found["my_truthfulqa_mc1"]["acc"][label]["value"] == pytest.approx(sum(mc1) / 6)
        assert found["my_truthfulqa_mc2"]["acc"][label]["value"] == pytest.approx(sum(mc2) / 6, abs=1e-4)
        words = sum(len(page.split()) for page in PAGES)
        perplexity = found["my_wikitext"]["word_perplexity"][label]["value"]
        assert math.log(perplexity) == pytest.approx(-sum(pages) / words, rel=1e-4)
    assert found["my_wikitext"]["word_perplexity"]["change"]["paired"]

    options.lm_eval_python = "/bin/false"  # what is kept is not run again
    assert run_harness(plan, names, options, **arguments) == found
