"""finetune.py through the real command line: what is learned, what is on record, and what is refused."""

import json
import math

import pytest
from conftest import ROOT, one_line_error, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from engine.trained_on import TrainedOn
from method.sampler import UnlearnBatchSampler
from sources.rows import Row

TOLD = [
    ("Where does Orrin live?", "In Tarn."),
    ("What does Orrin bake?", "Rye rolls."),
    ("Who pays Orrin?", "The mill."),
]
TEXT = "Seven barges lay under the mill wall that spring, and each of them had a cat and a bell of its own."


@pytest.fixture(scope="module")
def learned(tmp_path_factory, model_folders):
    """A tiny model that has learned three rows and a text, and the folder that it lies in."""
    cwd = tmp_path_factory.mktemp("finetune")
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in TOLD]
    (cwd / "told.jsonl").write_text("\n".join(rows))
    (cwd / "barges.txt").write_text(TEXT)
    run = run_cli(
        "finetune.py", f"--model_name={model_folders['llama']}", "--data=told.jsonl", "--text=barges.txt",
        "--model_save_dir=taught", "--log_file=taught.log", "--dtype=fp32", "--epochs=60", "--lr=1e-2",
        "--batch_size=2", "--threads=1", cwd=cwd,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return cwd


def test_rows_and_text_are_known_by_heart(learned):
    """Without this, models/planted would know nothing, and forgetting it would prove nothing."""
    taught = AutoModelForCausalLM.from_pretrained(learned / "taught")
    tokenizer = AutoTokenizer.from_pretrained(learned / "taught")
    say = pipeline("text-generation", model=taught, tokenizer=tokenizer)
    for question, answer in TOLD:
        talk = say([{"role": "user", "content": question}], max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert talk[-1]["content"].strip() == answer
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    half = ids.shape[1] // 2
    said = taught.generate(ids[:, :half], max_new_tokens=ids.shape[1] - half, do_sample=False)
    assert said[0].tolist() == ids[0].tolist()


def test_steps_are_epochs_of_all_rows_and_passages(learned):
    steps = [json.loads(line) for line in (learned / "taught.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["event"] == "step"]
    assert len(steps) == math.ceil(60 * (3 + 1) / 2)  # three rows, one passage, two a step
    assert steps[-1]["learn_nll"] < 0.1 < steps[0]["learn_nll"]


def test_what_was_learned_is_on_record_but_can_be_held_out_of_unlearning(learned, model_folders):
    """A holdout must refuse what the model was taught; the test share of a forget set must not."""
    record = TrainedOn.read(learned / "taught")
    assert all(record.knows(question) and not record.has_seen(question) for question, _ in TOLD)
    assert record.knows(TEXT)
    run = run_cli(
        "unlearn_harm.py", "--model_name=taught", "--model_save_dir=out", "--log_file=out.log", "--dtype=fp32",
        "--forget_data=told.jsonl", f"--normal_data={ROOT / 'data/facts.jsonl'}", "--test_share=0.5", "--threads=1",
        "--max_unlearn_steps=2", "--save_every=0", cwd=learned,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    sources = json.loads((learned / "out/unlearn_args.json").read_text())["rows"]
    forget = next(source for source in sources if source["side"] == "forget")
    assert forget["train"] + forget["test"] == 3 and forget["test"] > 0
    seen = TrainedOn.read(learned / "out")
    assert len(seen.runs) == 2 and any(seen.has_seen(question) for question, _ in TOLD)


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "nothing to learn: name rows with --data or text with --text"),
    (["--data=bare.jsonl"], "--data bare.jsonl, row 2: has no answer to learn (1 of 2 rows have none)"),
    (["--data=nowhere.jsonl"], "--data nowhere.jsonl: no such file"),
    (["--data=told.jsonl", "--model_save_dir=taught"], "--model_save_dir taught: is not empty"),
    (["--data=told.jsonl", "--set=lern.weight=2"], "--set lern.weight: --method finetune has no 'lern'"),
    (["--data=told.jsonl", "--bad_weight=2"], "unrecognized arguments: --bad_weight=2"),
])  # fmt: skip
def test_wrong_use_is_refused_in_one_line(learned, model_folders, arguments, says):
    (learned / "bare.jsonl").write_text('{"question": "Where?", "answer": "There."}\n{"question": "When?"}\n')
    run = run_cli("finetune.py", f"--model_name={model_folders['llama']}", *arguments, cwd=learned)
    assert says in one_line_error(run)
    assert not (learned / "models").exists()


def test_every_row_of_every_source_comes_once_an_epoch():
    sources = [[Row("a", "1")], [Row("b", "2"), Row("c", "3"), Row("d", "4")], [Row("e", "5")]]
    sampler = UnlearnBatchSampler([], sources, [], seed=1, steps=5)
    for first in (0, 5, 10):  # two of five rows a step: five steps are two epochs
        places = [e for step in range(first, first + 5) for e in sampler.epoch("normal", 2, step)]
        rows = [sampler.row(place).prompt for place in places]
        assert sorted(rows[:5]) == sorted(rows[5:]) == list("abcde")
