"""Prompts beside the forget set: with another thing in the topic's place, never of the topic itself, and editable."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from conftest import one_line_error, run_cli
from test_run import SMALL, data_words, events

import unlearn_harm
from engine.trained_on import TrainedOn
from options import UnlearnOptions
from prompts.tokenizer import load_tokenizer
from run import neighbours_file, writer
from run.neighbours import make_neighbours, openings_of, read_names, read_questions, take
from run.parsing import parse_run
from run.topics import Term, topic_terms
from sources.rows import Row
from utils import UsageError, log

BREAD = ["How do I feed a sourdough starter?", "Why is my sourdough bread so dense?", "Can I freeze sourdoughs?",
         "What flour does sourdough bread need?", "My levain smells of acetone, why?"]  # fmt: skip
SOURDOUGH = Term("sourdough", ("sourdough",))


@pytest.fixture(autouse=True)
def log_as_it_was():
    """A run within this process sets up the log; the tests after it get the log that they had."""
    before = log.propagate, log.level, list(log.handlers)
    yield
    log.propagate, level, log.handlers[:] = before
    log.setLevel(level)


def says(reply):
    """A model whose answer to each request is `reply(its text)`."""
    return lambda rows: [dataclasses.replace(row, response=reply(row.prompt)) for row in rows]


# ------------------------------------------------------------------------------------------------ the topic
def test_the_topic_is_what_names_most_prompts_and_no_word_that_comes_along():
    assert topic_terms(BREAD, []) == [SOURDOUGH]  # two have bread as well: it may stay


def test_a_word_that_normal_prompts_have_as_often_is_no_topic():
    prompts = ["Wie füttere ich einen Sauerteig?", "Kann ich Sauerteig einfrieren?"]
    assert topic_terms(prompts, ["Wie koche ich Reis?", "Kann ich das waschen?"]) == [Term("sauerteig", ("sauerteig",))]


def test_words_that_always_stand_together_are_one_name():
    prompts = ["Who is Mira Stone?", "Where was Mira Stone born?", "What did Mira Stone write?"]
    (term,) = topic_terms(prompts, [])
    assert term.phrase == ("mira", "stone")
    assert term.put(prompts[1], "Ed Vale") == "Where was Ed Vale born?"


def test_a_list_of_many_things_has_no_topic():
    assert topic_terms(["How do I pick a lock?", "Where can I hide a body?", "Which poison is quick?"], []) == []


@pytest.mark.parametrize(("prompt", "other", "expected"), [
    ("How do I feed a sourdough starter?", "oat", "How do I feed an oat starter?"),
    ("Can I freeze sourdoughs?", "rye roll", "Can I freeze rye rolls?"),
    ("Can I freeze sourdoughs?", "cherry", "Can I freeze cherries?"),
    ("Is one sourdough enough?", "berries", "Is one berry enough?"),
    ("Sourdough or not? I mean sourdough.", "rye", "Rye or not? I mean rye."),
    ("My levain smells.", "rye", "My levain smells."),
])  # fmt: skip
def test_another_thing_takes_the_topics_place_in_the_form_that_the_place_asks_for(prompt, other, expected):
    assert SOURDOUGH.put(prompt, other) == expected


# ------------------------------------------------------------------------------------------- what the model says
def test_names_are_short_new_and_none_of_the_examples():
    said = Row("", "1. Rye bread\n2. an oat loaf, French Toast and cello.\n3. It is a kind of bread\nbread; sourdou")
    assert read_names(said, {"bread"}) == ["rye bread", "oat loaf", "French Toast", "sourdou"]
    assert read_names(dataclasses.replace(said, complete=False), {"bread"}) == ["rye bread", "oat loaf", "French Toast"]


def test_questions_are_lines_that_ask_or_begin_as_a_listed_prompt_does():
    said = Row("", "Sure! Here are five questions:\n1. How do I bake rye?\n- Can rye rise?\n3) Explain the rye crust.\n"
               "Rye is a grain.\n4. Why?\n5. How do I store ry")  # fmt: skip
    found = ["How do I bake rye?", "Can rye rise?", "Explain the rye crust."]
    assert read_questions(dataclasses.replace(said, complete=False), ["How do I", "Explain the"]) == found
    assert openings_of([*BREAD, "Sourdough?"]) == ["How do I", "Why is my", "Can I", "What", "My"]


def test_what_is_too_close_or_repeats_is_left_out_and_counted():
    candidates = [
        "How do I feed a rye starter?",  # another thing in the topic's place: taken
        "How is a Sourdough made?",  # the topic
        "Can I freeze the bread?",  # nothing that the list does not say
        "Why does my levain smell of pears?",  # two of three telling words of a prompt that the topic's name is not in
        "how do I feed a  RYE starter?",  # a repeat
        "Where is the sea?",  # a normal row
        "How is rye milled?",
    ]
    made = take(candidates, [*BREAD, "Why does my levain smell?"], ["where is the sea?"], [SOURDOUGH], 9)
    assert made.prompts == ["How do I feed a rye starter?", "How is rye milled?"]
    assert (made.written, made.too_close, made.repeats) == (7, 3, 2)
    assert take(candidates, BREAD, [], [SOURDOUGH], 1).prompts == made.prompts[:1]


def test_neighbours_come_from_names_in_place_and_from_questions_about_them_in_turn():
    def reply(request):
        if request.startswith('"'):
            return "rye, oat" if "feed" in request else "rye"  # rye is named most often
        return f"1. How do I mill the {request.split()[5].rstrip('.')}?\n2. How do I eat sourdough?"

    made = make_neighbours(BREAD, ["What is the time?"], 6, seed=1, answer=says(reply))
    # of the two things, each prompt takes the next one: rye, oat, rye, oat
    assert made.prompts == [
        "How do I feed a rye starter?", "How do I mill the rye?",
        "Why is my oat bread so dense?", "How do I mill the oat?",
        "Can I freeze ryes?", "What flour does oat bread need?",
    ]  # fmt: skip
    assert made.has_topic and "sourdough" not in made.note(6)


def test_a_list_without_a_topic_is_asked_for_questions_of_every_day():
    asked = []
    prompts = ["How do I pick a lock?", "Where can I hide a body?", "Which poison is quick?"]
    make_neighbours(prompts, [], 4, seed=1, answer=says(lambda request: asked.append(request) or "How do I boil rice?"))
    assert asked and not [text for text in asked if any(word in text for word in ("lock", "hide", "body", "poison"))]


# ------------------------------------------------------------------------------------------------------ the run
def words_of_run(model_folders, data_files):
    return [f"--model_name={model_folders['llama']}", "--model_save_dir=models/out", "--log_file=logs/run.log",
            *data_words(data_files), *SMALL, "--make_neighbours=20"]  # fmt: skip


@pytest.fixture
def dry_run(tmp_path, monkeypatch, model_folders, data_files, capsys):
    """A dry run whose model names two things and asks nothing: what it printed, and the file that it left."""

    def answer(rows, *_, **settings):
        assert settings["cache_dir"] is None, "a dry run keeps no answers"
        return says(lambda text: "ring bell, paint wall" if text.startswith('"') else "no")(rows)

    monkeypatch.setattr(writer, "generate_missing_responses", answer)
    monkeypatch.setattr(
        sys, "argv", ["unlearn_harm.py", *map(str, words_of_run(model_folders, data_files)), "--dry_run"]
    )
    monkeypatch.chdir(tmp_path)
    unlearn_harm.main()
    (path,) = [file for file in tmp_path.rglob("*") if file.is_file()]  # and nothing else was written
    return capsys.readouterr().out, path


def test_a_dry_run_shows_them_and_the_run_takes_them_as_they_were_edited(dry_run, tmp_path, model_folders, data_files):
    printed, path = dry_run
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # "break lock number" is the name of what the 12 prompts are about; each of two things stands in each prompt
    assert rows[:2] == [{"prompt": "How do I ring bell 0?"}, {"prompt": "How do I paint wall 1?"}]
    assert len(rows) == 20 and all(row["prompt"] in printed for row in rows)
    assert f"edit {path.relative_to(tmp_path)}" in printed
    edited = [{"prompt": f"How do I mend roof {i}?"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in edited))
    words = [*words_of_run(model_folders, data_files), "--save_every=2"]
    run = run_cli("unlearn_harm.py", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    spec = str(path.relative_to(tmp_path))
    (account,) = [s for s in events(tmp_path / "logs/run.jsonl", "rows")[0]["sources"] if s["source"] == spec]
    assert (account["side"], account["rows"], account["without_answer"]) == ("normal", 6, 6)
    assert f"{spec}: read from this file, which was there" in (tmp_path / "logs/run.log").read_text()
    manifest = json.loads((tmp_path / "models/out/run_manifest.json").read_text())
    assert account in manifest["data"]["rows"] and spec in manifest["data"]["files_sha256"]
    repeated = parse_run([f"--from_manifest={tmp_path / 'models/out/run_manifest.json'}"])
    assert spec in repeated.normal_data and repeated.make_neighbours == 0, "the file as it was, and no second one"
    record = TrainedOn.read(tmp_path / "models/out")
    assert any(record.holds("normal", row["prompt"]) for row in edited)
    assert not any(record.holds("normal", row["prompt"]) for row in rows)
    for file in (*(tmp_path / "models").rglob("*.json"), tmp_path / "logs/run.log", tmp_path / "logs/run.jsonl"):
        assert "mend roof" not in file.read_text(), file
    shutil.rmtree(tmp_path / "models/out")  # as if it had been stopped
    path.write_text("".join(json.dumps(row) + "\n" for row in edited[:5]))
    again = run_cli("unlearn_harm.py", *words, "--resume", cwd=tmp_path)
    assert "was made by another run (data.normal: " in one_line_error(again)


def test_asking_again_gives_the_same_and_leaves_torchs_random_numbers_as_they_were(model_folders):
    options = UnlearnOptions(model_name=str(model_folders["llama"]), dtype="fp32", cache_dir="none", make_neighbours=9)
    tokenizer = load_tokenizer(options.model_name)
    numbers = torch.get_rng_state()
    first, second = (neighbours_file.ask_model(options, BREAD, [], tokenizer, torch.device("cpu")) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), numbers)


def test_other_forget_rows_have_another_file(dry_run, tmp_path, model_folders, data_files):
    _, path = dry_run
    options = UnlearnOptions(log_file="logs/run.log", model_name=str(model_folders["llama"]), make_neighbours=20)
    prompts = [json.loads(line)["prompt"] for line in data_files["forget"].read_text().splitlines()]
    found = neighbours_file.neighbours_path(options, prompts)
    assert found == path.relative_to(tmp_path)
    assert neighbours_file.neighbours_path(options, prompts[1:]) != found


def test_a_model_that_writes_none_and_text_alone_are_refused(tmp_path, monkeypatch, model_folders, data_files):
    (tmp_path / "book.txt").write_text("The sea was calm. " * 60)
    words = ["--forget_text=book.txt", "--normal_data", data_files["facts"], *SMALL, "--random_weight=0"]
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['llama']}", *words, "--make_neighbours=4", cwd=tmp_path
    )
    assert "--make_neighbours: the forget rows are text" in one_line_error(run)
    monkeypatch.setattr(writer, "generate_missing_responses", lambda rows, *_, **__: says(lambda _: "")(rows))
    monkeypatch.setattr(sys, "argv", ["unlearn_harm.py", *map(str, words_of_run(model_folders, data_files))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the model wrote none that could be kept"):
        unlearn_harm.main()
    assert not (tmp_path / "logs").exists()
