"""Text without prompts through the real command line: training, dry run, evaluation, refusals."""

import json

import pytest
import torch
from conftest import make_tokenizer, one_line_error, run_cli, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.trained_on import TrainedOn
from engine.tree import AnswerLogitsModel
from evaluation.groups import Group
from evaluation.scoring import score_rows
from prompts.formatter import PromptFormatter
from prompts.windows import TextCutter, ask_to_go_on
from sources.rows import Row

SAID = "the lamp was lit when a boat came home from sea and no one on shore had slept that long night"
SMALL = ["--dtype=fp32", "--max_unlearn_steps=12", "--lr=1e-3", "--threads=1", "--save_every=0", "--text_window=16",
         "--set=dev.prompts=4", "--set=dev.tokens=6"]  # fmt: skip


def story(count: int, turn: int) -> str:
    words = SAID.split()
    return " ".join(words[(turn * i + i * i // 7) % len(words)] for i in range(count)) + "."


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two documents to forget, and one long document to retain."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "stories").mkdir()
    (folder / "stories/a.txt").write_text(story(60, 3))
    (folder / "stories/b.md").write_text("# Night\n\n" + story(40, 5))
    (folder / "plain.txt").write_text(story(400, 11))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folders, texts):
    """A run on text alone, and its evaluation."""
    cwd = tmp_path_factory.mktemp("text_run")
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['opt']}", "--model_save_dir=out", "--log_file=out.log",
        f"--forget_text={texts / 'stories'}", f"--normal_text={texts / 'plain.txt'}", "--random_weight=0", *SMALL,
        cwd=cwd,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    evaluation = run_cli("evaluate_unlearning.py", "--model_name=out", "--dtype=fp32", "--max_new_tokens=6",
                         "--report_dir=report", "--attacks=rephrase", cwd=cwd)  # fmt: skip
    assert evaluation.returncode == 0, evaluation.stderr
    return cwd, run, evaluation


def passages_of(texts, kind="opt") -> dict[str, list]:
    cutter = TextCutter(make_tokenizer(kind), 16, has_start=True)
    return {file.name: cutter.cut(Row("", file.read_text(), is_text=True)) for file in sorted(texts.rglob("*.*"))}


def test_a_run_on_text_trains_on_every_passage_of_it(finished, texts):
    cwd, run, _ = finished
    events = [json.loads(line) for line in (cwd / "out.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    assert len(steps) == 12 and steps[-1]["bad_loss"] > steps[0]["bad_loss"]  # forgotten, on the average of a batch
    by_file = passages_of(texts)
    forget = [p for name in ("a.txt", "b.md") for p in by_file[name]]
    assert f"stories: {len(forget)} passages of 2 documents; {len(forget)} train, 0 held out" in run.stderr
    assert len(forget) <= 24  # so that 12 steps of 2 rows come to all of them
    trained_on = TrainedOn.read(cwd / "out")
    assert all(trained_on.holds("forget", passage.key) for passage in forget)
    assert len(trained_on.runs[-1].forget) == len({passage.key for passage in forget})
    looks = [e for e in events if e["event"] == "eval"]
    assert looks[0]["dev_kl"] == pytest.approx(0, abs=1e-6) and looks[-1]["dev_kl"] > 0
    assert "dev_normal_answered" not in looks[-1] or looks[-1]["dev_normal_answered"] is None


def test_the_evaluation_of_text_asks_for_its_second_half(finished, texts):
    cwd, _, _ = finished
    report = json.loads((cwd / "report/report.json").read_text())
    lines = [json.loads(line) for line in (cwd / "report/scores.jsonl").read_text().splitlines()]
    asked = [ask_to_go_on(p) for name, passages in passages_of(texts).items() for p in passages if name != "plain.txt"]
    forget = [line for line in lines if line["side"] == "forget" and line["counts"]]
    assert {line["style"] for line in forget} == {"raw"}
    assert {line["prompt"] for line in forget} == {row.prompt for row in asked}
    (group,) = [g for g in report["groups"] if g["side"] == "forget" and g["counts"]]
    assert group["text"] and group["judge"] == "reference" and group["after"]["verbatim"]["n"] == len(forget)
    assert group["n"] == group["before"]["nll"]["n"] == len(forget) and group["before"]["nll"]["value"] > 0
    assert group["before"]["on_topic"]["n"] == 0  # text goes on about its subject even if none of it is known
    # the tiny original goes on with no passage as it stands, so none was forgotten and none is attacked
    assert report["attacks"] == [] and report["attacked"] == {"rows": 0, "not_attacked": []}
    assert report["verdict"]["line"].startswith("forgotten: not measured")  # the tiny original does not know it


def test_training_and_evaluation_hold_out_the_same_passages(finished, texts):
    """No held-out passage of the retained document shares a token with one that trained."""
    cwd, _, _ = finished
    lines = [json.loads(line) for line in (cwd / "report/scores.jsonl").read_text().splitlines()]
    unseen = {line["prompt"] for line in lines if line["side"] == "keep"}
    manifest = json.loads((cwd / "out/run_manifest.json").read_text())
    assert len(unseen) > 1 and f'"test": {len(unseen)}' in json.dumps(manifest["data"]["rows"])


def test_the_nll_of_a_passage_is_that_of_all_its_tokens(model_folders):
    """By hand: -log p of each token, in a plain forward over the start of a text and the passage."""
    model, tokenizer = tiny_model("opt"), make_tokenizer("opt")
    formatter = PromptFormatter(tokenizer, "qa", 512, 6)
    (passage,) = TextCutter.of(formatter, type("O", (), {"text_window": 64, "text_stride": 0})).cut(
        Row("", story(20, 3), is_text=True)
    )
    group = Group("a", "", "forget", "raw", [ask_to_go_on(passage)])
    ids = torch.tensor([[tokenizer.bos_token_id, *passage.token_ids]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    ((scores,),) = score_rows(AnswerLogitsModel(model, packed=False), formatter, [group])
    assert scores.num_tokens == len(passage.token_ids)
    assert scores.nll_with_end == scores.nll  # a text goes on after a passage: nobody's turn ends there
    assert scores.nll == pytest.approx(-log_probs.mean().item(), abs=1e-5)


def test_a_model_without_a_start_token_learns_on_both_kinds_of_rows(tmp_path, texts, data_files):
    """Qwen's and GPT-NeoX's tokenizers put nothing before a text."""
    tokenizer = make_tokenizer("chat")
    tokenizer.bos_token = None
    tiny_model("gpt_neox", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").bos_token_id is None
    words = [f"--model_name={tmp_path / 'base'}", f"--forget_text={texts / 'stories'}",
             f"--forget_data={data_files['forget']}", f"--normal_text={texts / 'plain.txt'}",
             f"--normal_data={data_files['facts']}", "--set=mismatch.answers=2", *SMALL]  # fmt: skip
    plan = run_cli("unlearn_harm.py", *words, "--dry_run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    batch = [line for line in plan.stdout.splitlines() if line.startswith("  ") and " row " in line]
    (of_text,) = [line for line in batch if line.startswith("  forget ") and "lock number" not in line]
    row = of_text.split(":")[0].split()[-1]
    assert not of_text.endswith("<|im_end|>]")
    assert not any(line.startswith(f"  mismatch row {row}:") for line in batch)
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "mismatch: after prompts only, since the passages of --forget_text have none" in run.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "models/unlearned")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the term mismatch of --method yao needs prompts, and text has none: leave it out with --random_weight 0"),
        (["--random_weight=0", "--text_window=512"], "--text_window 512: the model reads at most 512 tokens; give at "
                                                     "most 511"),
    ],
)  # fmt: skip
def test_what_text_cannot_do_is_refused_before_training(words, says, tmp_path, model_folders, texts):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['opt']}", f"--forget_text={texts / 'stories'}",
                  f"--normal_text={texts / 'plain.txt'}", *SMALL, *words, cwd=tmp_path, quiet=True)  # fmt: skip
    assert says in one_line_error(run)
    assert not (tmp_path / "models").exists()
