"""What every attack is given and what it returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from engine.generation import generate
from evaluation.options import EvaluateOptions
from prompts.formatter import PromptFormatter
from sources.rows import Row

# What an attack does to get the answers back, as the page sorts them. "reading": the answer is not asked for but looked
# for, so that nothing comes back from it alone.
Family = Literal["prompt", "sampling", "weights", "fine-tuning", "reading"]
# who a control is, as report.json names it
CONTROL_NAMES = {"original": "the original", "retrained": "a model that never knew the rows", "chance": "guessing"}


# ------------------------------------------------------------------------------------------- what is attacked
@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedRow:
    """A prompt, or a passage, with what a judge of its answers has to know.

    row: of a prompt, its response is the original model's answer. reference: the answer that came with the row. judge:
    the name of the judge that decides over its group; None, of example prompts, which are in no group: the one that
    decides over prompts without an answer.
    """

    row: Row
    id: str = ""
    group: str = ""
    judge: str | None = None
    reference: str | None = None

    @property
    def answer(self) -> str:
        """The answer that shall not come back: the one that came with the row, else the original's."""
        return self.reference or self.row.response or ""


@dataclasses.dataclass(frozen=True)
class RelearnSet:
    """Rows that an adversary fine-tunes on. measured: the numbers of the attacked rows that are asked afterwards, if
    the others are taught; None: all are asked, and none is taught."""

    name: str
    rows: list[Row]
    measured: list[int] | None = None


@dataclasses.dataclass(kw_only=True)
class AttackData:
    """The rows of an attack. None of the example rows is among the attacked ones."""

    asked: list[AskedRow]  # attacked: forgotten prompts
    forget_train_rows: list[Row]  # examples: forget rows that the run trained on, with answers
    keep_rows: list[Row] = dataclasses.field(default_factory=list)  # examples: of the keep side, prompts alone
    relearn_sets: list[RelearnSet] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The attacked rows; their responses are the original's answers."""
        return [asked.row for asked in self.asked]


@dataclasses.dataclass(kw_only=True)
class AttackConfig:
    """The size of the attacks.

    num_rephrasings: how many of them are asked; None: all. num_examples: rows of each kind that an adversary shows or
    teaches. num_keep_sets: keep sources that are taught if --relearn_data names no rows; each takes minutes.
    relearn_answers: how often the prompts are asked during fine-tuning. relearn_lr: of adapters; "auto" until it is
    chosen. relearn_whole: what is trained, one after the other: whole weights (True), adapters (False).
    ablated_layers: how many are tried.
    """

    max_new_tokens: int
    batch_size: int
    seed: int
    num_rephrasings: int | None = None
    num_samples: int = 16
    num_examples: int = 20
    num_keep_sets: int = 2
    relearn_steps: int = 100
    relearn_answers: int = 3
    relearn_lr: float | Literal["auto"] = EvaluateOptions.relearn_lr
    relearn_whole: tuple[bool, ...] = (False,)
    quantised_bits: tuple[int, ...] = (8, 4)
    pruned_shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    ablated_layers: int = 8


@dataclasses.dataclass(kw_only=True)
class AttackTarget:
    """The model under attack: the unlearned one, or its control. An attack leaves it as it found it."""

    model: torch.nn.Module
    formatter: PromptFormatter
    packed: bool  # whether the model takes packed rows in training, see engine.tree
    data: AttackData
    config: AttackConfig

    def prompts(self, style: str | None = None) -> list[list[int]]:
        """Return the token ids of the attacked prompts, in the formatter's own style or another one."""
        return [self.formatter.prompt_of(row, style, ask=True) for row in self.data.rows]

    def answer(self, prompts: list[list[int]], model=None, **sampling) -> list[str]:
        """Return the answers of the target, or of a changed copy, to tokenised prompts; greedy by default."""
        settings = {"max_new_tokens": self.config.max_new_tokens, "batch_size": self.config.batch_size,
                    "seed": self.config.seed}  # fmt: skip
        model = self.model if model is None else model
        return [text for text, _ in generate(model, self.formatter, prompts, **settings, **sampling)]

    def answer_variants(self, variants: dict[str, list[list[int]]]) -> list[AttackResult]:
        """Return a result per variant, {label: a prompt for every attacked row}. All are answered together, which takes
        half the time of one after the other."""
        texts = iter(self.answer([prompt for prompts in variants.values() for prompt in prompts]))
        return [one_answer_each(label, [next(texts) for _ in prompts]) for label, prompts in variants.items()]


# ------------------------------------------------------------------------------------------- what comes back
@dataclasses.dataclass
class AttackResult:
    """The answers under one variant of an attack: a list of answers for every asked row, in order.

    rows: the numbers of the attacked rows that were asked; None: all.
    hits: whether each answer is what the attack looked for, where no judge of answers can tell; None: a judge decides.
    chance: the share of hits of a guess, which is then the control.
    judged: False keeps the variant out of the verdict: it is shown.
    """

    variant: str
    answers: list[list[str]]
    rows: list[int] | None = None
    hits: list[list[bool]] | None = None
    chance: float | None = None
    judged: bool = True


def one_answer_each(variant: str, texts: list[str], rows: list[int] | None = None) -> AttackResult:
    """Return the result of a variant that asks every prompt once."""
    return AttackResult(variant, [[text] for text in texts], rows)


# -------------------------------------------------------------------------------------------- what is registered
@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """A registered attack.

    run: asks prompts. on_text: asks passages of text to go on; None if the attack has no such form.
    needs: "examples" if it reads the example rows, "relearn" if it reads the sets to fine-tune on; both need answers.
    control: the model that is attacked likewise, if no retrained one is given: that one never knew the rows, so its
    share is what comes from the attack alone. "original" has forgotten nothing, so its share bounds what could come
    back. "retrained": the original tells nothing about this attack, which is then shown and not judged.
    """

    run: Callable[[AttackTarget], list[AttackResult]]
    family: Family
    on_text: Callable[[AttackTarget], list[AttackResult]] | None = None
    needs: frozenset[str] = frozenset()
    control: Literal["original", "retrained"] = "original"

    @property
    def takes_text(self) -> bool:
        """Whether it can be run on passages."""
        return self.on_text is not None


@dataclasses.dataclass(frozen=True)
class Probe:
    """A registered probe: `measure(model, formatter, rows)` returns numbers, or an empty list if it cannot read this
    kind of model. report.json holds the numbers of both models under `report_key`. It reads prompts and passages."""

    measure: Callable[[torch.nn.Module, PromptFormatter, list[Row]], list[float]]
    report_key: str
    takes_text: ClassVar[bool] = True


# ------------------------------------------------------------------------------------- labels in report.json
def step_label(name: str, step: int) -> str:
    """Return the variant's label in report.json, such as 'benign, 50 steps'."""
    return f"{name}, {step} steps"


def read_step_label(variant: str) -> tuple[str, int] | None:
    """Return what `step_label` was given, or None for the label of an attack without steps."""
    match = re.fullmatch(r"(.*), (\d+) steps", variant)
    return (match[1], int(match[2])) if match else None


def is_control(entry: dict) -> bool:
    """Return whether an entry of report.json's `attacks` shows a model that was never unlearned, so that it does not
    count against the unlearned one."""
    return bool(entry.get("is_control"))
