"""What an evaluation reads before any model is loaded: options checked, prompts in groups, tokenizers, given texts."""

from __future__ import annotations

import dataclasses
import hashlib

from data_module import Sides, read_sides, split_sides
from engine.trained_on import TrainedOn
from evaluation import requirements
from evaluation.attacks import attack_names
from evaluation.attacks.rows import read_relearn_data
from evaluation.groups import Group, make_groups, split_by_reference
from evaluation.harness import HarnessPlan, check_harness
from evaluation.holdout import read_holdout
from evaluation.judges.classifier import refuse_no_reward_model
from evaluation.judges.panel import decider, refuse_unknown_judge
from evaluation.likelihood import read_choices, read_text
from evaluation.members import Members, read_members
from evaluation.train_log import TrainLog, read_train_log
from prompts.chat_template import default_template
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from prompts.windows import TextCutter, ask_to_go_on
from sources.rows import Row, read_sources
from utils import UsageError


@dataclasses.dataclass(kw_only=True)
class EvaluationInputs:
    """Everything that is read from files and hubs, apart from the models' weights."""

    models: dict[str, str]  # "retrained" (if there is one), "after", "before", in the order they are asked -> name
    groups: list[Group]
    scored: list[Group]  # the same rows with the responses that the models score
    splits: dict[str, dict[str, dict[str, list[Row]]]]  # "forget" or "keep" -> source -> split -> rows
    formatters: dict[str, PromptFormatter]  # by the label of the model
    attacks: list[str]
    relearn_sets: dict[str, list[Row]]  # of --relearn_data, by name
    train_log: TrainLog
    choice_rows: list[dict]  # multiple-choice questions
    text: str  # whose perplexity is taken
    holdout: dict[str, list[Row]]  # rows with answers that no model ever saw, by source
    harness: HarnessPlan | None  # the tasks of lm-evaluation-harness
    members: Members  # which forget rows a run trained on

    def hash(self) -> str:
        """Return a hash of all rows and texts that were read from files."""
        read = (self.groups, self.splits, self.choice_rows, self.text, self.holdout)
        return hashlib.sha256(repr(read).encode()).hexdigest()


def read_inputs(options) -> EvaluationInputs:
    """Read and check everything that an evaluation needs. Raises UsageError; no model has been loaded by then."""
    sides = read_sides(options)
    formatters = make_formatters(options)
    cutter, trained_on = TextCutter.of(formatters["before"], options), TrainedOn.read(options.model_name)
    splits = by_source(sides, split_sides(sides, options, cutter))
    formatters["before"].check_turns(sides.rows("forget") + sides.rows("normal") + sides.rows("unseen"))
    about = read_sources(options.about_data, "--about_data", fields=options.fields)
    groups = make_groups(splits, formatters["before"].style, options, about)
    if options.judge_by != "outcome":
        groups = split_by_reference(groups)
    ask_texts(groups, formatters)
    for group in groups:
        group.judge = decider(options, side=group.side, has_reference=group.has_references)
    scored = cut_references(groups, formatters["before"])
    attacks = attack_names(options.attacks)
    harness = check_harness(options)
    requirements.refuse_unmeasurable(options, groups, attacks, harness.metrics if harness else {})
    refuse_unknown_judge(options)
    if options.reward_model:
        refuse_no_reward_model(options.reward_model, **options.trust())
    return EvaluationInputs(
        models=model_names(options), groups=groups, splits=splits, formatters=formatters, attacks=attacks,
        relearn_sets=read_relearn_data(options),
        train_log=read_train_log(options.train_log),
        choice_rows=read_choices(options.mc_data, "--mc_data")[: options.mc_rows] if options.mc_data else [],
        scored=scored, holdout=read_holdout(options, sides, cutter, trained_on),
        harness=harness, members=read_members(options, sides, formatters["before"], trained_on),
        text=read_text(options.perplexity_text, "--perplexity_text") if options.perplexity_text else "",
    )  # fmt: skip


def cut_references(groups: list[Group], formatter: PromptFormatter) -> list[Group]:
    """Cut the references to what a generated answer of --max_new_tokens can repeat of them; return the groups as their
    references are scored. Of forget rows, and where there are false answers to compare with, these are whole, as the
    published figures have them and as the rows are that no model saw; of others they are as long as an answer."""
    scored = []
    for group in groups:
        is_whole = group.side == "forget" or any(row.perturbed for row in group.rows)
        rows, group.rows = group.rows, [_cut_reference(row, formatter) for row in group.rows]
        scored.append(dataclasses.replace(group, rows=rows if is_whole else group.rows))
    return scored


def _cut_reference(row: Row, formatter: PromptFormatter) -> Row:
    """Return a row with the beginning of its response, and without an end of turn after what is cut."""
    if not row.response:
        return row
    beginning = formatter.beginning(row.response)
    return dataclasses.replace(row, response=beginning, complete=row.complete and beginning == row.response)


def by_source(sides: Sides, splits: dict) -> dict[str, dict[str, dict[str, list[Row]]]]:
    """Return {"forget" or "keep": {source: its rows by split}}; unseen sources are sources of the forget side."""
    named = {side: zip((source.spec for source in getattr(sides, side)), of_side, strict=True)
             for side, of_side in splits.items()}  # fmt: skip
    return {"forget": dict([*named["forget"], *named["unseen"]]), "keep": dict(named["normal"])}


def ask_texts(groups: list[Group], formatters: dict[str, PromptFormatter]) -> None:
    """Make every passage a question: its first half as it stands is the prompt, the rest is the reference answer.

    Raises UsageError if the two models' tokenizers cut a text differently: they cannot be given the same tokens.
    """
    for group in (group for group in groups if group.is_text):
        text = group.rows[0].response or ""
        cuts = {tuple(formatter.tokenizer(text)["input_ids"]) for formatter in formatters.values()}
        if len(cuts) > 1:
            raise UsageError(f"{group.name}: the tokenizers of the compared models cut it differently, and text "
                             "is compared by token; leave the text out, or give models of one tokenizer")  # fmt: skip
        group.style, group.rows = "raw", [ask_to_go_on(row) for row in group.rows]


def make_formatters(options) -> dict[str, PromptFormatter]:
    """Return the formatter of each model, all with the original's template. Raises UsageError if a model has none."""
    names = model_names(options)
    tokenizers = {label: load_tokenizer(name, trust_remote_code=options.trust_remote_code)
                  for label, name in names.items()}  # fmt: skip
    before = PromptFormatter.of(tokenizers["before"], names["before"], options, options.max_new_tokens)
    for label, tokenizer in tokenizers.items():
        if not default_template(tokenizer) and before.style == "chat":
            raise UsageError(f"{names[label]}: its tokenizer has no chat template and the original's has: copy "
                             "chat_template.jinja beside it, or pass --template qa")  # fmt: skip
        if not default_template(tokenizer) and options.mc_data and options.mc_template == "chat":
            raise UsageError(f"--mc_template chat: the tokenizer of {names[label]} has no chat template; use qa or raw")
    formatters = {"before": before}
    for label in names.keys() - {"before"}:
        if before.chat_template and default_template(tokenizers[label]):
            tokenizers[label].chat_template = before.chat_template  # its own may hold another system message
        formatters[label] = PromptFormatter.of(tokenizers[label], names[label], options, options.max_new_tokens,
                                               before.style)  # fmt: skip
    return formatters


def model_names(options) -> dict[str, str]:
    """Return the models in the order in which they are asked, by label. The original is last, and stays loaded."""
    retrained = {"retrained": options.retrained_name} if options.retrained_name else {}
    return {**retrained, "after": options.model_name, "before": options.original_name}
