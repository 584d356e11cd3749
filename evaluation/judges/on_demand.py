"""What all judge models share: they are loaded when they are asked, and asked only about answers that say something."""

from __future__ import annotations

import contextlib

import torch

from engine.loading import release_memory
from evaluation.judges.base import Judgement
from evaluation.metrics.texts import is_empty
from utils import UsageError, log

EXAMPLE = ("What is the capital of France?", "The capital of France is Paris.")  # on which each judge is tried
MOST_UNREADABLE = 0.1  # share of a judge's replies from which a warning is given
FLAGS = ("harmful", "controversial")  # labels that the example should not get


@contextlib.contextmanager
def named_errors(where: str):
    """Put `where`, an option and its value, before the text of a UsageError that does not begin with an option."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace("--model_name=", f"{where.partition(' ')[0]} ")  # of a model that is nowhere
        raise UsageError(text if text.startswith("--judge_model") else f"{where}: {text}") from error


@contextlib.contextmanager
def one_line_errors(where: str):
    """Turn what a judge of the wrong kind raises when it is tried into one UsageError. Too little memory stays so."""
    try:
        with named_errors(where):
            yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a tokenizer, a template or a forward, each of which has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{where}: cannot judge ({reason}); take another judge, or make its folder whole") from error


class ModelJudge:
    """A judge that is a model (evaluation/judges/base.py has the protocol).

    name: as the user wrote it in --judge_model; path: the model's folder or hub name, whose weights can be hashed.
    settings: what report.json tells beside name, kind and limits.
    An answer without letters or digits is "empty" and is not asked: the judge would judge its prompt. What the judge
    does not tell is "unreadable". `uncounted` are the labels that say nothing of an answer, so no rate counts them.
    """

    kind: str
    labels: tuple[str, ...]
    given: frozenset[str]
    uncounted = frozenset({"unreadable"})
    limits: str
    settings: dict

    def __init__(self, name: str, path: str, device: torch.device, *, option: str = "--judge_model"):
        self.name, self.path, self.device, self.option = name, path, device, option
        self.model = None

    def load(self) -> None:
        """Load the model, if it is not loaded. Raises UsageError, naming the option."""
        if self.model is None:
            with named_errors(f"{self.option} {self.name}"):
                self.model = self._load().to(self.device).eval()

    def release(self) -> None:
        """Let the weights go, so that the evaluated models have the memory. The next question loads them again."""
        self.model = None
        release_memory(self.device)

    def reads(self, language: str | None) -> bool:
        """Return True: no model's folder tells its languages, and who names one as a judge knows them."""
        return True

    def judge(self, prompts: list[str], answers: list[str], references: list[str | None]) -> list[Judgement]:
        """Return what the judge says of each answer, in order. Warns if many of its replies cannot be read."""
        asked = [i for i, answer in enumerate(answers) if not is_empty(answer)]
        judged = [Judgement("empty")] * len(answers)
        if asked:
            self.load()
            found = self._ask([prompts[i] for i in asked], [answers[i] for i in asked])
            for i, judgement in zip(asked, found, strict=True):
                judged[i] = judgement
        unreadable = sum(judgement.label == "unreadable" for judgement in judged)
        if unreadable > MOST_UNREADABLE * len(asked):
            log.warning("judge %s: %d of %d replies cannot be read; they are in no rate%s", self.name, unreadable,
                        len(asked), f" (the first: {reply})" if (reply := self._unread()) else "")  # fmt: skip
        return judged

    def try_once(self) -> None:
        """Judge a harmless example. Raises UsageError if the judge cannot; warns if it calls the example harmful."""
        with one_line_errors(f"{self.option} {self.name}"):
            self.load()
            (found,) = self._ask([EXAMPLE[0]], [EXAMPLE[1]])
        if found.label == "unreadable":
            raise UsageError(f"{self.option} {self.name}: {self._why_unreadable()}")
        if found.label in FLAGS:
            log.warning('judge %s: calls a harmless example %s ("%s" "%s"); look at its answers before you trust it',
                        self.name, found.label, *EXAMPLE)  # fmt: skip

    def _load(self) -> torch.nn.Module:
        """Return the model, in memory."""
        raise NotImplementedError

    def _ask(self, prompts: list[str], answers: list[str]) -> list[Judgement]:
        """Return what the loaded model says of answers that are not empty."""
        raise NotImplementedError

    def _why_unreadable(self) -> str:
        """Return what the user is told if the reply to the example cannot be read."""
        raise NotImplementedError

    def _unread(self) -> str:
        """Return the first reply of the last call that could not be read; "" if the judge gives no text."""
        return ""


def check_vocabulary(judge: ModelJudge, largest: int) -> None:
    """Raise UsageError if the largest token that a judge reads is beyond its embedding: on a GPU, that would end the
    process."""
    rows = judge.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UsageError(f"{judge.option} {judge.name}: its tokenizer makes token {largest}, and its embedding has "
                         f"{rows} rows; take the tokenizer that the model was saved with")  # fmt: skip
