"""The file of a run's neighbours (--make_neighbours): where it lies, when the model is asked for it, when it is read.

It lies beside the log and holds prompts alone, in the form that --normal_data reads, so that a user can edit it before
the training. The run then reads it as one more file of normal rows. Its name holds a hash of what it was made for: a
file that is there is used as it is, and other forget rows get another file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from data_module import Sides, read_sides
from engine.processes import broadcast_from_main
from options import UnlearnOptions
from run.neighbours import Made, make_neighbours
from run.writer import writer
from utils import UsageError, log, read_json_lines, write_json_lines


@dataclasses.dataclass
class Neighbours:
    """The prompts beside the forget set that a run retains. path: their file; note: where they come from, in words;
    few: whether fewer were made than asked for."""

    path: Path
    prompts: list[str]
    note: str
    few: bool = False

    def plan_lines(self) -> list[str]:
        """Return what the dry run prints of them."""
        return [f"neighbours, {len(self.prompts)} prompts that are to stay ({self.note}):",
                *(f"  {prompt}" for prompt in self.prompts),
                f"to change them, edit {self.path}: a run with the same --make_neighbours and forget rows reads it as "
                "it is; or give a file of your own as --normal_data"]  # fmt: skip

    def warn(self, asked: int) -> None:
        """Log if there are fewer than were asked for."""
        if self.few:
            log.warning("--make_neighbours %d: only %d could be made; list more forget prompts, or add lines "
                        '{"prompt": ...} to %s', asked, len(self.prompts), self.path)  # fmt: skip


def add_neighbours(options: UnlearnOptions, sides: Sides, tokenizer, device: torch.device) -> tuple[Sides, Neighbours]:
    """Return the sides with the neighbours as one more normal source, and the neighbours; `options.normal_data` names
    their file from here on, for checkpoints, the manifest and the evaluation.

    Asks the model if there is no file. Raises UsageError if no forget row is a prompt, or if none could be made.
    """
    prompts = list(dict.fromkeys(row.prompt for row in sides.rows("forget") if not row.is_text))
    if not prompts:
        raise UsageError("--make_neighbours: the forget rows are text, which has no prompts beside it; leave the "
                         "option out, or name prompts with --forget_data")  # fmt: skip
    path = neighbours_path(options, prompts)
    rows = broadcast_from_main(_read(path))
    if rows is not None:
        note, few = "read from this file, which was there; delete it to have others made", False
    else:
        others = [row.prompt for row in sides.rows("normal") if not row.is_text]
        made = ask_model(options, prompts, others, tokenizer, device)
        if not made.prompts:
            raise UsageError(f"--make_neighbours {options.make_neighbours}: the model wrote none that could be kept "
                             f"({made.written} written, {made.too_close} too close to the forget rows, {made.repeats} "
                             'repeats); write some lines {"prompt": ...} yourself and give them as '
                             "--normal_data")  # fmt: skip
        note, few = made.note(options.make_neighbours), len(made.prompts) < options.make_neighbours
        rows = [{"prompt": prompt} for prompt in made.prompts]
    if not path.is_file():  # also where another process has another disk
        write_json_lines(path, rows)
    if str(path) not in options.normal_data:
        options.normal_data.append(str(path))
    sides = read_sides(options)
    source = next(source for source in sides.normal if source.spec == str(path))
    source.notes.append(note)
    return sides, Neighbours(path, [row.prompt for row in source.rows], note, few)


def neighbours_path(options: UnlearnOptions, prompts: list[str]) -> Path:
    """Return where the neighbours of these forget prompts lie, as many as are asked for, of this model and seed."""
    settings = [sorted(prompts), options.make_neighbours, options.seed, options.model_name]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    log_file = Path(options.log_file)
    return log_file.with_name(f"{log_file.name.removesuffix('.log')}.neighbours-{key}.jsonl")


def _read(path: Path) -> list | None:
    """Return the lines of a file, None if there is none. Raises UsageError for lines that are no JSON."""
    try:
        return read_json_lines(path) if path.is_file() else None
    except ValueError as error:
        raise UsageError(f"--make_neighbours: {path} is there and holds a line that is no JSON ({error}); mend it, or "
                         "delete it to have others made") from error  # fmt: skip


def ask_model(options: UnlearnOptions, prompts: list[str], others: list[str], tokenizer, device: torch.device) -> Made:
    """Load the model, let it write the neighbours of the forget prompts, and let go of it again.

    The rows must be known before the run's model is laid out for them.
    """
    if options.shard:
        raise UsageError("--make_neighbours: does not go with --shard, since the model is asked on one device; make "
                         "them with --dry_run and without --shard first: this run reads their file")  # fmt: skip
    with writer(options, tokenizer, device, "neighbours") as answer:
        return make_neighbours(prompts, others, options.make_neighbours, options.seed, answer)
