"""Whatever a file holds and whatever a number is: rows, or one line that names the place; never a traceback."""

import dataclasses
import gzip
import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import one_line_error, run_cli, tiny_model, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_data import formatter
from transformers import AutoModelForSequenceClassification

from command_line import parse
from data_module import Shares, split_rows
from evaluation.options import EvaluateOptions
from options import UnlearnOptions
from sources.fields import CHOICE_FIELDS, PROMPT_FIELDS, RESPONSE_FIELDS, TALK_FIELDS
from sources.rows import FILE_KINDS, Row, read_rows, read_texts
from utils import UsageError, load_model

TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]),
                                        "content": st.text(max_size=5) | st.none()}), max_size=4)  # fmt: skip
OBJECTS = st.dictionaries(
    st.sampled_from(["text", "value", "label", "x"]), st.lists(st.text(max_size=3)) | st.text(max_size=3)
)
VALUES = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | TURNS
          | st.lists(st.text(max_size=3)) | OBJECTS)  # fmt: skip
KEYS = st.sampled_from(
    [
        *PROMPT_FIELDS,
        *RESPONSE_FIELDS,
        *CHOICE_FIELDS,
        *TALK_FIELDS,
        "category",
        "id",
        "is_response_0_safe",
        "response_0",
        "is_safe",
        "chosen",
        "rejected",
        "wanted",
        "context",
        "history",
        "system",
        "text",
        "x",
    ]
)
RECORDS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=6)


def as_json_lines(records):
    return "\n".join(json.dumps(r) for r in records).encode("utf-8", "surrogatepass")


CONTENTS = (
    st.binary(max_size=200)
    | RECORDS.map(as_json_lines)
    | RECORDS.map(lambda r: json.dumps(r, indent=1).encode())
    | st.dictionaries(KEYS, VALUES | RECORDS, max_size=3).map(lambda r: json.dumps(r).encode())  # wrapped, columns
    | st.tuples(RECORDS.map(as_json_lines), st.integers(0, 200)).map(lambda t: t[0][: t[1]])  # cut
    | st.text(max_size=200).map(lambda t: t.encode("utf-16"))  # in another encoding
    | st.lists(st.lists(st.text(max_size=8), max_size=4).map(",".join), max_size=6).map(
        lambda lines: "\n".join(["prompt,response", *lines]).encode("utf-8", "replace"))
    | st.integers(1, 5000).map(lambda n: b"[" * n)  # nested deeper than a parser goes
)  # fmt: skip


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS, kind=st.sampled_from(FILE_KINDS), packed=st.booleans(),
       option=st.sampled_from(["--forget_data", "--normal_data", "--forget_text"]))  # fmt: skip
def test_any_file_gives_rows_or_one_line(tmp_path, content, kind, packed, option):
    file = tmp_path / f"some{kind}{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content) if packed else content)
    refused = None
    try:
        is_text = option == "--forget_text"
        rows = read_texts([str(file)], option)[0].rows if is_text else read_rows(str(file), option)
    except UsageError as error:
        refused, rows = str(error), []
    assert rows if refused is None else (str(file) in refused and "\n" not in refused)
    for row in rows:
        assert isinstance(row, Row)
        assert row.is_text or row.prompt.strip() == row.prompt != ""
        row.prompt.encode()
        assert row.response is None or row.response.encode()
        assert all(isinstance(text, str) and text for text in (*row.true_answers, *(text for _, text in row.earlier)))


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": None}, "row 2: field 'prompt' must be text, got NoneType"),
    ({"prompt": " "}, "row 2: field 'prompt' is empty"),
    ({"prompt": 7}, "row 2: field 'prompt' must be text, got int"),
    ({"promt": "x"}, "row 2: has no prompt field (prompt, question, instruction, goal, query, ...), only promt; name "
                     "it with --fields prompt=NAME"),
    ({"prompt": "x", "response": 7}, "row 2: field 'response' must be text, got int"),
    ({"prompt": "x", "response": ["a", 7]}, "row 2: field 'response' must be text, got int"),
    ({"prompt": "\ud800"}, "row 2: field 'prompt' holds half a character"),
    ("x", "row 2: must be an object with fields, got 'x'"),
    ({"text": "x"}, "row 2: has 'text' and no prompt; text without prompts goes to --forget_text"),
    ({"messages": "x"}, "row 2: field 'messages' must be a list of turns, each with role and content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "row 2: turn 1 of 'messages' has the role 'tool'; only system"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "row 2: field 'messages' has no user turn with text"),
    ({"question": "x", "choices": ["a"], "answer": "B"}, "row 2: field 'answer' is 'B', which is none of its"),
    ({"chosen": "a"}, "row 2: field 'chosen' must be a list of turns"),
])  # fmt: skip
def test_the_row_and_the_field_are_named(tmp_path, record, message):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"prompt": "fine"}, record])))
    with pytest.raises(UsageError) as error:
        read_rows(str(file), "--forget_data")
    assert f"--forget_data {file}, {message}" in str(error.value)


def test_a_missing_answer_in_a_parquet_file_is_no_answer(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["yes", None]}), tmp_path / "a.parquet")
    assert [row.response for row in read_rows(str(tmp_path / "a.parquet"), "x")] == ["yes", None]


def numeric(options_class):
    """(name, default) of every option whose default is a number."""
    return [(f.name, f.default) for f in dataclasses.fields(options_class)
            if isinstance(f.default, int | float) and not isinstance(f.default, bool)]  # fmt: skip


@pytest.mark.parametrize("options_class", [UnlearnOptions, EvaluateOptions])
def test_no_number_is_taken_that_is_none(options_class, capsys):
    """Each numeric option refuses text, NaN, infinity and a negative number, with 2 and one line that names it."""
    names = numeric(options_class)
    assert len(names) > 8
    for name, default in names:
        for bad in ("nan", "inf", "-1", "-1e30", "two", ""):
            with pytest.raises(SystemExit) as stop:
                parse(options_class, [f"--{name}={bad}"])
            assert stop.value.code == 2
            line = capsys.readouterr().err
            assert f"--{name}" in line
            assert line.count("\n") == 1
        found = getattr(parse(options_class, [f"--{name}={default}"]), name)
        assert math.isfinite(found)
        assert found == default


def test_a_prompt_longer_than_the_context_is_cut_inside_the_users_text():
    e = formatter("opt")
    config = tiny_model("opt").config  # 512 places
    e.fit(config, 100)
    ids = e.prompt("word " * 2000 + "the end?")
    assert 408 < len(ids) <= 412  # the beginning of what is left may be other tokens than before
    assert e.tokenizer.decode(ids).startswith("</s>### Question: ")
    assert e.tokenizer.decode(ids).endswith("the end?\n ### Answer:")
    assert len(e.cut) == 1
    with pytest.raises(UsageError, match="leave no room in the model's context of 512"):
        e.fit(config, 500)


@pytest.mark.parametrize(("words", "message"), [
    (["--set=mismatch.answers=200"], "mismatch.answers 200: the normal data holds only"),
    (["--model_name=."], "model .: not a model folder (it has no config.json)"),
    (["--max_answer_tokens=600"], "answers of 600 tokens leave no room"),
])  # fmt: skip
def test_what_only_shows_with_the_model(tmp_path, model_folders, data_files, words, message):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--forget_data", data_files["forget"],
                  "--normal_data", data_files["facts"], "--model_save_dir=out", *words, cwd=tmp_path,
                  quiet=True)  # fmt: skip
    assert message in one_line_error(run)
    assert not (tmp_path / "out").exists()


def test_one_row_is_enough(tmp_path, model_folders, data_files):
    """A data set of one row: it is trained on, whatever split its words would give it."""
    for i in range(20):
        assert [len(p) for p in split_rows([Row(f"p {i}")], Shares(1, 0.1, 0.2)).values()] == [1, 0, 0]
    (tmp_path / "one.jsonl").write_text('{"prompt": "How do I pick this lock?"}\n')
    run = run_cli(
        "unlearn_harm.py", f"--model_name={model_folders['llama']}", "--forget_data=one.jsonl", "--normal_data",
        data_files["facts"], "--model_save_dir=out", "--log_file=out.log", "--max_unlearn_steps=2", "--save_every=0",
        "--max_answer_tokens=8", "--dtype=fp32", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "forget one.jsonl: rows: 0 with an answer, 1 without" in run.stderr
    assert "; 1 train, 0 held out" in run.stderr


def test_a_model_that_is_not_whole_is_refused(tmp_path, model_folders):
    """transformers draws a missing tensor at random: the rest of the folder would be judged as a model that forgot."""
    folder = shutil.copytree(model_folders["llama"], tmp_path / "m")
    tensors = weights(folder)
    name = next(n for n in tensors if "up_proj" in n)
    for change, message in (
        ({f"module.{n}": t for n, t in tensors.items()}, "tensors of LlamaForCausalLM are missing"),
        ({n: t for n, t in tensors.items() if n != name}, f"1 tensors of .*{name}"),
        (tensors | {name: tensors[name] * float("nan")}, f"holds weights that are not finite .{name}"),
    ):
        save_file(change, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UsageError, match=message):
            load_model(str(folder))
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=f"1 tensors of .*another shape .*{name}"):
        load_model(str(folder))
    whole = (model_folders["llama"] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(folder))
    with pytest.raises(UsageError, match="score"):  # a judge without its head
        load_model(str(model_folders["llama"]), kind=AutoModelForSequenceClassification)


def test_a_pickle_is_loaded_only_where_it_is_asked_for(tmp_path, model_folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    for file in model_folders["llama"].iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / file.name)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"holds its weights as a pickle \(pytorch_model.bin\)"):
        load_model(str(tmp_path))
    loaded = load_model(str(tmp_path), allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
