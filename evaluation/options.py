"""The options of an evaluation, with their defaults and checks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Optional

from options import COUNT, POSITIVE, CommonOptions, DataOptions, number, option

AUTO = "auto"


def learning_rate(text):
    """Return a number above 0, or AUTO."""
    return AUTO if text == AUTO else number(float, 0, above=True)(text)


learning_rate.__name__ = "number above 0, or auto"
learning_rate.schema = {"anyOf": [{"const": AUTO}, number(float, 0, above=True).schema]}
OptionalCount = Optional[COUNT]  # noqa: UP045 - a check is a function, which knows no |


@dataclasses.dataclass
class EvaluateOptions(CommonOptions, DataOptions):
    """Compare a model before and after unlearning on the same prompts, and write a report."""

    EXAMPLES: ClassVar = {
        "before and after (make demo makes the models)": (
            "python evaluate_unlearning.py --model_name models/demo --original_name models/smollm2-135m-instruct"
        ),
        "try to get the answers back, with small attacks": (
            "python evaluate_unlearning.py --model_name models/demo --attacks all --quick"
        ),
        "a gate: exit code 3 if too much is still answered, or too little of what stays": (
            "python evaluate_unlearning.py --model_name models/demo --require 'forget.answered<=0.10' "
            "'keep.worst.answered.ratio>=0.90'"
        ),
    }

    model_name: str = option(
        "models/unlearned", "the model after unlearning: a folder or a hub name", "model", common=True
    )
    original_name: str = option(
        "facebook/opt-1.3b", "the model before unlearning: a folder or a hub name", "model", common=True
    )
    report_dir: str | None = option(
        None, "folder of report.json, report.html, scores.jsonl and answers/, with prompts and answers (if unset: "
        "reports/NAME, NAME being that of --model_name's folder, with -2, -3, ... if it holds another model's report)",
        "files", common=True
    )  # fmt: skip
    split: Literal["test", "dev", "train", "all"] | None = option(
        None, "prompts to evaluate: a split of the training run (test: never trained on), or all (if unset: test for a "
        "model made by unlearn_harm.py, else all)", "data"
    )  # fmt: skip
    prompts_per_group: POSITIVE = option(64, "maximum prompts per group, drawn with the seed", "looking", common=True)
    generation_batch: COUNT = option(
        0, "prompts per generation batch (0: on a GPU as many as memory takes, on a CPU 64)", "memory"
    )
    max_new_tokens: POSITIVE = option(48, "maximum tokens per answer (greedy decoding)", "looking")
    perplexity_text: str | None = option(None, "text file; both models' perplexity on it is reported", "looking")
    mc_data: str | None = option(
        None,
        "multiple-choice rows: question with mc1_targets and mc2_targets (TruthfulQA), or with choices and answer "
        "(MMLU)",
        "looking",
    )
    mc_rows: POSITIVE = option(1000, "maximum rows of --mc_data, from the first on", "looking")
    mc_template: Literal["chat", "qa", "raw"] = option("qa", "template of the multiple-choice questions", "looking")
    judge_model: list[str] = option(
        [], "models that judge the answers (folders or hub names): sequence classifiers, or language models that were "
        "trained as guards; NAME:SETTING sets --judge_reads or --guard_format for one of them", "judges"
    )  # fmt: skip
    judge_by: Literal["auto", "reference", "outcome"] = option(
        "auto", "what says whether an answer was given: its reference, or its outcome (answered, refused, empty, ...); "
        "auto: the reference for forget rows that came with one, else the outcome", "judges"
    )  # fmt: skip
    judge: str | None = option(
        None,
        "the --judge_model that decides over forget prompts in place of the built-in judge of outcomes, which "
        "decides over those to keep (if unset: over both)",
        "judges",
    )
    reward_model: str | None = option(
        None, "reward model that scores the utility of answers (if unset: the original's log-probability)", "judges"
    )
    retrained_name: str | None = option(
        None,
        "model never trained on the forget data: the third column of every figure, and the reference of privacy "
        "leakage and forget quality",
        "model",
    )
    train_log: str | None = option(None, "JSON-lines log of the training run; the report plots its curves", "looking")
    attacks: list[str] = option(
        ["none"], "attacks to run: all, none, or names among quantise prune ablate prefill suffix rephrase few_shot "
        "reverse sampling multiple_choice relearn probe", "attacks", common=True
    )  # fmt: skip
    attack_prompts: POSITIVE = option(32, "maximum forgotten prompts that an attack tries to recover", "attacks")
    relearn_lr: learning_rate = option(
        1e-4, "learning rate of the relearning attack (of adapters; whole weights take a tenth of it); auto: that at "
        "which --retrained_name learns the taught rows best", "attacks"
    )  # fmt: skip
    relearn_weights: Literal["adapters", "whole", "both"] = option(
        "adapters",
        "what that attack trains: adapters of rank 16 on every layer, whole weights, or one after the other",
        "attacks",
    )
    quick: bool = option(
        False,
        "run small attacks: 6 prompts, or 2 of each group if that is more, answers of 24 tokens, 4 rephrasings, "
        "4 samples, 4-bit weights alone, 30 % "
        "pruned alone, 8 relearning steps on forgotten rows alone",
        "attacks",
    )
    require: list[str] = option(
        [],
        "requirements such as 'forget.on_topic<=0.05'; exit code 3 if one does not hold",
        "looking",
    )
    ask_again: bool = option(
        False,
        "ask and judge everything anew, also what lies in the report's folder from earlier",
        "files",
    )
    examples: COUNT = option(3, "number of prompts whose answers are printed side by side at the end", "looking")

    about_data: list[str] = option(
        [], "questions about the forget text, with answers: what is known about a text may stay where its words go, so "
        "they are asked and shown apart, and count towards no verdict", "data"
    )  # fmt: skip

    # ---- membership
    holdout_data: list[str] = option(
        [], "rows with answers that no model of this evaluation ever saw, of the kind of --forget_data: membership and "
        "privacy leakage compare the trained forget rows with them (if unset: not measured)", "data"
    )  # fmt: skip
    holdout_text: list[str] = option(
        [], "text that no model of this evaluation ever saw, of the kind of --forget_text", "data"
    )

    # ---- judge models
    judge_reads: Literal["pair", "answer"] = option(
        "pair", "what classifiers among --judge_model read: prompt and answer as a pair, or the answer alone", "judges"
    )
    guard_format: Literal["auto", "qwen3guard", "llama_guard", "wildguard", "strong_reject"] = option(
        "auto", "how guards among --judge_model are asked and read (auto: as name and chat template tell); "
        "strong_reject: a rubric for any chat model", "judges"
    )  # fmt: skip

    # ---- the judge of outcomes
    embedder: str | None = option(
        None, "sentence-transformers model (folder or hub name) that says whether an answer is about its prompt, for "
        "languages other than English (if unset: the embedded one, which reads English alone)", "judges"
    )  # fmt: skip

    # ---- attacks
    relearn_data: list[str] = option(
        [], "rows that the relearning attack fine-tunes on, in the forms of --forget_data, a set a source (if unset: "
        "forget rows that the run trained on, and the first two sources of --normal_data)", "attacks"
    )  # fmt: skip

    # ---- lm-evaluation-harness
    lm_eval: list[str] = option(
        [], "tasks and groups of lm-evaluation-harness, run on every model: its own (truthfulqa_mc1 mmlu wikitext), "
        "which take their data from the hub, or those of --lm_eval_tasks", "harness"
    )  # fmt: skip
    lm_eval_tasks: str | None = option(
        None, "folder of your own task files (.yaml) for lm-evaluation-harness", "harness"
    )
    lm_eval_template: Literal["none", "chat", "auto"] = option(
        "none", "how its prompts are asked; none: as published, without a chat template; chat: in the model's chat "
        "template, with --system and --template_args; auto: chat if the evaluation asks so", "harness"
    )  # fmt: skip
    lm_eval_fewshot: OptionalCount = option(
        None, "worked examples before each question (if unset: the task's number)", "harness"
    )
    lm_eval_limit: COUNT = option(0, "documents of each task at most, from the first on (0: all)", "harness")
    lm_eval_batch: COUNT = option(0, "requests per batch (0: on a GPU as many as memory takes, on a CPU 8)", "harness")
    lm_eval_python: str = option(
        ".venv-lm-eval/bin/python",
        "a Python that has lm-evaluation-harness; make lm-eval-env makes this one",
        "harness",
    )
