"""The files between the stages of an evaluation: what the models said, how it was judged, and what that comes to.

    answers/LABEL.jsonl   stage 1, a file a model: its answers, and what it says of given answers
    scores.jsonl          stage 2: a line a prompt, with the judges' labels and all measures
    report.json           stage 3

Each file of stages 1 and 2 carries a key, a hash of all that it depends on: whole weights, prompts as tokens, settings.
It is used again wherever the key is still the same, so a late failure loses nothing that was asked before it. Rows of
stage 1 carry keys of their own: where others were added, these alone are asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import torch
import transformers

from engine.processes import join_processes
from evaluation.paper import OwnScores
from evaluation.scoring import RowScores
from utils import log, read_json_lines, write_json, write_json_lines

VERSION = 2  # of these files
ASKED_BY = 1  # seed of evaluations of several runs, whatever theirs: all are asked the same prompts, in the same order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """What a model's answers depend on: `model`, its weights and how all are asked; `rows`, a list a group, and
    `holdout`, an entry a row; `texts`, those that all models are given."""

    model: str
    rows: list[list[str]]
    holdout: list[str]
    texts: str

    @property
    def whole(self) -> str:
        """The key of all that the model says."""
        return key_of(self.model, self.rows, self.holdout, self.texts)


@dataclasses.dataclass(kw_only=True)
class Record:
    """What one model said. answers and scores: a list a group, an entry a row; holdout: its scores of those rows.

    text_scores: of the texts that all models are given. keys: of all that it depends on; None: it is of no file.
    """

    label: str  # "before", "after" or "retrained"
    name: str
    weights: str | None
    answers: list[list[str]]
    scores: list[list[RowScores | None]]
    holdout: list[RowScores | None]
    text_scores: dict
    keys: Keys | None = None
    seconds: float = 0.0
    is_kept: bool = False  # read from an earlier evaluation, or some of it


@dataclasses.dataclass(kw_only=True)
class Known:
    """What a model said in an earlier evaluation, asked in the same way: (answer, scores) of rows and scores of holdout
    rows, by their keys; text_scores: None if other texts were given. key: of its file; seconds: that the newest answers
    in it took."""

    key: str = ""
    rows: dict[str, tuple[str, RowScores | None]] = dataclasses.field(default_factory=dict)
    holdout: dict[str, RowScores | None] = dataclasses.field(default_factory=dict)
    text_scores: dict | None = None
    seconds: float = 0.0

    def misses(self, keys: Keys) -> bool:
        """Return whether anything of these keys is not known."""
        return (self.text_scores is None or not set(keys.holdout) <= self.holdout.keys()
                or not all(set(of_group) <= self.rows.keys() for of_group in keys.rows))  # fmt: skip


def key_of(*parts) -> str:
    """Return a hash of values that JSON can hold."""
    versions = [VERSION, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([versions, *parts], sort_keys=True, default=str).encode()).hexdigest()


def may_reuse(options) -> bool:
    """Return whether files of an earlier evaluation may be used: several processes may not see the same files."""
    return not options.ask_again and join_processes().num_processes == 1


# ------------------------------------------------------------------------------------------------- stage 1
def write_record(folder: Path, record: Record) -> None:
    """Write a model's answers and scores: a first line with the key, then a line a row."""
    keys = record.keys
    header = {"key": keys.whole, "model_key": keys.model, "text_key": keys.texts, "text_scores": record.text_scores,
              **{name: getattr(record, name) for name in ("label", "name", "weights", "seconds")},
              "groups": [len(answers) for answers in record.answers],
              "holdout": [{"key": key, "scores": _plain(scores)}
                          for key, scores in zip(keys.holdout, record.holdout, strict=True)]}  # fmt: skip
    rows = [{"key": key, "answer": answer, "scores": _plain(scores)}
            for group in zip(keys.rows, record.answers, record.scores, strict=True)
            for key, answer, scores in zip(*group, strict=True)]  # fmt: skip
    write_json_lines(folder / "answers" / f"{record.label}.jsonl", [header, *rows])


def take_answers(earlier: Path, folder: Path, labels: tuple[str, ...] = ("before", "retrained")) -> None:
    """Copy what some models said from an earlier report's folder to one that has not asked them yet.

    For runs that are evaluated alike: the models that they share are then asked once. The files carry their keys, so of
    what is asked in another way nothing is read.
    """
    for label in labels:
        source, target = (of / "answers" / f"{label}.jsonl" for of in (earlier, folder))
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def read_known(folder: Path, label: str, keys: Keys) -> Known:
    """Return what a model's file holds of what is asked in the same way; nothing if it is not there, or cut short."""
    try:
        header, *rows = read_json_lines(folder / "answers" / f"{label}.jsonl")
        if header["model_key"] != keys.model or len(rows) != sum(header["groups"]):
            return Known()
        known = Known(
            key=header["key"],
            rows={row["key"]: (row["answer"], _scores(row["scores"])) for row in rows},
            holdout={row["key"]: _scores(row["scores"]) for row in header["holdout"]},
            text_scores=header["text_scores"] if header["text_key"] == keys.texts else None,
            seconds=header["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Known()
    asked = [key for of_group in keys.rows for key in of_group]
    new = sum(key not in known.rows for key in asked)
    if new < len(asked):
        log.info("answers of the model %s unlearning: as they stand in %s%s", label, folder / "answers",
                 f", but for {new} of {len(asked)} rows" if new else "")  # fmt: skip
    return known


def write_own(folder: Path, own: dict[str, list[list[OwnScores | None]]], key: str) -> None:
    """Write what the original says of every model's answers."""
    rows = [{"model": label, "own": [[_plain(scores) for scores in group] for group in of_model]}
            for label, of_model in own.items()]  # fmt: skip
    write_json_lines(folder / "answers" / "under_original.jsonl", [{"key": key}, *rows])


def read_own(folder: Path, key: str) -> dict[str, list[list[OwnScores | None]]] | None:
    """Return what the original says of every model's answers, by model, if the file is of this key."""
    try:
        header, *rows = read_json_lines(folder / "answers" / "under_original.jsonl")
        if header["key"] != key:
            return None
        return {row["model"]: [[own and OwnScores(**own) for own in group] for group in row["own"]] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(value) -> dict | None:
    """Return a dataclass as JSON holds it."""
    return None if value is None else dataclasses.asdict(value)


def _scores(value: dict | None) -> RowScores | None:
    """Return the scores of a row from their JSON."""
    return None if value is None else RowScores.read(value)


# ------------------------------------------------------------------------------------------- stage 2 and attacks
def write_keyed(path: Path, lines: list[dict], key: str, about=None) -> None:
    """Write the lines of a later stage. Their key, and what else is to be known of them, lies in answers/, so that each
    line of the file itself is a row."""
    _key_file(path).unlink(missing_ok=True)  # lines and key must not be of two evaluations if this is cut short
    write_json_lines(path, lines)
    write_json(_key_file(path), {"key": key, "lines": len(lines), "about": about})


def read_keyed(path: Path, key: str) -> tuple[list[dict], object] | None:
    """Return the lines of a later stage, and what `write_keyed` was told about them, if they are of this key."""
    try:
        kept = json.loads(_key_file(path).read_text(encoding="utf-8"))
        lines = read_json_lines(path) if kept["key"] == key else []
        return (lines, kept["about"]) if len(lines) == kept["lines"] and kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def code_hash(*paths: Path) -> str:
    """Return a hash of source files and folders: what a change of them gives anew."""
    files = sorted({file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))})
    return key_of([file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".txt", ".yaml")])


def _key_file(path: Path) -> Path:
    """Return where the key of a stage's file lies: in answers/, so that the report's own folder holds what is read."""
    return path.parent / "answers" / f"{path.stem}.key.json"
