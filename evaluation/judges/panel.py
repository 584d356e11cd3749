"""All judges of an evaluation: loaded and tried before a model is asked, and which of them decides over a group."""

from __future__ import annotations

import dataclasses

import torch

from engine.weights_hash import weights_hash
from evaluation.judges.base import Judge, Judgement
from evaluation.judges.classifier import Classifier
from evaluation.judges.embedder import Embedder, load_embedder
from evaluation.judges.model_judges import load_judges, read_spec
from evaluation.judges.on_demand import EXAMPLE, ModelJudge, one_line_errors
from evaluation.judges.outcome import OutcomeJudge
from evaluation.judges.reference import ReferenceJudge, reference_of
from evaluation.judges.refusals import is_refusal
from sources.rows import Row
from utils import UsageError

REFERENCE, OUTCOME = "reference", "outcome"
JUDGE_OPTIONS = ("judge", "guard", "embedder", "reward")  # how their options begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedJudges:
    """Judges that are ready. embed: n texts -> (n, d) unit vectors. rewards: the reward model."""

    by_name: dict[str, Judge]
    embed: Embedder
    rewards: Classifier | None


class Panel:
    """The judges that the options name, loaded at first use; `loaded` raises UsageError if one cannot be used."""

    def __init__(self, options, device: torch.device):
        self.options, self.device = options, device
        self._loaded: LoadedJudges | None = None

    @property
    def loaded(self) -> LoadedJudges:
        """The judges. The first access loads each and tries it on an example."""
        if self._loaded is None:
            embed = load_embedder(self.options, self.device)
            judges = [OutcomeJudge(embed), ReferenceJudge(is_refusal), *load_judges(self.options, self.device)]
            rewards = None
            if self.options.reward_model:
                rewards = Classifier(self.options.reward_model, self.device, option="--reward_model",
                                     **self.options.trust())  # fmt: skip
                with one_line_errors(f"--reward_model {self.options.reward_model}"):
                    rewards.reward(*([text] for text in EXAMPLE))
                rewards.release()
            self._loaded = LoadedJudges(by_name={judge.name: judge for judge in judges}, embed=embed, rewards=rewards)
        return self._loaded

    def check(self) -> None:
        """Load every judge and try it. Raises UsageError if one cannot be used."""
        _ = self.loaded

    def identity(self) -> list:
        """Return what judgements depend on, without loading a judge: options and whole weights."""
        options = dataclasses.asdict(self.options)
        settings = {name: value for name, value in options.items() if name.startswith(JUDGE_OPTIONS)}
        paths = [read_spec(name).path for name in self.options.judge_model]
        models = [path for path in (*paths, self.options.embedder, self.options.reward_model) if path]
        return [settings, [weights_hash(path) for path in models]]

    def describe(self) -> list[dict]:
        """Return what report.json says of each judge."""
        told = []
        for judge in self.loaded.by_name.values():
            is_model = isinstance(judge, ModelJudge)
            told.append({"name": judge.name, "kind": judge.kind, "limits": judge.limits, "given": sorted(judge.given),
                         "uncounted": sorted(judge.uncounted),
                         "weights": weights_hash(judge.path) if is_model else None,
                         **(judge.settings if is_model else {})})  # fmt: skip
            if judge.name == OUTCOME:
                told[-1]["weights"] = self.options.embedder and weights_hash(self.options.embedder)
                told[-1]["on_topic_cosine"] = self.loaded.embed.on_topic_cosine
        return told

    def names(self) -> list[str]:
        """Return the names of the judge models that are asked about every answer."""
        return [name for name in self.loaded.by_name if name not in (REFERENCE, OUTCOME)]

    def judge(self, name: str, asked: list[tuple[Row, str]]) -> list[Judgement]:
        """Return what one judge says of each (row, answer), and let a judge model go afterwards."""
        judge = self.loaded.by_name[name]
        found = judge.judge([row.prompt for row, _ in asked], [text for _, text in asked],
                            [reference_of(row) for row, _ in asked])  # fmt: skip
        if isinstance(judge, ModelJudge):
            judge.release()
        return found

    def gives(self, name: str, judgement: Judgement | None) -> bool | None:
        """Return whether a judgement of this judge means that the answer was given; None if it says nothing of it."""
        judge = self.loaded.by_name[name]
        if judgement is None or judgement.label in judge.uncounted:
            return None
        return judgement.label in judge.given


def decider(options, *, side: str, has_reference: bool) -> str:
    """Return the name of the judge that decides over a group: by its references if its rows came with answers that are
    to be forgotten, else by the outcome, which a judge model can be named for (--judge). That one decides over forget
    prompts alone: most judge models tell harm, which no answer to keep does, lost or not."""
    by = options.judge_by
    if by == "auto":
        by = REFERENCE if side == "forget" and has_reference else OUTCOME
    if by == REFERENCE and not has_reference:
        by = OUTCOME
    return options.judge if by == OUTCOME and side == "forget" and options.judge else by


def refuse_unknown_judge(options) -> None:
    """Raise UsageError if --judge names none of the judge models."""
    if options.judge and options.judge not in options.judge_model:
        named = ", ".join(options.judge_model) or "none is named"
        raise UsageError(f"--judge {options.judge}: is not among --judge_model ({named}); name it there as well")
