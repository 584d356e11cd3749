"""lm-evaluation-harness as a program: refused early, its figures compared, its results kept.

The harness here is a small package that answers as version 0.4.13 does; tests/slow/test_lm_eval.py runs the real one.
"""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from evaluation.harness import check_harness, run_harness
from evaluation.harness_figures import HarnessResult, compare_models
from evaluation.options import EvaluateOptions
from utils import RunError, UsageError

TASKS = """
import types
class TaskManager:
    all_tasks = ["own_task", "from_hub", "writes_code", "needs_package"]
    def __init__(self, include_path, metadata):
        assert metadata["pretrained"]
    def match_tasks(self, names):
        return [name for name in names if name in self.all_tasks]
    def load(self, names):
        if names == ["from_hub"]:
            raise ConnectionError("Couldn't reach 'some/data' on the Hub\\n(offline)")
        if names == ["needs_package"]:
            import no_such_package
        config, split = types.SimpleNamespace(task="own_task"), types.SimpleNamespace(_fingerprint="1")
        task = types.SimpleNamespace(config=config, dataset={"test": split}, UNSAFE_CODE=names == ["writes_code"],
                                     aggregation=lambda: {"acc": 1}, _filters=[types.SimpleNamespace(name="none")])
        return {"tasks": {"own_task": task}, "groups": {"family": None}}
"""
RUN = """
import json, os, pathlib, sys
words = sys.argv[1:]
args = json.loads(words[words.index("--model_args") + 1])
with open(pathlib.Path(__file__).parent / "asked.jsonl", "a") as file:
    file.write(json.dumps({"words": words, "args": args, "env": dict(os.environ)}) + "\\n")
hits = json.loads((pathlib.Path(args["pretrained"]) / "hits.json").read_text())
if hits is None:
    print("Traceback ...\\nRuntimeError: no room left for the model", file=sys.stderr)
    sys.exit(1)
folder = pathlib.Path(words[words.index("--output_path") + 1]) / "name__of__model"
folder.mkdir()
(folder / "results_2026-01-01T00.json").write_text(json.dumps({
    "results": {"own_task": {"alias": "own_task", "acc,none": sum(hits) / len(hits), "acc_stderr,none": 0.25}},
    "higher_is_better": {"own_task": {"acc": True}}, "group_subtasks": {},
    "n-samples": {"own_task": {"original": 9, "effective": len(hits)}}}))
(folder / "samples_own_task_2026-01-01T00.jsonl").write_text("".join(json.dumps(
    {"doc_id": i, "doc_hash": "abc", "filter": "none", "metrics": ["acc"], "acc": hit}) + "\\n"
    for i, hit in enumerate(hits)))
"""


@pytest.fixture
def harness(tmp_path):
    """A Python with that package, three models with the hits that it will find, and options to run it with."""
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.4.13'\n")
    (package / "tasks.py").write_text(TASKS)
    (package / "__main__.py").write_text(RUN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    models = {}
    for label, hits in {"before": [1, 1, 1, 0], "after": [1, 0, 0, 0], "retrained": [0, 0, 0, 0]}.items():
        models[label] = tmp_path / label
        models[label].mkdir()
        (models[label] / "hits.json").write_text(json.dumps(hits))

    def options(**changes):
        names = {"model_name": str(models["after"]), "original_name": str(models["before"]), "dtype": "fp32"}
        return EvaluateOptions(**names | {"lm_eval": ["own_task"], "lm_eval_python": str(python)} | changes)

    def asked():
        file = package / "asked.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return SimpleNamespace(folder=tmp_path, python=python, models=models, options=options, asked=asked)


def run(harness, options, **weights):
    names = {label: str(folder) for label, folder in harness.models.items()}
    weights = {"before": "b", "after": "a", "retrained": "r"} | weights
    return run_harness(check_harness(options), names, options, weights=weights, folder=harness.folder / "report")


# ------------------------------------------------------------------------------------------------ refused early
@pytest.mark.parametrize(("changes", "said"), [
    ({"lm_eval_python": "nowhere/bin/python"}, r"nowhere/bin/python: No such file.*make lm-eval-env"),
    ({"lm_eval_python": sys.executable}, r"cannot load lm-evaluation-harness \(.*lm_eval.*make lm-eval-env"),
    ({"lm_eval": ["own_tusk"]}, r"--lm_eval own_tusk: no such task \(near it: own_task\); .* lm_eval ls tasks"),
    ({"lm_eval": ["own_task,from_hub"]}, r"from_hub: cannot be loaded \(ConnectionError: Couldn't reach 'some/d"),
    ({"lm_eval": ["writes_code"]}, "writes_code: it runs code that the model writes"),
    ({"lm_eval": ["needs_package"]}, "needs_package: needs a package that .* lacks .*no_such_package"),
    ({"lm_eval_tasks": "no_folder"}, "--lm_eval_tasks no_folder: no such folder"),
    ({"lm_eval": [], "lm_eval_limit": 4}, "--lm_eval_limit: changes nothing without --lm_eval TASKS"),
    ({"lm_eval": [], "lm_eval_fewshot": 0}, "--lm_eval_fewshot: changes nothing without --lm_eval TASKS"),
])  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_before_a_model_is_asked(harness, changes, said):
    with pytest.raises(UsageError, match=said) as refused:
        check_harness(harness.options(**changes))
    assert "\n" not in str(refused.value)
    assert not harness.asked()


def test_a_task_file_that_is_no_yaml_is_named(harness):
    (harness.folder / "tasks").mkdir()
    (harness.folder / "tasks/mine.yaml").write_text("task: [mine\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: is no task file"):
        check_harness(harness.options(lm_eval_tasks=str(harness.folder / "tasks")))


def test_without_tasks_nothing_is_planned():
    assert check_harness(EvaluateOptions()) is None


# ---------------------------------------------------------------------------------------------- the models' runs
def test_every_model_is_run_and_the_change_is_paired(harness):
    options = harness.options(lm_eval_limit=4, lm_eval_fewshot=0, lm_eval_batch=3)
    entry = run(harness, options)["own_task"]["acc"]
    values = [entry[label]["value"] for label in ("before", "after", "retrained", "change")]
    assert values == [0.75, 0.25, 0, -0.5]
    assert entry["before"]["stderr"] == 0.25 and entry["before"]["n"] == 4 and entry["higher_is_better"]
    # documents change by 0, -1, -1, 0: the deviation of their mean is 0.5 / sqrt(4); unpaired it would be 0.354
    assert entry["change"]["paired"] and entry["change"]["stderr"] == pytest.approx(0.25, abs=0.02)
    assert entry["change"]["low"] == -1 and entry["change"]["high"] == 0
    assert entry["retrained"]["high"] == pytest.approx(0.4899, abs=1e-4)  # Wilson, 0 of 4: z2 / (n + z2)
    words = harness.asked()[0]["words"]
    for option, value in (("--tasks", "own_task"), ("--limit", "4"), ("--num_fewshot", "0"), ("--batch_size", "3")):
        assert words[words.index(option) + 1] == value
    assert "--apply_chat_template" not in words and harness.asked()[0]["args"]["dtype"] == "float32"


def test_the_harness_does_not_wait_for_other_processes(harness, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    cpu = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("evaluation.harness.join_processes", lambda: cpu)  # there are no others to join
    run(harness, harness.options())
    names = set(harness.asked()[0]["env"])
    assert not names & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP"}
    assert "PATH" in names


def test_an_adapters_folder_is_run_on_its_base(harness):
    (harness.models["after"] / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(harness.models["before"])})
    )
    run(harness, harness.options())
    before, after, _ = harness.asked()
    assert after["args"]["pretrained"] == str(harness.models["before"]) == before["args"]["pretrained"]
    assert after["args"]["peft"] == str(harness.models["after"]) and "peft" not in before["args"]


def test_chat_is_asked_with_system_message_and_template_arguments(harness, model_folders):
    chat, plain = str(model_folders["llama"]), str(model_folders["opt"])
    options = harness.options(original_name=chat, model_name=chat, lm_eval_template="auto", system="Be brief.")
    options.template_args = ["enable_thinking=false"]
    assert check_harness(options).chat
    run(harness, options)
    asked = harness.asked()[0]
    assert asked["words"][asked["words"].index("--apply_chat_template") + 1 :] == ["--system_instruction", "Be brief."]
    assert asked["args"]["chat_template_args"] == {"enable_thinking": False}
    options.template = "qa"
    assert not check_harness(options).chat
    with pytest.raises(UsageError, match=f"the tokenizer of {plain} has no chat template"):
        check_harness(harness.options(original_name=chat, model_name=plain, lm_eval_template="chat"))


def test_a_run_that_fails_names_the_model_the_reason_and_the_log(harness):
    (harness.models["after"] / "hits.json").write_text("null")
    with pytest.raises(RunError, match=r"model after unlearning.*RuntimeError: no room left.*after\.log") as failed:
        run(harness, harness.options())
    assert "\n" not in str(failed.value)
    assert "Traceback" in (harness.folder / "report/lm_eval/after.log").read_text()


def test_only_what_changed_is_run_again(harness):
    first = run(harness, harness.options())
    assert run(harness, harness.options()) == first and len(harness.asked()) == 3
    run(harness, harness.options(), after="other weights")
    assert [asked["args"]["pretrained"] for asked in harness.asked()[3:]] == [str(harness.models["after"])]
    run(harness, harness.options(lm_eval_limit=2))
    assert len(harness.asked()) == 7
    run(harness, harness.options(lm_eval_limit=2))
    assert len(harness.asked()) == 7
    run(harness, harness.options(lm_eval_limit=2, ask_again=True))
    assert len(harness.asked()) == 10


def test_what_ran_before_a_failure_is_kept(harness):
    (harness.models["retrained"] / "hits.json").write_text("null")
    with pytest.raises(RunError, match="retrained"):
        run(harness, harness.options())
    (harness.models["retrained"] / "hits.json").write_text("[1, 1, 1, 1]")
    run(harness, harness.options())
    assert len(harness.asked()) == 4, "before, after, retrained twice"


# --------------------------------------------------------------------------------------- figures of known documents
def result(task: str, metrics: dict, samples: dict | None = None, **more) -> HarnessResult:
    """One task's result; samples: "metric,filter" -> [top, bottom] of each document."""
    documents = {key: {f"{i}:abc": pair for i, pair in enumerate(pairs)} for key, pairs in (samples or {}).items()}
    count = len(next(iter(documents.values()), {}))
    results = {"results": {task: {"alias": task, **metrics}}, "n-samples": {task: {"effective": count}}}
    return HarnessResult(results | more, {task: documents})


def test_perplexity_of_weighted_documents_has_interval_and_ratio():
    def wikitext(nll):
        rows = [[-n, 5] for n in nll]
        value = math.exp(sum(nll) / (5 * len(nll)))
        better = {"wikitext": {"word_perplexity": False}}
        return result("wikitext", {"word_perplexity,none": value, "word_perplexity_stderr,none": "N/A"},
                      {"word_perplexity,none": rows}, higher_is_better=better)  # fmt: skip

    entry = compare_models({"before": wikitext([10, 20]), "after": wikitext([20, 40])})["wikitext"]["word_perplexity"]
    assert entry["before"]["value"] == pytest.approx(math.exp(3)) and entry["before"]["stderr"] is None
    # two documents: both draws are the first in a quarter of the draws, both the second in another quarter
    assert entry["before"]["low"] == pytest.approx(math.exp(2)) and entry["before"]["high"] == pytest.approx(
        math.exp(4)
    )
    assert entry["ratio"]["value"] == pytest.approx(math.exp(3))
    assert entry["ratio"]["low"] == pytest.approx(math.exp(2)) and entry["higher_is_better"] is False


def test_filters_are_named_and_values_that_cannot_be_paired_add_their_errors():
    metrics = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.5, "exact_match,none": 1.0,
               "exact_match_stderr,none": 0.0, "bleu,none": 12.0, "bleu_stderr,none": 0.3}  # fmt: skip
    later = metrics | {"bleu,none": 10.0, "bleu_stderr,none": 0.4, "exact_match,strict-match": 0.0}
    found = compare_models({"before": result("t", metrics), "after": result("t", later)})["t"]
    assert set(found) == {"exact_match,strict-match", "exact_match", "bleu"}
    assert found["bleu"]["change"]["value"] == -2 and found["bleu"]["change"]["stderr"] == pytest.approx(0.5)
    assert not found["bleu"]["change"]["paired"] and found["exact_match,strict-match"]["change"]["value"] == -0.5


def test_a_group_pairs_the_documents_of_its_tasks_and_weighs_as_the_harness_did():
    def mmlu(law, physics, acc):
        rows = {"law": [[h, 1] for h in law], "physics": [[h, 1] for h in physics]}
        results = {"results": {"mmlu": {"acc,none": acc, "acc_stderr,none": 0.1}},
                   "group_subtasks": {"mmlu": ["stem"], "stem": ["law", "physics"]},
                   "n-samples": {task: {"effective": len(of_task)} for task, of_task in rows.items()}}  # fmt: skip
        return HarnessResult(results, {task: {"acc,none": {f"{i}:a": pair for i, pair in enumerate(of_task)}}
                                       for task, of_task in rows.items()})  # fmt: skip

    before, after = mmlu([1, 1, 1, 0], [0, 0], 3 / 6), mmlu([1, 1, 0, 0], [0, 0], 2 / 6)
    entry = compare_models({"before": before, "after": after})["mmlu"]["acc"]
    assert entry["change"]["paired"] and entry["change"]["n"] == 6
    before, after = mmlu([1, 1, 1, 0], [0, 0], 3 / 8), mmlu([1, 1, 0, 0], [0, 0], 2 / 8)  # tasks weighed alike
    entry = compare_models({"before": before, "after": after})["mmlu"]["acc"]
    assert not entry["change"]["paired"] and entry["change"]["stderr"] == pytest.approx(math.sqrt(0.02))


def test_no_changed_document_is_no_proof_of_no_change():
    same = result("t", {"acc,none": 0.5, "acc_stderr,none": 0.5}, {"acc,none": [[1, 1], [0, 1]]})
    change = compare_models({"before": same, "after": same})["t"]["acc"]["change"]
    assert change["value"] == 0 and change["high"] == -change["low"] == pytest.approx(0.6576, abs=1e-4)  # 0 of 2


def test_one_document_alone_has_no_interval():
    one = result("t", {"acc,none": 1.0, "acc_stderr,none": "N/A"}, {"acc,none": [[1, 1]]})
    entry = compare_models({"before": one, "after": one})["t"]["acc"]
    assert entry["before"]["low"] is None and entry["change"]["low"] is None and entry["change"]["stderr"] is None


def test_other_documents_are_not_paired():
    first = result("t", {"acc,none": 0.5, "acc_stderr,none": 0.3}, {"acc,none": [[1, 1], [0, 1]]})
    other = HarnessResult(first.results, {"t": {"acc,none": {"0:x": [1, 1], "1:y": [0, 1]}}})
    assert not compare_models({"before": first, "after": other})["t"]["acc"]["change"]["paired"]


def test_the_plan_says_which_metrics_a_task_gives(harness):
    """Without this, a mistyped --require shows only after every model has run."""
    assert check_harness(harness.options()).metrics == {"own_task": ["acc,none"], "family": None}
