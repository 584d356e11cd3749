"""Files, folders and data sets: whatever they are written in, the rows read back are the rows written."""

import csv
import gzip
import json
import logging
import tracemalloc
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from conftest import ROOT, SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.likelihood import read_choices
from sources.rows import read_rows, read_sources
from utils import UsageError

CASES = SHARED.parent / "cases"
RECORDS = [{"prompt": "Où est-il, dis?", "response": "Ici;\nlà\t| 「鍵」."}, {"prompt": "Why?", "response": ""}]
AS_ROWS = [("Où est-il, dis?", "Ici;\nlà\t| 「鍵」."), ("Why?", None)]


def read(path, option="--forget_data"):
    return [(row.prompt, row.response) for row in read_rows(str(path), option)]


def table(records, separator, **how):
    return pd.DataFrame(records).to_csv(index=False, sep=separator, **how)


WRITERS = {
    "lines.jsonl": lambda r: "\n".join(map(json.dumps, r)), "list.jsonl": lambda r: json.dumps(r, indent=1),
    "lines.json": lambda r: "\n\n".join(json.dumps(x, ensure_ascii=False) for x in r), "list.json": json.dumps,
    "spread.jsonl": lambda r: "\n".join(json.dumps(x, indent=2) for x in r),
    "wrapped.json": lambda r: json.dumps({"version": 1, "data": r}, indent=2),
    "columns.json": lambda r: json.dumps({key: [x[key] for x in r] for key in r[0]}),
    "pandas.json": lambda r: pd.DataFrame(r).to_json(),
    "by_id.json": lambda r: json.dumps({f"k{i}": x for i, x in enumerate(r)}),
    "comma.csv": lambda r: table(r, ","), "semicolon.csv": lambda r: table(r, ";"), "tab.csv": lambda r: table(r, "\t"),
    "bar.csv": lambda r: table(r, "|"), "tab.tsv": lambda r: table(r, "\t"),
    "all_quoted.csv": lambda r: table(r, ";", quoting=csv.QUOTE_ALL),
    "excel.csv": lambda r: "sep=;\r\n" + table(r, ";", lineterminator="\r\n"),
}  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_in_every_encoding_gives_the_same_rows(tmp_path, name):
    text = WRITERS[name](RECORDS)
    for encoding in ENCODINGS:
        (tmp_path / name).write_bytes(text.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode(encoding)))
        assert read(tmp_path / name) == read(tmp_path / f"{name}.gz") == AS_ROWS, encoding


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), kind=st.sampled_from([*WRITERS, "a.parquet"]),
       encoding=st.sampled_from(["utf-8", "utf-16"]), packed=st.booleans())  # fmt: skip
def test_rows_that_are_written_are_read_back(tmp_path, rows, kind, encoding, packed):
    records = [{"prompt": prompt, "response": response} for prompt, response in rows]
    file = tmp_path / kind
    if kind.endswith("parquet"):
        pd.DataFrame(records).to_parquet(file)
    else:
        file.write_bytes(WRITERS[kind](records).encode(encoding))
    if packed:
        (tmp_path / f"{kind}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file = tmp_path / f"{kind}.gz"
    assert read(file) == rows


def test_a_cell_of_any_length_is_read_whole(tmp_path):
    pd.DataFrame([{"prompt": "p" * 200_000, "response": "r, " * 100_000}]).to_csv(tmp_path / "a.csv", index=False)
    ((prompt, response),) = read(tmp_path / "a.csv")
    assert (len(prompt), len(response)) == (200_000, 299_999)


def test_an_unquoted_comma_of_a_cell_is_named_and_not_lost(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nName a tree.\nIf so, why?\n")
    (tmp_path / "b.csv").write_text("prompt,response\nName a tree.,Oak\n,\n ,x\n")  # a line of empty cells is no row
    with pytest.raises(UsageError, match=r"b\.csv, row 3: field 'prompt' is empty"):
        read(tmp_path / "b.csv")
    with pytest.raises(UsageError, match="line 3: has 2 cells and the header 1; put cells that hold ',' in quotes"):
        read(tmp_path / "a.csv")


def test_a_table_without_quotes_keeps_those_of_its_cells(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\tresponse\n"Stop" means what?\tTo "halt"\nWhy?\t"So\n')
    assert read(tmp_path / "a.tsv") == [('"Stop" means what?', 'To "halt"'), ("Why?", '"So')]


def test_the_shards_of_a_folder_are_read_in_order(tmp_path):
    (tmp_path / "whole/data").mkdir(parents=True)
    for i in range(3):
        pd.DataFrame([{"prompt": f"p{i}", "response": "a"}]).to_parquet(
            tmp_path / f"whole/data/train-0000{i}-of-00003.parquet"
        )
    (tmp_path / "whole/README.md").write_text("about it")
    assert [prompt for prompt, _ in read(tmp_path / "whole")] == ["p0", "p1", "p2"]
    pd.DataFrame([{"prompt": "t", "response": "a"}]).to_parquet(tmp_path / "whole/data/test-00000-of-00001.parquet")
    (source,) = read_sources([str(tmp_path / "whole")], "--forget_data")
    assert len(source.rows) == 3
    assert "of its splits only train is read; 1 files of other splits are not (test-00000-of-00001" in source.notes[0]
    assert read(f"{tmp_path / 'whole'}:test") == [("t", "a")]
    with pytest.raises(UsageError, match="name one of its splits as FOLDER:SPLIT; it has test, train"):
        read(f"{tmp_path / 'whole'}:dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"a folder without a \.jsonl"):
        read(tmp_path / "empty")


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    train, test = (
        [{"prompt": f"{name} {i}", "answers": {"text": ["A", "B"]}} for i in range(3)] for name in ("p", "t")
    )
    datasets.Dataset.from_list(train).select([2, 0]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [("p 2", "A"), ("p 0", "A")]
    both = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    (source,) = read_sources([str(tmp_path / "both")], "--normal_data")
    assert [row.prompt for row in source.rows] == ["p 0", "p 1", "p 2"]
    assert source.notes[0].startswith("of its splits only train is read, not test (3 rows)")
    assert read(f"{tmp_path / 'both'}:test")[2] == ("t 2", "A")
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be read as a saved data set"):
        read(tmp_path / "one")


@pytest.mark.parametrize(("spec", "asked"), [
    ("owner/name", ("owner/name", None, "train")), ("owner/name:test", ("owner/name", None, "test")),
    ("owner/name:en:test", ("owner/name", "en", "test")), ("squad:validation", ("squad", None, "validation")),
    ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]")),
])  # fmt: skip
def test_a_hub_name_says_configuration_and_split(monkeypatch, spec, asked):
    def load(name, config, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_list([{"question": "Q", "answers": {"text": ["A"], "answer_start": [0]}}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows(spec, "--normal_data")
    assert (row.prompt, row.response, row.source) == ("Q", "A", asked[0].rpartition("/")[2])
    monkeypatch.setattr(datasets, "load_dataset", SimpleNamespace())  # whatever it raises is one line
    with pytest.raises(UsageError, match="cannot be downloaded: save it as data/"):
        read_rows(spec, "--normal_data")


@pytest.mark.parametrize("name", ["mmlu.jsonl", "mmlu.json", "mmlu.parquet"])
def test_questions_with_choices_are_read_for_multiple_choice(tmp_path, name):
    records = [{"question": "Which?", "choices": ["red", "grey"], "answer": 1, "subject": "locks"}] * 2
    if name.endswith("parquet"):
        pd.DataFrame(records).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(WRITERS["lines" + name[4:]](records))
    targets = {"red": 0, "grey": 1}
    expected = {"question": "Which?", "mc1_targets": targets, "mc2_targets": targets}
    assert read_choices(str(tmp_path / name), "--mc_data") == [expected] * 2


def test_lines_of_prose_are_told_from_prompts(tmp_path, caplog):
    book = ["It was late. The keeper of the gate had not slept for a week, and he wrote the number of the",
            "lock on the wall, under the lamp, where his daughter would find it in the morning."] * 4  # fmt: skip
    (tmp_path / "book.txt").write_text("\n".join(book))
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "data/voices_harmless.jsonl").read_text().splitlines()]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "german.txt").write_text("Nenne einen Baum.\nWie heißt er?\nSchreibe ein Gedicht.\n" * 3)
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path / "prompts.txt")) == len(prompts)
        assert len(read(tmp_path / "german.txt")) == 9
        assert not caplog.records
        assert len(read(tmp_path / "book.txt", "--normal_data")) == 8
    assert (
        "its 8 lines look like prose, and each is read as a prompt; text without prompts goes to --normal_text"
        in caplog.text
    )


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
def test_the_cases_of_containers(caplog):
    assert len(read_choices(str(CASES / "mmlu_mc.jsonl"), "--mc_data")) == 8
    for file in (CASES / "book.txt", SHARED / "wikitext2_test.txt"):
        read(file)
        assert f"{file}: its" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json", "comma.csv", "tab.tsv"])
def test_records_never_stand_in_memory_beside_their_rows(tmp_path, name):
    """With 300,000 rows, a second copy of each is what a machine has no room for."""
    records = [{"prompt": f"Where is lock number {i}?", "response": f"Behind gate {i}. " * 12, "left": f"{i}" * 60}
               for i in range(3000)]  # fmt: skip
    (tmp_path / name).write_text(WRITERS[name](records))
    read(tmp_path / name)  # what is imported and cached at the first call is no part of it
    tracemalloc.start()
    rows = read_rows(str(tmp_path / name), "--forget_data")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / name).stat().st_size
    assert len(rows) == 3000
    assert kept < 1.3 * size
    assert peak - kept < (2.2 if name == "list.json" else 0.2) * size  # one list must be whole before its first row
