"""Read the rows of all sides, split them by prompt, and build the sequences of a step.

Everything here is a pure function of rows, options and tokenizer. The result does not depend on the number of
processes, on earlier draws, or on a resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np

from options import NORMAL_SHARES
from prompts.formatter import PromptFormatter
from prompts.windows import TextCutter
from sources.rows import Row, Source, read_sources, read_texts
from utils import UsageError, log

UNSEEN_SHARES = {"dev": 1 / 3, "test": 2 / 3}  # of --unseen_data: for the looks, for the evaluation


# ------------------------------------------------------------------------------------------------ splits
def _same(prompt: str) -> str:
    """Return a prompt without case and spacing. Two prompts that agree in it count as the same."""
    return " ".join(prompt.casefold().split())


def prompt_hash(prompt: str, salt: str = "") -> str:
    """Return a hash that names a prompt, so that the model's folder does not contain the forget prompts."""
    return hashlib.sha256(f"{salt}{_same(prompt)}".encode()).hexdigest()[:16]


def split_of(prompt: str, seed: int, dev_share: float, test_share: float) -> str:
    """Return 'train', 'dev' or 'test', from prompt, seed and shares: all rows of a prompt share a split."""
    digest = hashlib.sha256(f"{seed}\n{_same(prompt)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test_share else "dev" if place < test_share + dev_share else "train"


@dataclasses.dataclass(frozen=True)
class Shares:
    """Fractions of a side's prompts that are held out; with `keep_one`, one of a few is held back for the looks."""

    seed: int
    dev: float
    test: float
    keep_one: bool = False

    @classmethod
    def of(cls, side: str, options) -> Shares:
        """Return the shares of a side ("forget", "normal" or "unseen").

        By default, all forget rows train: what is listed shall be forgotten. Unseen rows never train.
        """
        default = {"forget": {"dev": 0.0, "test": 0.0}, "normal": NORMAL_SHARES, "unseen": UNSEEN_SHARES}[side]
        dev, test = (options.dev_share, options.test_share) if side != "unseen" else (None, None)
        return cls(options.seed, default["dev"] if dev is None else dev, default["test"] if test is None else test,
                   keep_one=side != "forget" and dev is None)  # fmt: skip

    def split_of(self, key: str) -> str:
        """Return the split of a prompt by its hash alone: all rows of a prompt share it, in every source."""
        return split_of(key, self.seed, self.dev, self.test) if self.dev or self.test else "train"


def split_rows(rows: list[Row], shares: Shares) -> dict[str, list[Row]]:
    """Return {split: rows}. If no row would be left for training (a source of a few rows), all rows are trained on."""
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        parts[shares.split_of(row.key)].append(row)
    if rows and not parts["train"] and shares.dev + shares.test < 1:
        log.warning("only %d rows: all are trained on, none is held out", len(rows))
        parts = {"train": list(rows), "dev": [], "test": []}
    if shares.keep_one and rows and not parts["dev"]:
        hold_one_back(parts)
    return parts


def hold_one_back(parts: dict[str, list[Row]]) -> None:
    """Move one prompt to the dev split: of the train split if another one stays there, else of the test split."""
    prompts = {split: {_same(row.key) for row in rows} for split, rows in parts.items()}
    taken_from = "train" if len(prompts["train"]) > 1 else "test"
    if prompts[taken_from] and (prompts["train"] or len(prompts["test"]) > 1):
        moved = min(prompts[taken_from], key=prompt_hash)
        parts["dev"] = [row for row in parts[taken_from] if _same(row.key) == moved]
        parts[taken_from] = [row for row in parts[taken_from] if _same(row.key) != moved]


def split_text(documents: list[Row], shares: Shares, cutter: TextCutter) -> dict[str, list[Row]]:
    """Return {split: passages} of a source of text.

    Documents are split whole. A document that is alone is split by blocks that do not overlap; its passages lie within
    consecutive blocks of one split, so that none shares a token with another split. Raises UsageError if no document
    has enough tokens for a passage.
    """
    passages = {document.key: cutter.cut(document) for document in documents}
    long_enough = [document for document in documents if passages[document.key]]
    if not long_enough:
        raise UsageError(f"{documents[0].document or documents[0].source}: holds too few tokens to train on")
    if short := len(documents) - len(long_enough):
        log.warning("%d texts have too few tokens to train on and are left out", short)
    if len({_same(key) for key in passages}) > 1:
        parts = split_rows(long_enough, shares)
        return {split: [passage for row in rows for passage in passages[row.key]] for split, rows in parts.items()}
    blocks = cutter.blocks(long_enough[0])
    parts = split_rows(blocks, shares)
    split_at = {block.start: split for split, rows in parts.items() for block in rows}
    cut: dict[str, list[Row]] = {split: [] for split in parts}
    for split, run in itertools.groupby(blocks, key=lambda block: split_at[block.start]):
        run_blocks = list(run)
        cut[split] += cutter.cut(long_enough[0], run_blocks[0].start, run_blocks[-1].end) * len(long_enough)
    return cut


def split_sources(
    sources: list[list[Row]], side: str, options, cutter: TextCutter | None = None
) -> list[dict[str, list[Row]]]:
    """Split each source of a side by prompt. Training and evaluation both call this, so they hold out the same prompts.

    `cutter`: cuts the sources of text into passages. A prompt or passage that one source trains on is held out from no
    other source, and a prompt that is held back for the looks from all.
    """
    shares = Shares.of(side, options)
    parts = [split_text(rows, shares, cutter) if rows and rows[0].is_text else split_rows(rows, shares)
             for rows in sources]  # fmt: skip
    if not (shares.dev or shares.test):
        return parts
    moved = {_same(row.key): split for part in parts for split in ("dev", "train") for row in part[split]
             if (split == "train" if row.is_text else shares.split_of(row.key) != split)}  # fmt: skip
    if not moved:
        return parts
    return [{split: [row for name, rows in part.items() for row in rows if moved.get(_same(row.key), name) == split]
             for split in part} for part in parts]  # fmt: skip


# ------------------------------------------------------------------------------------------- what is read
@dataclasses.dataclass
class Sides:
    """All sources of a run: prompts to forget, to retain, and those of the forgotten kind that never train."""

    forget: list[Source]
    normal: list[Source]
    unseen: list[Source]

    def rows(self, side: str) -> list[Row]:
        """Return all rows of a side."""
        return [row for source in getattr(self, side) for row in source.rows]


def read_sides(options) -> Sides:
    """Read every source that the options name; training and evaluation both call this.

    Raises UsageError for a prompt that would be forgotten and retained at once.
    """
    forget = read_sources(options.forget_data, "--forget_data", options.harm_categories, options.fields)
    normal = read_sources(options.normal_data, "--normal_data", fields=options.fields)
    unseen = read_sources(options.unseen_data, "--unseen_data", fields=options.fields)
    for of_side, side in ((forget, "forget"), (normal, "normal")):
        prompts = {source.spec for source in of_side}
        for text in read_texts(getattr(options, f"{side}_text"), f"--{side}_text", options.fields):
            if text.spec in prompts:  # its prompts are read too: a source of their own, which the figures tell apart
                text.spec += " (text)"
            of_side.append(text)
    sides = Sides([source for source in forget if source.rows], normal, unseen)
    give_wanted_answers(sides)
    refuse_overlap(sides.rows("forget"), sides.rows("normal"))
    leave_out_listed(sides)
    return sides


def give_wanted_answers(sides: Sides) -> None:
    """Resolve prompts that a labelled file gives to both sides: the safe answer becomes the forget row's wanted answer.

    A row that has a wanted answer keeps it. Raises UsageError if a normal source has no row left.
    """
    prompts = {_same(row.key) for row in sides.rows("forget")}
    for source in sides.normal:
        both = {_same(row.key): row.response for row in source.rows if row.labelled and _same(row.key) in prompts}
        if not both:
            continue
        source.rows = [row for row in source.rows if not row.labelled or _same(row.key) not in both]
        if not source.rows:
            raise UsageError(f"--normal_data {source.spec}: each of its {len(both)} prompts has an unsafe answer too, "
                             "so none is left to retain; name other normal data")  # fmt: skip
        source.notes.append(f"{len(both)} prompts have an unsafe answer too: their safe answers are wanted answers of "
                            "the forget rows, not normal rows")  # fmt: skip
        for other in sides.forget:
            other.rows = [
                row if row.wanted or _same(row.key) not in both
                else dataclasses.replace(row, wanted=both[_same(row.key)])
                for row in other.rows
            ]  # fmt: skip


def leave_out_listed(sides: Sides) -> None:
    """Leave out of the unseen sources what is trained on, and say so. Raises UsageError if a source has no row left."""
    trained = {_same(row.key) for row in sides.rows("forget") + sides.rows("normal")} if sides.unseen else set()
    for source in sides.unseen:
        kept = [row for row in source.rows if _same(row.key) not in trained]
        if not kept:
            raise UsageError(f"--unseen_data {source.spec}: each row is in --forget_data or --normal_data too")
        if len(kept) < len(source.rows):
            source.notes.append(f"{len(source.rows) - len(kept)} rows are in the forget or normal data too, so "
                                "they are not asked as unseen")  # fmt: skip
            source.rows = kept


def refuse_overlap(forget: list[Row], normal: list[Row]) -> None:
    """Raise UsageError, with the prompts, if a prompt is on both sides: it would be forgotten and retained at once."""
    normal_prompts = {_same(row.key) for row in normal}
    both = sorted({row.key for row in forget if _same(row.key) in normal_prompts})
    if both:
        shown = "; ".join(repr(prompt[:60]) for prompt in both[:5]) + (" ..." if len(both) > 5 else "")
        raise UsageError(
            f"{len(both)} prompts are in --forget_data and in --normal_data; remove them from one of the two: {shown}"
        )


def split_sides(sides: Sides, options, cutter: TextCutter) -> dict[str, list[dict[str, list[Row]]]]:
    """Return {"forget", "normal" or "unseen": the splits of each source}; `cutter` cuts texts into passages."""
    return {side: split_sources([source.rows for source in getattr(sides, side)], side, options, cutter)
            for side in ("forget", "normal", "unseen")}  # fmt: skip


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return at most `count` rows, one a prompt, in an order drawn from the seed."""
    one_a_prompt = list({row.key: row for row in rows}.values())
    order = np.random.default_rng([seed, 11]).permutation(len(one_a_prompt))[:count]
    return [one_a_prompt[i] for i in order]


# --------------------------------------------------------------------------------------------- sequences
@dataclasses.dataclass(frozen=True)
class Counterpart:
    """A sequence that the original is asked about in the place of a part of another one, or of all of it.

    `places`: for each token of that part of the continuation the place in `answer_ids` that stands for it, -1 for none.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One prompt and one continuation in tokens.

    `draw`: name of the draw that made it. `example_id`: number of its row within the step and side, over all
    processes. `targets`: the target at each place of the continuation, if it is not the continuation's own token.
    `counterparts`: what the original is asked about in its place, part after part; none if about the same. `telling`:
    for each token of the continuation, whether it carries what tells this answer from others (None: all do).
    """

    draw: str
    example_id: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    targets: tuple[int, ...] | None = None
    counterparts: tuple[Counterpart, ...] = ()
    telling: tuple[bool, ...] | None = None

    @property
    def original_places(self) -> tuple[int, ...]:
        """For each place of the continuation that in the original's continuations, one after the other, -1 for none."""
        if not self.counterparts:
            return tuple(range(len(self.answer_ids)))
        places, start = [], 0
        for other in self.counterparts:
            places += [start + place if place >= 0 else -1 for place in other.places]
            start += len(other.answer_ids)
        return tuple(places)

    def for_original(self) -> list[Sequence]:
        """Return the sequences that the original is asked about."""
        if not self.counterparts:
            return [self]
        return [Sequence(self.draw, self.example_id, other.prompt_ids, other.answer_ids) for other in self.counterparts]

    @property
    def length(self) -> int:
        """Number of tokens of prompt and continuation."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_sequence(draw: str, example_id: int, row: Row, formatter: PromptFormatter) -> Sequence:
    """Return a row and its response as a Sequence, in the formatter's own style."""
    answer = formatter.answer_of(row)
    return Sequence(draw, example_id, tuple(formatter.prompt_of(row)), tuple(answer))


def with_end(prefix: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Return a prefix with the token `end` after it, so that the last prefix token has a target too."""
    return prefix if prefix and prefix[-1] == end else (*prefix, end)


def make_eot_sequence(draw: str, example_id: int, prompt: tuple[int, ...], prefix, end: int) -> Sequence:
    """Return a prompt with a prefilled answer `prefix`. The target is end-of-turn after the prompt and after each
    prefix token."""
    answer = with_end(tuple(prefix), end)
    return Sequence(draw, example_id, prompt, answer, (end,) * len(answer))


def probe_sequences(prompts: list[str], formatter: PromptFormatter) -> list[Sequence]:
    """Return a few real prompts with two short answers each, so that trees branch: `check_packing` compares layouts."""
    texts = ("Yes, and this is why.", "It depends on the weather in spring.")
    return [make_sequence("probe", 0, Row(prompt, text), formatter) for prompt in prompts for text in texts]
