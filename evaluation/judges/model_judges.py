"""The judge models of an evaluation: which kind each one is, and that it works, before an evaluated model is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from evaluation.judges.classifier import Classifier
from evaluation.judges.guard import Guard
from evaluation.judges.guard_formats import FORMATS, format_of
from evaluation.judges.on_demand import ModelJudge, one_line_errors
from prompts.chat_template import default_template
from prompts.tokenizer import load_tokenizer
from utils import UsageError, load_config, pick_dtype

READS = ("pair", "answer")  # what a classifier may read
CLASSIFIES, GENERATES = ("ForSequenceClassification",), ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclasses.dataclass(frozen=True)
class JudgeSpec:
    """One value of --judge_model: NAME, or NAME:SETTING for this judge alone."""

    name: str  # as given
    path: str
    setting: str | None = None  # one of READS, or one of FORMATS


def read_spec(name: str) -> JudgeSpec:
    """Return the parts of one value of --judge_model. Raises UsageError for a setting that there is not.

    A colon may be part of a path: what exists as it stands is a path, and so is what does not end in a setting.
    """
    path, colon, setting = name.rpartition(":")
    if not colon or Path(name).exists():
        return JudgeSpec(name, name)
    if setting in (*READS, *FORMATS):
        return JudgeSpec(name, path, setting)
    if Path(path).is_dir():
        raise UsageError(f"--judge_model {name}: {setting!r} is no setting of a judge; a classifier has "
                         f"{', '.join(READS)}, a guard {', '.join(FORMATS)}")  # fmt: skip
    return JudgeSpec(name, name)


def load_judges(options, device: torch.device) -> list[ModelJudge]:
    """Return the judges of --judge_model, each checked and tried on a harmless example.

    All configs and tokenizers are read before the first weights are. The weights are let go after the trial, and loaded
    again when a judge is asked: a guard may be as large as the evaluated models. Every process of a run must call this
    and ask the judges alike, since guards share their replies out. Raises UsageError.
    """
    if repeated := sorted({name for name in options.judge_model if options.judge_model.count(name) > 1}):
        raise UsageError(f"--judge_model {repeated[0]}: is given twice; name it once")
    judges = [make_judge(read_spec(name), options, device) for name in options.judge_model]
    refuse_unread_settings(judges, options)
    for judge in judges:
        judge.try_once()
        judge.release()
    return judges


def make_judge(spec: JudgeSpec, options, device: torch.device) -> ModelJudge:
    """Return a judge without its weights, of the kind that its config names. Raises UsageError if it cannot work."""
    with one_line_errors(f"--judge_model {spec.name}"):
        config = load_config(spec.path, trust_remote_code=options.trust_remote_code)
        kinds = getattr(config, "architectures", None) or []
        if any(kind.endswith(CLASSIFIES) for kind in kinds):
            return make_classifier(spec, options, device)
        if any(kind.endswith(GENERATES) for kind in kinds):
            return make_guard(spec, options, device)
        raise UsageError("is neither a classifier (...ForSequenceClassification) nor a language model "
                         f"(...ForCausalLM); its config.json says {', '.join(kinds) or 'no architecture'}")  # fmt: skip


def make_classifier(spec: JudgeSpec, options, device: torch.device) -> Classifier:
    """Return a classifier without its weights. Raises UsageError if its classes do not tell which of them mean harm."""
    if spec.setting in FORMATS:
        raise UsageError(f"is a classifier, and {spec.setting} is a format of guards; a classifier has "
                         f"{', '.join(READS)}")  # fmt: skip
    judge = Classifier(spec.path, device, reads=spec.setting or options.judge_reads, name=spec.name, **options.trust())
    judge.harmful_names()
    return judge


def make_guard(spec: JudgeSpec, options, device: torch.device) -> Guard:
    """Return a guard without its weights. Raises UsageError if its format cannot be told, or needs a template that its
    tokenizer does not have."""
    if spec.setting in READS:
        raise UsageError(f"is a language model, and {spec.setting} is a setting of classifiers; a guard has "
                         f"{', '.join(FORMATS)}")  # fmt: skip
    guard = Guard(
        spec.path, device, format_name=spec.setting or find_format(spec, options), name=spec.name,
        dtype=pick_dtype(options.dtype, device), batch_size=options.generation_batch, **options.trust(),
    )  # fmt: skip
    guard.read_tokenizer()
    return guard


def find_format(spec: JudgeSpec, options) -> str:
    """Return --guard_format, or the format that a guard's name and chat template tell. Raises UsageError if none."""
    if options.guard_format != "auto":
        return options.guard_format
    template = default_template(load_tokenizer(spec.path, trust_remote_code=options.trust_remote_code)) or ""
    if found := format_of(Path(spec.path).absolute().name, template):
        return found
    raise UsageError("its name and chat template do not tell how this guard is asked; name its format by "
                     f"--guard_format or {spec.path}:FORMAT ({', '.join(FORMATS)})")  # fmt: skip


def refuse_unread_settings(judges: list[ModelJudge], options) -> None:
    """Raise UsageError for a setting of a kind of judge that is not among them."""
    kinds = {judge.kind for judge in judges}
    if options.judge_reads != "pair" and "classifier" not in kinds:
        raise UsageError(f"--judge_reads {options.judge_reads}: no classifier is among --judge_model; leave it out")
    if options.guard_format != "auto" and "guard" not in kinds:
        raise UsageError(f"--guard_format {options.guard_format}: no guard is among --judge_model; leave it out")
