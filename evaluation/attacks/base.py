"""What every attack is given and what it returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch

from engine.generation import generate
from evaluation.options import EvaluateOptions
from prompts.formatter import PromptFormatter
from sources.rows import Row

CONTROL = "control"  # the name in report.json of an entry that is no attack


@dataclasses.dataclass
class AttackResult:
    """The answers under one variant of an attack: a list of answers for every attacked prompt, in order.

    A prompt counts as recovered if any answer of its list is on topic. `is_control`: the answers of a model that was
    never unlearned, treated in the same way; they bound what could come back and do not count against the model.
    """

    variant: str
    answers: list[list[str]]
    is_control: bool = False


def one_answer_each(variant: str, texts: list[str], *, is_control: bool = False) -> AttackResult:
    """Return the result of a variant that asks every prompt once."""
    return AttackResult(variant, [[text] for text in texts], is_control)


@dataclasses.dataclass(frozen=True)
class Attack:
    """A registered attack. `needs_examples`: it reads the example rows of `AttackData`, which must have answers."""

    run: Callable[[AttackTarget], list[AttackResult]]
    needs_examples: bool = False


@dataclasses.dataclass(frozen=True)
class Probe:
    """A registered probe: `measure(model, formatter, rows)` returns numbers, or an empty list if it cannot read this
    kind of model. report.json holds the numbers of both models under `report_key`."""

    measure: Callable[[torch.nn.Module, PromptFormatter, list[Row]], list[float]]
    report_key: str


@dataclasses.dataclass(kw_only=True)
class AttackData:
    """The rows of an attack. None of the examples is among the attacked rows."""

    rows: list[Row]  # attacked: unseen forget prompts with the original model's answers
    forget_train_rows: list[Row]  # examples: forget rows that the run trained on
    benign_rows: list[Row]  # examples: retain rows
    borderline_rows: list[Row]  # examples: retain rows that look harmful


@dataclasses.dataclass(kw_only=True)
class AttackConfig:
    """The size of the attacks. Learning rate and steps are those of the relearning attack."""

    max_new_tokens: int
    batch_size: int
    seed: int
    num_samples: int = 16
    relearn_steps: int = 100
    num_relearn_rows: int = 20
    relearn_lr: float = EvaluateOptions.relearn_lr


@dataclasses.dataclass(kw_only=True)
class AttackTarget:
    """The unlearned model under attack. An attack leaves both models as it found them."""

    model: torch.nn.Module
    original: torch.nn.Module  # never unlearned, for controls
    formatter: PromptFormatter
    packed: bool  # whether the model takes packed rows in training, see engine.tree
    data: AttackData
    config: AttackConfig

    def prompts(self, style: str | None = None) -> list[list[int]]:
        """Return the token ids of the attacked prompts, in the formatter's own style or another one."""
        return [self.formatter.prompt_of(row, style, ask=True) for row in self.data.rows]

    def answer(self, prompts: list[list[int]], model=None, **sampling) -> list[str]:
        """Return the answers of the target, or of another model, to tokenised prompts; greedy by default."""
        settings = {"max_new_tokens": self.config.max_new_tokens, "batch_size": self.config.batch_size,
                    "seed": self.config.seed}  # fmt: skip
        model = self.model if model is None else model
        return [text for text, _ in generate(model, self.formatter, prompts, **settings, **sampling)]


# ------------------------------------------------------------------------------------- labels in report.json
def step_label(name: str, step: int) -> str:
    """Return the variant's label in report.json, such as 'benign rows, 50 steps'."""
    return f"{name}, {step} steps"


def read_step_label(variant: str) -> tuple[str, int] | None:
    """Return what `step_label` was given, or None for the label of an attack without steps."""
    match = re.fullmatch(r"(.*), (\d+) steps", variant)
    return (match[1], int(match[2])) if match else None


def is_control(entry: dict) -> bool:
    """Return whether an entry of report.json's `attacks` is a control, which does not count against the model."""
    return entry["name"] == CONTROL
