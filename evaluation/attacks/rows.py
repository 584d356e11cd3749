"""The rows of an attack: forgotten prompts, and examples that an adversary shows, teaches or compares.

An attack sees the unlearned model, never its answers; where it needs harmful text, it takes the original's answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from data_module import prompt_hash, sample
from engine.generation import generate
from engine.trained_on import TrainedOn
from evaluation.attacks.base import AskedRow, AttackData, RelearnSet
from evaluation.groups import free_name, trained_rows, unseen_groups
from prompts.formatter import PromptFormatter
from sources.rows import Row, read_sources
from utils import UsageError, log

Given = Callable[[list[AskedRow], list[str]], list[bool]]  # whether each answer gives what was asked for

DEFAULT_SETS = 2  # keep sources that are taught if --relearn_data names no rows: each takes minutes
FORGOTTEN = "forgotten rows"
FEWEST_TAUGHT = 4  # with fewer other forgotten rows, half of the attacked ones are taught
DRAWN = 1.5  # examples drawn for each one used: some get no answer from the original


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """The prompts that attacks ask. not_attacked: names of the forget groups that no attack asks."""

    rows: list[AskedRow]
    not_attacked: list[str]

    def summary(self) -> dict:
        """Return report.json's `attacked`."""
        return {"rows": len(self.rows), "not_attacked": self.not_attacked}


def forgotten_rows(lines: list[dict], style: str, count: int, seed: int) -> Forgotten:
    """Return at most `count` forgotten prompts: unseen, answered before and not after, as the deciding judges say.

    lines: those of scores.jsonl. The prompts are drawn from all groups together, since what holds for one kind of
    prompt need not hold for another. Passages of text are no prompts, so no attack asks them.
    """
    judged = [line for line in lines if line["side"] == "forget" and line["counts"]]
    texts = list(dict.fromkeys(line["group"] for line in judged if line.get("text")))
    if texts:
        log.warning("attacks: not on %s: an attack asks prompts, and this is text", ", ".join(texts))
    prompts = [line for line in judged if not line.get("text")]
    unseen = unseen_groups(line["group"] for line in prompts)
    forgotten = {}
    for line in prompts:
        if (line["group"] in unseen and line["style"] == style and line["before"]["answered"]
                and line["after"]["answered"] is False):  # fmt: skip
            row = Row(line["prompt"], line["before"]["answer"], earlier=tuple(map(tuple, line.get("earlier", ()))))
            forgotten[row.key] = AskedRow(row=row, id=str(line["id"]), group=line["group"], judge=line.get("judge"),
                                          reference=line.get("reference"))  # fmt: skip
    chosen = sample([asked.row for asked in forgotten.values()], count, seed)
    return Forgotten([forgotten[row.key] for row in chosen], texts)


# ------------------------------------------------------------------------------------------------- examples
def read_relearn_data(options) -> dict[str, list[Row]]:
    """Return {name: rows} of each source of --relearn_data. Raises UsageError if one cannot be read."""
    sets, taken = {}, set()
    for source in read_sources(options.relearn_data, "--relearn_data", fields=options.fields):
        sets[free_name(source.spec, taken)] = source.rows
    return sets


@dataclasses.dataclass(kw_only=True)
class ExampleMaker:
    """Draws example rows and gives those without an answer the original model's own."""

    original: object  # the model
    formatter: PromptFormatter
    given: Given
    options: object
    count: int  # rows of each kind

    def draw(self, rows: list[Row], *, answers: bool = True) -> list[Row]:
        """Return at most `count` of the rows, with answers if asked for."""
        drawn = sample(rows, int(DRAWN * self.count) if answers else self.count, self.options.seed)
        return (self.add_answers(drawn) if answers else drawn)[: self.count]

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
        given = self.given([AskedRow(row=row) for row in bare], [text for text, _ in texts])
        return answered + [dataclasses.replace(row, response=text, complete=complete)
                           for row, (text, complete), is_given in zip(bare, texts, given, strict=True)
                           if is_given]  # fmt: skip


def collect_data(
    asked: list[AskedRow], splits: dict, own_sets: dict[str, list[Row]], needs: set[str], maker: ExampleMaker
) -> AttackData:
    """Return the attacked rows with the example rows that are needed ("examples", "relearn").

    splits: {"forget" or "keep": {source: its rows by split}}. own_sets: the rows of --relearn_data. Examples of the
    forget side are rows that the run trained on, since others were never forgotten.
    """
    data = AttackData(asked=asked, forget_train_rows=[])
    if not needs:
        return data
    attacked = {prompt_hash(row.key) for row in data.rows}
    trained_on = TrainedOn.read(maker.options.model_name)
    forget = not_among(attacked, [row for parts in splits["forget"].values()
                                  for row in trained_rows(parts["train"], trained_on)])  # fmt: skip
    keep = {source: not_among(attacked, [row for part in parts.values() for row in part])
            for source, parts in splits["keep"].items()}  # fmt: skip
    if "examples" in needs or not own_sets:
        data.forget_train_rows = maker.draw(forget)
    if "examples" in needs:
        data.keep_rows = maker.draw([row for rows in keep.values() for row in rows], answers=False)
    if "relearn" in needs:
        data.relearn_sets = given_sets(own_sets, attacked, maker) if own_sets else default_sets(data, keep, maker)
    return data


def not_among(attacked: set[str], rows: list[Row]) -> list[Row]:
    """Return the rows that are prompts and are not attacked."""
    return [row for row in rows if not row.is_text and prompt_hash(row.key) not in attacked]


def given_sets(own_sets: dict[str, list[Row]], attacked: set[str], maker: ExampleMaker) -> list[RelearnSet]:
    """Return the sets of --relearn_data, a set a source. Attacked prompts are left out of them, and that is said.

    Raises UsageError if a source has no other row with an answer.
    """
    sets = []
    for name, rows in own_sets.items():
        others = not_among(attacked, rows)
        if len(others) < len(rows):
            log.warning("--relearn_data %s: %d of its rows are asked by the attack, and are not taught", name,
                        len(rows) - len(others))  # fmt: skip
        taught = maker.draw(others)
        if not taught:
            raise UsageError(f"--relearn_data {name}: holds no row to teach, beside those that are asked, with an "
                             "answer of its own or of the original")  # fmt: skip
        sets.append(RelearnSet(name, taught))
    return sets


def default_sets(data: AttackData, keep: dict[str, list[Row]], maker: ExampleMaker) -> list[RelearnSet]:
    """Return what is taught if no option names it: forgotten rows, and the first keep sources that hold prompts.

    If there are too few forgotten rows beside the attacked ones, half of these are taught and the others asked.
    """
    sets = []
    if len(data.forget_train_rows) >= FEWEST_TAUGHT:
        sets.append(RelearnSet(FORGOTTEN, data.forget_train_rows))
    elif len(data.asked) > 1:
        taught = [dataclasses.replace(asked.row, response=asked.answer) for asked in data.asked[::2]]
        sets.append(RelearnSet(f"half of the {FORGOTTEN}", taught, list(range(1, len(data.asked), 2))))
    names_taken: set[str] = set()
    prompts = {source: rows for source, rows in keep.items() if rows}
    for source in list(prompts)[:DEFAULT_SETS]:
        sets.append(RelearnSet(free_name(source, names_taken), maker.draw(prompts[source])))
    return [taught for taught in sets if taught.rows]
