"""All judges of an evaluation: loaded and tried before a model is asked, and which of them decides over a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from engine.weights_hash import weights_hash
from evaluation.judges.base import Judge, Judgement
from evaluation.judges.classifier import Classifier
from evaluation.judges.embedder import load_embedder
from evaluation.judges.model_judges import load_judges
from evaluation.judges.outcome import OutcomeJudge
from evaluation.judges.reference import ReferenceJudge
from evaluation.judges.refusals import is_refusal
from utils import UsageError

REFERENCE, OUTCOME = "reference", "outcome"
JUDGE_OPTIONS = ("judge", "guard", "embedder", "on_topic", "reward")  # how their options begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedJudges:
    """Judges that are ready. embed: n texts -> (n, d) unit vectors. reward: prompts, answers -> scores, or None."""

    by_name: dict[str, Judge]
    embed: Callable[[list[str]], torch.Tensor]
    reward: Callable[[list[str], list[str]], list[float]] | None


class Panel:
    """The judges that the options name, loaded at first use; `loaded` raises UsageError if one cannot be used."""

    def __init__(self, options, device: torch.device):
        self.options, self.device = options, device
        self._loaded: LoadedJudges | None = None

    @property
    def loaded(self) -> LoadedJudges:
        """The judges. The first access loads each and tries it on an example."""
        if self._loaded is None:
            embed = load_embedder(self.options)
            judges = [OutcomeJudge(embed), ReferenceJudge(is_refusal), *load_judges(self.options, self.device)]
            rewards = None
            if self.options.reward_model:
                rewards = Classifier(self.options.reward_model, self.device, **self.options.trust()).reward
            self._loaded = LoadedJudges(by_name={judge.name: judge for judge in judges}, embed=embed, reward=rewards)
        return self._loaded

    def check(self) -> None:
        """Load every judge and try it. Raises UsageError if one cannot be used."""
        _ = self.loaded

    def identity(self) -> list:
        """Return what judgements depend on, without loading a judge: options and whole weights."""
        options = dataclasses.asdict(self.options)
        settings = {name: value for name, value in options.items() if name.startswith(JUDGE_OPTIONS)}
        models = [*self.options.judge_model, self.options.embedder, self.options.reward_model]
        return [settings, [weights_hash(name) for name in models if name]]

    def describe(self) -> list[dict]:
        """Return what report.json says of each judge."""
        return [{"name": judge.name, "kind": judge.kind, "limits": judge.limits,
                 "weights": weights_hash(judge.name) if judge.name in self.options.judge_model else None,
                 **({"harmful_classes": judge.harmful_classes} if hasattr(judge, "harmful_classes") else {})}
                for judge in self.loaded.by_name.values()]  # fmt: skip

    def names(self) -> list[str]:
        """Return the names of the judge models that are asked about every answer."""
        return [name for name in self.loaded.by_name if name not in (REFERENCE, OUTCOME)]

    def judge(self, name: str, prompts: list[str], answers: list[str], references: list[str | None]) -> list[Judgement]:
        """Return what one judge says of each answer."""
        return self.loaded.by_name[name].judge(prompts, answers, references)

    def gives(self, name: str, judgement: Judgement | None) -> bool | None:
        """Return whether a judgement of this judge means that the answer was given; None if nothing was judged."""
        return None if judgement is None else judgement.label in self.loaded.by_name[name].given


def decider(options, *, side: str, has_reference: bool) -> str:
    """Return the name of the judge that decides over a group: by its references if its rows came with answers that are
    to be forgotten, else by the outcome, which a judge model can be named for (--judge)."""
    by = options.judge_by
    if by == "auto":
        by = REFERENCE if side == "forget" and has_reference else OUTCOME
    if by == REFERENCE and not has_reference:
        by = OUTCOME
    return by if by == REFERENCE else options.judge or OUTCOME


def refuse_unknown_judge(options) -> None:
    """Raise UsageError if --judge names none of the judge models."""
    if options.judge and options.judge not in options.judge_model:
        named = ", ".join(options.judge_model) or "none is named"
        raise UsageError(f"--judge {options.judge}: is not among --judge_model ({named}); name it there as well")
