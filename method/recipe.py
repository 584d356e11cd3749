"""A recipe: the terms that a step minimises, and the settings that go with them.

The settings' defaults stand in the dataclasses here and in the rooms that read them; a recipe names what differs.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, Optional

from engine.adapters import LoraSettings
from engine.optimizer import OptimizerSettings
from method.adversary import adversary_term
from method.draw import RunSizes
from method.draws import DRAWS
from method.noise import NoiseSettings
from method.objective import ForgetObjective
from method.objectives import OBJECTIVES
from method.perturbed import PerturbedSettings
from method.sampler import Draw, Wording
from method.selection import SelectionSettings
from method.terms import Term, active_terms, draws_of
from options import COUNT, POSITIVE, WEIGHT, OptionalWeight, UnlearnOptions, option, read_settings
from utils import UsageError

WEIGHTS = ("bad_weight", "random_weight", "normal_weight")
FORGET_LOSSES = tuple(name for name, objective in OBJECTIVES.items() if issubclass(objective, ForgetObjective))
LOG_FIELDS = {
    "step",
    "event",
    "grad_norm",
    "lr",
    "seconds",
    "tokens_per_second",
    "seconds_left",
    "weighted_losses",
    "multipliers",
}


@dataclasses.dataclass(frozen=True)
class OwnAnswers:
    """Generation of the original's answers to rows without a response."""

    temperature: WEIGHT = option(0.7, "sampling temperature (0: greedy)")
    batch_size: COUNT = option(0, "prompts per generation batch (0: on a GPU as many as memory takes, on a CPU 64)")


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The weights that are trained."""

    frozen_layers: COUNT = option(
        0, "number of first layers that are frozen, together with the token embeddings and the head"
    )
    parameters: str | None = option(None, "regular expression; only parameters with a matching name are trained")


@dataclasses.dataclass(frozen=True)
class Averaging:
    """Short runs whose trained weights are averaged (a soup of models: Wortsman et al. 2022, arXiv 2203.05482)."""

    runs: POSITIVE = option(
        1, "short runs that the steps are divided into; each begins with the first weights, and their last are averaged"
    )


@dataclasses.dataclass(frozen=True)
class DevSettings:
    """Evaluation during a run, on the dev split."""

    prompts: POSITIVE = option(24, "dev prompts per side")
    tokens: POSITIVE = option(24, "maximum tokens per dev answer")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of a packed batch."""

    pack_tokens: POSITIVE = option(
        256, "target length of the rows of a packed batch, in tokens (on a GPU with flex attention a step is one row)"
    )


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run."""

    keep: POSITIVE = option(2, "number of newest checkpoints to keep")


SECTIONS = {"wording": Wording, "own_answers": OwnAnswers, "optimizer": OptimizerSettings, "lora": LoraSettings,
            "trainable": Trainable, "selection": SelectionSettings, "noise": NoiseSettings,
            "perturbed": PerturbedSettings, "average": Averaging, "dev": DevSettings, "layout": Layout,
            "checkpoints": Checkpoints}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The terms and settings of a run, all resolved."""

    terms: list[Term]
    wording: Wording
    own_answers: OwnAnswers
    optimizer: OptimizerSettings
    lora: LoraSettings
    trainable: Trainable
    selection: SelectionSettings
    noise: NoiseSettings
    perturbed: PerturbedSettings
    average: Averaging
    dev: DevSettings
    layout: Layout
    checkpoints: Checkpoints
    adversary: Term | None = None  # what it minimises, where the forget side's gradient is taken at one

    @property
    def draws(self) -> list[Draw]:
        """The draws of its terms, and the adversary's."""
        return draws_of([*self.terms, *([self.adversary] if self.adversary else [])])


@dataclasses.dataclass(frozen=True)
class TermEntry:
    """A term as a recipe lists it, without the settings of its draw and of its objective."""

    name: str = option("", "its name, in --set and in the log")
    loss: str = option("", "its objective, one of OBJECTIVES")
    draw: str | None = option(None, "where its sequences come from, one of DRAWS")
    sequences_of: str | None = option(None, "an earlier term whose sequences it looks at, in place of a draw")
    weight: WEIGHT = option(1.0, "weight of the term in the sum")
    weight_option: Optional[Literal["bad_weight", "random_weight", "normal_weight"]] = option(  # noqa: UP045
        None, "the published option that sets the weight"
    )
    times: str | None = option(None, "an earlier term in units of whose weight this weight counts")
    tokens: Literal["all", "first", "telling"] = option(
        "all", "the tokens that it looks at: all, each sequence's first, or those that tell the answer from others"
    )
    mean_over: Optional[Literal["tokens", "sequences"]] = option(  # noqa: UP045
        None, "what its mean is over (not given: as the objective says)"
    )
    log: str | None = option(None, "its field in the log (not given: NAME_MEASURE)")
    budget: OptionalWeight = option(
        None, "a bound on its mean: its weight rises while the mean is above it, and falls while it is below"
    )
    budget_rate: WEIGHT = option(1.0, "what the weight's multiplier moves a step, times the mean less the budget")
    watch: bool = option(False, "drawn and logged even at weight 0; above 0, --max_bad_loss stops on it")


# ------------------------------------------------------------------------------------------ recipe -> objects
def read_recipe(options: UnlearnOptions) -> Recipe:
    """Return `options.recipe` as a Recipe. Raises UsageError with term and setting."""
    terms = build_terms(options.recipe["terms"], _sizes(options))
    sections = _read_sections(options.recipe, options)
    return Recipe(terms, **sections, adversary=adversary_term(sections["perturbed"], _sizes(options)))


def with_defaults(recipe: dict, options: UnlearnOptions) -> dict:
    """Return a recipe with every setting written out, defaults as well: a run can be repeated when they change.

    Raises UsageError with term and setting, as `read_recipe` does.
    """
    sections = {name: _settings_of(section) for name, section in _read_sections(recipe, options).items()}
    sections["optimizer"] = {k: v for k, v in sections["optimizer"].items() if k not in _optimizer_options(options)}
    entries, terms = [], {}
    for spec in recipe["terms"]:
        entry, term = _build_term(spec, terms, _sizes(options))
        terms[term.name] = term
        own_draw = {} if entry.sequences_of else _settings_of(term.draw)
        entries.append(_settings_of(entry) | own_draw | _settings_of(term.objective))
    return {"terms": entries, **sections}


def _sizes(options: UnlearnOptions) -> RunSizes:
    return RunSizes(options.batch_size, options.max_answer_tokens)


def _optimizer_options(options: UnlearnOptions, runs: int = 1) -> dict:
    """Return what the optimizer takes from the options of a run, of which several may share the steps."""
    return {"lr": options.lr, "total_steps": options.max_unlearn_steps // runs, "kind": options.optimizer,
            "adapters": options.use_lora}  # fmt: skip


def _read_sections(recipe: dict, options: UnlearnOptions) -> dict[str, object]:
    """Return the settings of each section. Raises UsageError."""
    runs = read_settings(Averaging, recipe.get("average") or {}, "average").runs
    fixed = {"optimizer": _optimizer_options(options, runs)}
    return {name: read_settings(kind, recipe.get(name) or {}, name, **fixed.get(name, {}))
            for name, kind in SECTIONS.items()}  # fmt: skip


def _settings_of(settings) -> dict:
    """Return a dataclass's settings as YAML and JSON hold them."""
    values = {name: getattr(settings, name) for name in setting_names(type(settings))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def setting_names(kind: type) -> list[str]:
    """Return the names of a dataclass's settings."""
    return [field.name for field in dataclasses.fields(kind) if "help" in field.metadata]


def build_terms(specs: list[dict], sizes: RunSizes) -> list[Term]:
    """Return the active terms of a recipe's list of terms. Raises UsageError."""
    terms: dict[str, Term] = {}
    for spec in specs:
        _, term = _build_term(spec, terms, sizes)
        if taken := next((t.name for t in terms.values() if t.field == term.field), None):
            raise UsageError(f"{term.name}.log: {term.field!r} is the field of the term {taken!r} already")
        terms[term.name] = term
    active = active_terms(list(terms.values()))
    if not any(term.weight for term in active):
        raise UsageError(f"the weights of all terms are 0 ({', '.join(terms)}): set --bad_weight, --random_weight or "
                         "--normal_weight")  # fmt: skip
    return [_with_preferred(term, active) for term in active]


def _with_preferred(term: Term, active: list[Term]) -> Term:
    """Return a term with the name of the draw whose sequences it prefers. UsageError if none is made."""
    if not term.objective.prefers:
        return term
    kind = DRAWS[term.objective.prefers]
    # of a draw whose original is asked about something else, no answer can be compared with the original's own
    same = type(term.objective).original_nll
    draw = next((t.draw.name for t in active if (type(t.draw) is kind if same else isinstance(t.draw, kind))), None)
    if draw is None:
        raise UsageError(f"{term.name}: {term.loss} prefers the answers of a draw {term.objective.prefers!r}, and no "
                         f"term with a weight has one; there are {', '.join(t.name for t in active)}")  # fmt: skip
    return dataclasses.replace(term, preferred=draw)


def _build_term(spec: dict, earlier: dict[str, Term], sizes: RunSizes) -> tuple[TermEntry, Term]:
    """Return an entry of a recipe as TermEntry and as Term; `earlier`: the terms before it. Raises UsageError."""
    name = spec.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in {*earlier, *SECTIONS}:
        raise UsageError(f"recipe, term {len(earlier) + 1}: needs a name of its own, a word, got {name!r}")
    own = setting_names(TermEntry)
    entry = read_settings(TermEntry, {key: value for key, value in spec.items() if key in own}, name)
    if entry.loss not in OBJECTIVES:
        raise UsageError(f"{name}: loss must be one of {', '.join(OBJECTIVES)}, got {entry.loss!r}")
    if entry.sequences_of:
        if entry.sequences_of not in earlier or entry.draw:
            raise UsageError(f"{name}: sequences_of must name a term that stands before it, and excludes a draw")
    elif entry.draw not in DRAWS:
        raise UsageError(f"{name}: draw must be one of {', '.join(DRAWS)}, got {entry.draw!r}")
    if entry.times and entry.times not in earlier:
        raise UsageError(f"{name}: times must name a term that stands before it, got {entry.times!r}")
    of_draw = [] if entry.sequences_of else setting_names(DRAWS[entry.draw])
    of_objective = setting_names(OBJECTIVES[entry.loss])
    if unknown := sorted(map(str, spec.keys() - {*own, *of_draw, *of_objective})):
        known = ", ".join(sorted({*of_draw, *of_objective}))
        raise UsageError(f"{name}: has no setting {unknown[0]!r}; it has weight, {known}")
    objective = read_settings(OBJECTIVES[entry.loss], {k: spec[k] for k in of_objective if k in spec}, name)
    if entry.sequences_of:
        draw = earlier[entry.sequences_of].draw
    else:
        draw = read_settings(
            DRAWS[entry.draw], {k: spec[k] for k in of_draw if k in spec}, name, name=name, sizes=sizes
        )
    field = entry.log or f"{name}_{objective.measure}"
    if field in LOG_FIELDS or not re.fullmatch(r"[A-Za-z]\w*", field):
        raise UsageError(f"{name}.log: {field!r} is no word, or a field that every step has; name another one")
    if entry.budget is not None and isinstance(objective, ForgetObjective):
        raise UsageError(f"{name}.budget: {entry.loss} makes answers unlikely, and a budget bounds what must stay low: "
                         "give it to a term of what stays")  # fmt: skip
    weight = earlier[entry.times].weight * entry.weight if entry.times else entry.weight
    term = Term(name, draw, entry.loss, objective, weight, entry.tokens, entry.mean_over or objective.over, field,
                entry.watch, budget=entry.budget, budget_rate=entry.budget_rate)  # fmt: skip
    return entry, term
