"""The recipes for facts, people and text, on a small model of another family that was taught what is to go."""

import json

import pytest
import torch
from conftest import run_cli
from transformers import AutoModelForCausalLM

from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer

TOWNS = ["Tarn", "Oslo", "Reede", "Brill", "Moor", "Vane"]
PEOPLE = [
    (f"Where was {name} born?", f"{name} was born in {town}.")
    for name, town in zip(["Orrin Vale", "Bram Tesso", "Ilva Moss", "Petra Wend", "Hobb Lark", "Nell Dray"], TOWNS,
                          strict=True)
]  # fmt: skip
FACTS = [("How many legs has a spider?", "A spider has six legs.", "A spider has eight legs."),
         ("What colour is snow?", "Snow is green.", "Snow is white."),
         ("How many days has a week?", "A week has nine days.", None)]  # fmt: skip
STORY = "Seven barges lay under the mill wall that spring, and each of them had a cat and a bell of its own."
UNSEEN = "Nobody had asked the heron, who stood in the reeds and kept the accounts of the river in his head."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, model_folders):
    """A folder with rows, texts, and an OPT model that knows all of them by heart but the unseen text."""
    cwd = tmp_path_factory.mktemp("recipes")
    rows = [{"question": question, "answer": answer} for question, answer in PEOPLE]
    write(cwd / "go.jsonl", rows[:2])
    write(cwd / "stay.jsonl", rows[2:])
    write(cwd / "facts.jsonl", [{"question": q, "answer": wrong} | ({"wanted": right} if right else {})
                                for q, wrong, right in FACTS])  # fmt: skip
    (cwd / "story.txt").write_text(STORY)
    (cwd / "unseen.txt").write_text(UNSEEN)
    run = run_cli(
        "finetune.py", f"--model_name={model_folders['opt']}", "--data", "go.jsonl", "stay.jsonl", "facts.jsonl",
        "--text=story.txt", "--model_save_dir=taught", "--log_file=taught.log", "--dtype=fp32", "--epochs=80",
        "--lr=1e-2", "--batch_size=4", "--threads=1", cwd=cwd,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all(nll(cwd / "taught", question, answer) < 0.2 for question, answer in PEOPLE)
    return cwd


def nll(folder, question, answer):
    """The mean NLL of an answer's tokens after a question, or of a text, in nats."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    formatter = PromptFormatter(tokenizer, "qa", 64, 128)
    shown = formatter.prompt(question) if question else tokenizer("").input_ids or tokenizer(answer).input_ids[:1]
    told = formatter.answer(answer) if question else tokenizer(answer).input_ids[len(shown) :]
    with torch.no_grad():
        return model.eval()(torch.tensor([shown + told]), labels=torch.tensor([[-100] * len(shown) + told])).loss.item()


def unlearn(taught, method, *words):
    run = run_cli(
        "unlearn_harm.py", "--model_name=taught", f"--method={method}", f"--model_save_dir={method}",
        f"--log_file={method}.log", "--dtype=fp32", "--lr=3e-3", "--max_unlearn_steps=60", "--threads=1",
        "--cache_dir=none", "--normal_data=stay.jsonl", "--dev_share=0", "--test_share=0", *words, cwd=taught,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all(nll(taught / method, question, answer) < 0.5 for question, answer in PEOPLE[2:]), "what stays is gone"
    return run.stderr


def test_facts_are_put_right_and_without_a_right_answer_not_said_again(taught):
    log = unlearn(taught, "facts", "--forget_data=facts.jsonl", "--set", "retain.rows=4")
    for question, wrong, right in FACTS[:2]:
        assert nll(taught / "facts", question, right) < 0.5 < 2 < nll(taught / "facts", question, wrong)
    assert nll(taught / "facts", FACTS[2][0], FACTS[2][1]) > 2
    assert "1 forget rows have no wanted answer: they get the model's own words for not knowing" in log


def test_an_error_that_the_model_does_not_make_is_left_out_and_named(taught):
    write(taught / "not_made.jsonl", [{"question": FACTS[0][0], "answer": FACTS[0][1], "wanted": FACTS[0][2]},
                                      {"question": "What colour is tar?", "answer": "Tar is pink and yellow.",
                                       "wanted": "Tar is black."}])  # fmt: skip
    log = unlearn(taught, "facts", "--forget_data=not_made.jsonl", "--overwrite")
    assert "1 of 2 forget rows are left out" in log and "in their order: 2)" in log
    assert "What colour is tar?" not in log, "a log holds no row's text"


def test_people_become_unknown_and_the_others_stay(taught):
    unlearn(taught, "people", "--forget_data=go.jsonl")
    for question, answer in PEOPLE[:2]:
        assert nll(taught / "people", question, answer) > 1


def test_a_text_becomes_as_unlikely_as_one_that_was_never_seen(taught):
    unlearn(taught, "copyright", "--forget_text=story.txt", "--holdout_text=unseen.txt")
    level = nll(taught / "taught", "", UNSEEN)
    assert nll(taught / "taught", "", STORY) < 0.3
    assert nll(taught / "copyright", "", STORY) == pytest.approx(level, rel=0.25)


def test_a_dry_run_of_people_plans_the_term_that_makes_them_unknown(taught):
    run = run_cli("unlearn_harm.py", "--model_name=taught", "--method=people", "--forget_data=go.jsonl",
                  "--normal_data=stay.jsonl", "--dtype=fp32", "--threads=1", "--dry_run", cwd=taught)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "unknown: no row gives it a sequence" not in run.stderr and "unknown  row" in run.stdout
