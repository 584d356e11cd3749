"""The rows of an attack: forgotten prompts or passages, and examples that an adversary shows, teaches or compares.

An attack sees the unlearned model, never its answers; where it needs harmful text, it takes the original's answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

from data_module import prompt_hash, sample
from engine.generation import generate
from engine.trained_on import TrainedOn
from evaluation.attacks import ATTACKS
from evaluation.attacks.base import AskedRow, AttackConfig, AttackData, RelearnSet
from evaluation.groups import Group, free_name, trained_rows, unseen_groups
from prompts.formatter import PromptFormatter
from prompts.windows import Passage, whole
from sources.rows import Row, read_sources
from utils import UsageError, log


@dataclasses.dataclass(frozen=True)
class Said:
    """What a row's judge calls an answer, and whether that gives what was asked for; None: it says nothing of it."""

    label: str
    given: bool | None


Judge = Callable[[list[AskedRow], list[str]], list[Said]]  # what each row's deciding judge says of the answer to it

FORGOTTEN = "forgotten rows"
FEWEST_TAUGHT = 4  # with fewer other forgotten rows, half of the attacked ones are taught
DRAWN = 1.5  # examples drawn for each one used: some get no answer from the original


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What attacks ask: prompts, and passages of text. not_attacked: names of the forget groups that none asks."""

    rows: list[AskedRow]
    not_attacked: list[str]

    def summary(self) -> dict:
        """Return report.json's `attacked`."""
        return {"rows": len(self.rows), "not_attacked": self.not_attacked}


def forgotten_rows(
    lines: list[dict], groups: list[Group], style: str, count: int, seed: int, attacks: list[str]
) -> Forgotten:  # fmt: skip
    """Return at most `count` forgotten prompts, and as many passages: unseen, given before and not after, as the
    deciding judges say.

    lines: those of scores.jsonl; groups: whose rows they are; attacks: those that are asked for. Prompts are drawn from
    all their groups evenly, and passages from all documents together, since what holds for one group need not hold for
    another. No two passages share a token.
    """
    rows = {(group.name, row.prompt, row.response, row.earlier): row for group in groups for row in group.rows}
    judged = [line for line in lines if line["side"] == "forget" and line["counts"]]
    texts = [line for line in judged if line.get("text")]
    prompts = _forgotten([line for line in judged if not line.get("text") and line["style"] == style], rows)
    chosen = [prompts[row.key] for row in draw_evenly(list(prompts.values()), count, seed)]
    names = list(dict.fromkeys(line["group"] for line in texts))
    if attacks and names and not any(ATTACKS[name].takes_text for name in attacks):
        log.warning("attacks: not on %s: none of those asked for reads text", ", ".join(names))
        return Forgotten(chosen, names)
    passages = _forgotten(texts, rows)
    drawn = apart(sample([asked.row for asked in passages.values()], len(passages), seed))
    return Forgotten([*chosen, *(passages[row.key] for row in drawn[:count])], [])


def _forgotten(lines: list[dict], rows: dict[tuple, Row]) -> dict[str, AskedRow]:
    """Return {key: row} of those lines of unseen groups that were given before and are not after. rows: by group,
    prompt, reference and earlier turns; a prompt gets the original's answer as its response, and keeps all else that
    its judge reads, such as the wrong answers beside its own."""
    unseen, found = unseen_groups(line["group"] for line in lines), {}
    for line in lines:
        if line["group"] in unseen and line["before"]["answered"] and line["after"]["answered"] is False:
            earlier = tuple(map(tuple, line.get("earlier", ())))
            row = rows[line["group"], line["prompt"], line["reference"], earlier]
            if not row.is_text:
                row = dataclasses.replace(row, response=line["before"]["answer"], complete=True)
            found[row.key] = AskedRow(row=row, id=prompt_id(row), group=line["group"], judge=line.get("judge"),
                                      reference=line.get("reference"))  # fmt: skip
    return found


def draw_evenly(asked: list[AskedRow], count: int, seed: int) -> list[Row]:
    """Return at most `count` rows, as many of each group; what a small group lacks, the others give."""
    by_group: dict[str, list[Row]] = {}
    for one in asked:
        by_group.setdefault(one.group, []).append(one.row)
    drawn, left = [], count
    for place, rows in enumerate(sorted(by_group.values(), key=len)):
        part = sample(rows, min(len(rows), math.ceil(left / (len(by_group) - place))), seed)
        drawn, left = drawn + part, left - len(part)
    return drawn


def apart(passages: list[Passage]) -> list[Passage]:
    """Return the passages of which none shares a token with an earlier one of the list."""
    kept: list[Passage] = []
    for passage in passages:
        if not any(overlap(passage, other) for other in kept):
            kept.append(passage)
    return kept


def overlap(row: Row, passage: Row) -> bool:
    """Return whether two passages of one document share a token."""
    if not (isinstance(row, Passage) and isinstance(passage, Passage)):
        return False
    is_same = (row.source, row.document) == (passage.source, passage.document)
    return is_same and row.start < passage.end and passage.start < row.end


def prompt_id(row: Row) -> str:
    """Return what tells a prompt with its earlier turns from all others. The ids of files need not differ."""
    return hashlib.sha256(row.key.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- examples
def read_relearn_data(options) -> dict[str, list[Row]]:
    """Return {name: rows} of each source of --relearn_data. Raises UsageError if one cannot be read."""
    sets, taken = {}, {FORGOTTEN}
    for source in read_sources(options.relearn_data, "--relearn_data", fields=options.fields):
        sets[free_name(source.spec, taken)] = source.rows
    return sets


@dataclasses.dataclass(kw_only=True)
class ExampleMaker:
    """Draws example rows and gives those without an answer the original model's own."""

    original: object  # the model
    formatter: PromptFormatter
    judge: Judge
    options: object
    config: AttackConfig

    def draw(self, kinds: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """Return at most `num_examples` rows of each kind, with answers. The original answers all kinds at once."""
        count = self.config.num_examples
        drawn = {kind: sample(rows, int(DRAWN * count), self.options.seed) for kind, rows in kinds.items()}
        answered = {row.key: row for row in self.add_answers([row for rows in drawn.values() for row in rows])}
        return {kind: [answered[row.key] for row in rows if row.key in answered][:count]
                for kind, rows in drawn.items()}  # fmt: skip

    def add_answers(self, rows: list[Row]) -> list[Row]:
        """Return the rows with the answer that came with them, else with the original model's own.

        Rows whose own answer gives nothing are left out: with them an adversary would teach refusal.
        """
        answered, bare = [row for row in rows if row.response], [row for row in rows if not row.response]
        if not bare:
            return answered
        texts = generate(self.original, self.formatter, [self.formatter.prompt_of(row, ask=True) for row in bare],
                         max_new_tokens=self.options.max_new_tokens,
                         batch_size=self.options.generation_batch)  # fmt: skip
        judged = self.judge([AskedRow(row=row) for row in bare], [text for text, _ in texts])
        return answered + [dataclasses.replace(row, response=text, complete=complete)
                           for row, (text, complete), said in zip(bare, texts, judged, strict=True)
                           if said.given]  # fmt: skip


def collect_data(
    asked: list[AskedRow], splits: dict, own_sets: dict[str, list[Row]], needs: set[str], maker: ExampleMaker
) -> AttackData:
    """Return the attacked rows with the example rows that are needed ("examples", "relearn").

    asked: prompts, or passages; examples are of the same kind, but for what is taught of the keep side.
    splits: {"forget" or "keep": {source: its rows by split}}. own_sets: the rows of --relearn_data. Examples of the
    forget side are rows that the run trained on, since others were never forgotten.
    """
    data = AttackData(asked=asked, forget_train_rows=[])
    if not needs:
        return data
    is_text = any(row.is_text for row in data.rows)
    trained_on = TrainedOn.read(maker.options.model_name)
    trained = [row for parts in splits["forget"].values() for row in trained_rows(parts["train"], trained_on)]
    forget = not_among(data.asked, [row for row in trained if row.is_text == is_text])
    keep = {source: not_among(data.asked, [row for of_split in parts.values() for row in of_split
                                           if is_text or not row.is_text])
            for source, parts in splits["keep"].items()}  # fmt: skip
    taught: dict[str, list[Row]] = {}
    if "relearn" in needs:
        taught = own_rows(own_sets, data.asked) or first_sources(keep, maker.config.num_keep_sets)
    drawn = maker.draw({FORGOTTEN: forget, **taught} if "examples" in needs or not own_sets else taught)
    data.forget_train_rows = drawn.get(FORGOTTEN, [])
    if "examples" in needs:
        keep_rows = [row for rows in keep.values() for row in rows if row.is_text == is_text]
        data.keep_rows = sample(keep_rows, maker.config.num_examples, maker.options.seed)
    if "relearn" in needs:
        sets = [RelearnSet(name, drawn[name]) for name in taught if drawn[name] or own_sets]
        if empty := next((taught.name for taught in sets if not taught.rows), None):
            raise UsageError(f"--relearn_data {empty}: holds no row to teach, beside those that are asked, with an "
                             "answer of its own or of the original")  # fmt: skip
        data.relearn_sets = sets if own_sets else [*forgotten_set(data), *sets]
    return data


def not_among(attacked: list[AskedRow], rows: list[Row]) -> list[Row]:
    """Return the rows that tell nothing of an attacked one: not its prompt, not its answer under a prompt in other
    words, and of a passage no token of it."""
    prompts = {prompt_hash(asked.row.key) for asked in attacked}
    answers = {prompt_hash(asked.answer) for asked in attacked}
    return [row for row in rows
            if prompt_hash(row.key) not in prompts and not (row.response and prompt_hash(row.response) in answers)
            and not any(overlap(row, asked.row) for asked in attacked)]  # fmt: skip


def own_rows(own_sets: dict[str, list[Row]], attacked: list[AskedRow]) -> dict[str, list[Row]]:
    """Return the rows of --relearn_data by set. What the attack asks is left out of them, and that is said."""
    taught = {name: not_among(attacked, rows) for name, rows in own_sets.items()}
    for name, rows in own_sets.items():
        if left_out := len(rows) - len(taught[name]):
            log.warning("--relearn_data %s: %d of its rows are asked by the attack, or hold an answer that it looks "
                        "for, and are not taught", name, left_out)  # fmt: skip
    return taught


def first_sources(keep: dict[str, list[Row]], count: int) -> dict[str, list[Row]]:
    """Return the first `count` keep sources that hold rows, by name."""
    names_taken: set[str] = {FORGOTTEN}
    sources = [source for source, rows in keep.items() if rows][:count]
    return {free_name(source, names_taken): keep[source] for source in sources}


def forgotten_set(data: AttackData) -> list[RelearnSet]:
    """Return the set of forgotten rows. If there are too few beside the attacked ones, half of these are taught, and
    those others asked that have another answer."""
    if len(data.forget_train_rows) >= FEWEST_TAUGHT:
        return [RelearnSet(FORGOTTEN, data.forget_train_rows)]
    taught = data.asked[::2]
    told = {prompt_hash(asked.answer) for asked in taught}
    measured = [i for i in range(1, len(data.asked), 2) if prompt_hash(data.asked[i].answer) not in told]
    if not measured:
        return []
    rows = [whole(asked.row) if asked.row.is_text else dataclasses.replace(asked.row, response=asked.answer)
            for asked in taught]  # fmt: skip
    return [RelearnSet(f"half of the {FORGOTTEN}", rows, measured)]
