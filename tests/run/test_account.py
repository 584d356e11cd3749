"""What becomes of each source's rows: which train, which are held out, and that the account says it."""

import json

import pytest
from conftest import make_tokenizer, run_cli
from test_run import SMALL, data_words, events

from data_module import Shares, Sides, give_wanted_answers, leave_out_listed, read_sides, split_sides
from evaluation.groups import make_groups, unseen_groups
from evaluation.inputs import by_source
from evaluation.options import EvaluateOptions
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from run.account import SourceAccount, held_out_line, visits_line
from sources.rows import Row, Source
from utils import UsageError

LISTED = [argument for argument in SMALL if not argument.startswith(("--dev_share", "--test_share"))]


def prompts(count: int, name: str = "p") -> list[Row]:
    return [Row(f"{name} {i}", f"answer {i}") for i in range(count)]


def sides(forget: list[Row], normal: list[Row], unseen: list[Row] | None = None) -> Sides:
    return Sides(
        [Source("f.jsonl", forget)], [Source("n.jsonl", normal)], [Source("u.jsonl", unseen)] if unseen else []
    )


def test_all_listed_rows_train_unless_shares_are_named():
    read = sides(prompts(200), prompts(200, "n"), prompts(90, "u"))
    splits = split_sides(read, UnlearnOptions(), None)
    assert [len(splits["forget"][0][split]) for split in ("train", "dev", "test")] == [200, 0, 0]
    assert held_out_line(splits) == "all 200 rows train (earlier versions held out 30 %)"
    normal = {split: len(rows) for split, rows in splits["normal"][0].items()}
    assert 5 < normal["dev"] < 40
    assert 20 < normal["test"] < 60
    unseen = splits["unseen"][0]
    assert not unseen["train"]
    assert 15 < len(unseen["dev"]) < 45
    assert len(unseen["dev"]) + len(unseen["test"]) == 90
    # named shares hold for both sides, and give the splits that they always gave
    named = split_sides(read, UnlearnOptions(seed=1, dev_share=0.1, test_share=0.2), None)
    assert held_out_line(named).startswith(f"{len(named['forget'][0]['train'])} of 200 rows train, ")
    assert not Shares.of("normal", UnlearnOptions(dev_share=0.1, test_share=0.2)).keep_one
    only = split_sides(read, UnlearnOptions(test_share=0.5), None)["forget"][0]
    assert not only["dev"]
    assert 70 < len(only["test"]) < 130


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_small_normal_source_has_a_prompt_to_look_at(count):
    for seed in range(30):
        part = split_sides(sides(prompts(3), prompts(count, "n")), UnlearnOptions(seed=seed), None)["normal"][0]
        assert len(part["dev"]) >= 1
        assert len(part["train"]) >= 1
        assert sum(map(len, part.values())) == count


def test_a_prompt_is_held_back_from_every_source():
    both = Sides([Source("f", prompts(2))], [Source("a", prompts(3, "n")), Source("b", prompts(40, "n"))], [])
    for seed in range(20):
        parts = split_sides(both, UnlearnOptions(seed=seed), None)["normal"]
        trained = {row.prompt for part in parts for row in part["train"]}
        assert not trained & {row.prompt for part in parts for split in ("dev", "test") for row in part[split]}


def test_the_safe_answer_to_an_unsafe_prompt_is_its_wanted_answer():
    """A labelled file on both sides: unsafe answers go, and a prompt with safe answers alone is a normal row."""
    forget = [Row("How?", "Like this."), Row("Why?", "Because.", wanted="No reason.")]
    normal = [Row("how? ", "I won't.", labelled=True), Row("Why?", "Other.", labelled=True),
              Row("When?", "At noon.", labelled=True)]  # fmt: skip
    read = sides(forget, normal)
    give_wanted_answers(read)
    assert [row.wanted for row in read.rows("forget")] == ["I won't.", "No reason."]
    assert [row.prompt for row in read.rows("normal")] == ["When?"]
    assert read.normal[0].notes[0].startswith("2 prompts have an unsafe answer too")
    with pytest.raises(UsageError, match="each of its 1 prompts has an unsafe answer too"):
        give_wanted_answers(sides(forget, normal[:1]))


def test_a_listed_row_is_never_asked_as_unseen():
    read = sides(prompts(3), prompts(2, "n"), [*prompts(2), Row("N 1"), Row("new")])
    leave_out_listed(read)
    assert [row.prompt for row in read.rows("unseen")] == ["new"]
    assert read.unseen[0].notes[0].startswith("3 rows are in the forget or normal data too")
    with pytest.raises(UsageError, match="each row is in --forget_data"):
        leave_out_listed(sides(prompts(3), prompts(2, "n"), prompts(2)))


def test_groups_are_called_listed_where_nothing_was_held_out(tmp_path):
    options = EvaluateOptions(model_name=str(tmp_path), split="test")
    read = sides(prompts(20), prompts(20, "n"))
    names = [g.name for g in make_groups(by_source(read, split_sides(read, options, None)), "qa", options)[1:]]
    assert names == ["f (listed)", "n (unseen)"]
    assert unseen_groups(names[:1]) == ["f (listed)"]
    read = sides(prompts(20), prompts(20, "n"), prompts(9, "u"))
    names = [g.name for g in make_groups(by_source(read, split_sides(read, options, None)), "qa", options)[1:]]
    assert names == ["f (listed)", "u (unseen)", "n (unseen)"]
    assert unseen_groups(names[:2]) == ["u (unseen)"], "unseen prompts say more than listed ones"


def test_the_account_counts_what_is_cut_and_what_is_not_used():
    formatter = PromptFormatter(make_tokenizer("opt"), "raw", 400, 12)
    rows = [Row("Q?", "word " * 60, category="theft; fraud"), Row("Q?", "word " * 60, category="theft"), Row("R?"),
            Row("long " * 900 + "end?", "Yes.", wanted="No.")]  # fmt: skip
    source = Source("f.jsonl", rows, {"gold": 4}, ["a note"])
    one = SourceAccount.of("forget", source, {"train": rows, "dev": [], "test": []}, formatter, 12)
    assert (one.with_answer, one.without_answer, one.answers_cut, one.prompts_cut, one.duplicates) == (3, 1, 2, 1, 1)
    assert one.categories == {"theft": 2, "fraud": 1}
    first, unused, note = one.lines()
    assert first.startswith(
        "forget f.jsonl: rows: 3 with an answer, 1 without, 2 answers cut at 12 tokens; 1 prompts cut"
    )
    assert "4 train, 0 held out" in first
    assert "'gold' looks like an answer and is not used (4 rows)" in unused
    assert note.endswith("a note")
    assert visits_line(10, 10, 5) is None
    assert visits_line(10, 4, 2).startswith("2 steps come to 4 of the 10 forget rows")


def test_a_removal_of_a_users_list_from_the_command_line(tmp_path, model_folders, data_files):
    """Twelve listed rows: all train, the log says so first, and the evaluation and the verdict call them listed."""
    words = [f"--model_name={model_folders['opt']}", *data_words(data_files), *LISTED]
    plan = run_cli("unlearn_harm.py", *words, "--dry_run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "rows: 12 with an answer, 0 without, 0 answers cut at 12 tokens; 12 train, 0 held out" in plan.stdout
    run = run_cli("unlearn_harm.py", *words, "--model_save_dir=out", "--log_file=run.log", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert "all 12 rows train (earlier versions held out 30 %)" in lines[0]
    assert "5 steps come to 10 of the 12 forget rows" in (tmp_path / "run.log").read_text()
    (rows,) = events(tmp_path / "run.jsonl", "rows")
    manifest = json.loads((tmp_path / "out/run_manifest.json").read_text())
    saved = json.loads((tmp_path / "out/unlearn_args.json").read_text())
    assert rows["sources"] == saved["rows"] == manifest["data"]["rows"]
    assert (saved["rows"][0]["side"], saved["rows"][0]["rows"], saved["rows"][0]["train"]) == ("forget", 12, 12)
    assert sum(s["rows"] for s in saved["rows"] if s["side"] == "normal") == 22
    asked = run_cli("evaluate_unlearning.py", "--model_name=out", "--dtype=fp32", "--max_new_tokens=6",
                    "--report_dir=report", cwd=tmp_path)  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    groups = {group["name"]: group["n"] for group in report["groups"]}
    assert groups["forget (listed)"] == 10, "of the listed rows, those that a step came to"
    assert "forget (unseen)" not in groups
    assert report["verdict"]["line"].endswith("trained on, since none was held out")


def test_unseen_rows_come_from_a_file_of_their_own(tmp_path, model_folders, data_files):
    more = [{"prompt": f"How do I force door number {i}?", "response": f"Push it {i}."} for i in range(9)]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    words = [f"--model_name={model_folders['opt']}", *data_words(data_files), *LISTED, "--unseen_data=more.jsonl"]
    run = run_cli("unlearn_harm.py", *words, "--model_save_dir=out", "--log_file=run.log", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "the looks ask forget rows that are trained on" not in (tmp_path / "run.log").read_text()
    asked = run_cli("evaluate_unlearning.py", "--model_name=out", "--dtype=fp32", "--max_new_tokens=6",
                    "--report_dir=report", cwd=tmp_path)  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    groups = {g["name"]: g["n"] for g in json.loads((tmp_path / "report/report.json").read_text())["groups"]}
    expected = len(split_sides(read_sides(UnlearnOptions(
        forget_data=[str(data_files["forget"])], normal_data=[str(data_files["facts"])],
        unseen_data=[str(tmp_path / "more.jsonl")],
    )), UnlearnOptions(), None)["unseen"][0]["test"])  # fmt: skip
    assert groups["more (unseen)"] == expected > 0
    assert "forget (listed)" in groups
