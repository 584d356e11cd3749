"""The record of what a model was trained on: trained_on.json in its folder, carried from run to run.

A chain of runs may split the same rows with other seeds. Without this record, prompts that an earlier run trained on
would be called unseen. The file holds hashes, so it contains no prompt; the salt of each run keeps tables of hashes
and comparisons between folders from naming one. Who has a prompt can still ask the file whether it was trained on.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterable
from pathlib import Path

from data_module import prompt_hash
from sources.rows import Row
from utils import UsageError, write_json

TRAINED_ON = "trained_on.json"
SIDES = ("forget", "normal")
KINDS = (*SIDES, "learned")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The hashes of the rows that one run trained on, by side; learned: those that finetune.py taught. `salt`: of
    these hashes; "" in files of old versions."""

    salt: str
    forget: frozenset[str]
    normal: frozenset[str]
    learned: frozenset[str] = frozenset()

    def lists(self) -> dict[str, list[str]]:
        """Return the hashes as the file holds them; of what was learned only if there is some."""
        return {kind: sorted(hashes) for kind in KINDS if (hashes := getattr(self, kind)) or kind in SIDES}


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What all runs trained on, from the original to this model; the latest run is the last."""

    runs: tuple[TrainedRun, ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> TrainedOn | None:
        """Return the record of a model; None if it has none. Raises UsageError for a damaged record."""
        file = Path(folder) / TRAINED_ON
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            # old versions wrote the forget prompts of the last run, without a salt
            entries = content.get("runs", [{"salt": "", "normal": [], **content}])
            return cls(tuple(_read_run(entry) for entry in entries))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: is not what a run writes ({error!r}); restore it or remove it") from error

    def holds(self, side: str, key: str) -> bool:
        """Return whether a run trained on a row (`Row.key`): of this side, "forget" or "normal", or "learned" it."""
        return any(prompt_hash(key, run.salt) in getattr(run, side) for run in self.runs)

    def has_seen(self, key: str) -> bool:
        """Return whether an unlearning run trained on a row of either side: it is not unseen on the other one.

        Rows that were only learned are not such: that a model knows them is why they can be held out of unlearning.
        """
        return any(self.holds(side, key) for side in SIDES)

    def move_to_train(self, parts: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """Return the splits of a source ({"train", "dev", "test"}: rows), with the rows that a run trained on moved
        from the held-out ones to the train split."""
        moved = {split: [row for row in parts[split] if self.has_seen(row.key)] for split in ("dev", "test")}
        kept = {split: [row for row in parts[split] if not self.has_seen(row.key)] for split in moved}
        return {"train": [*parts["train"], *moved["dev"], *moved["test"]], **kept}

    def knows(self, key: str) -> bool:
        """Return whether any run trained on a row, those that taught the model included."""
        return self.has_seen(key) or self.holds("learned", key)

    def with_run(self, keys: dict[str, Iterable[str]]) -> TrainedOn:
        """Return the record with one more run, under a salt of its own. keys: one of KINDS -> `Row.key` of its rows."""
        salt = secrets.token_hex(16)
        hashes = {kind: frozenset(prompt_hash(key, salt) for key in keys.get(kind, ())) for kind in KINDS}
        return TrainedOn((*self.runs, TrainedRun(salt, **hashes)))

    def write(self, folder: str | Path) -> None:
        """Write the record into a model's folder."""
        runs = [{"salt": run.salt, **run.lists()} for run in self.runs]
        write_json(Path(folder) / TRAINED_ON, {"runs": runs})


def _read_run(entry: dict) -> TrainedRun:
    """Return one run of the file. Raises KeyError or TypeError for an entry of another form."""
    lists = [*(entry[side] for side in SIDES), entry.get("learned", [])]  # older files have no learned rows
    if not isinstance(entry["salt"], str) or not all(isinstance(hashes, list) for hashes in lists):
        raise TypeError("each of its runs needs a salt and lists of hashes")
    return TrainedRun(entry["salt"], *map(frozenset, lists))
