"""What a run is about to do, said before it downloads anything: a call without options takes a model and data sets."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from evaluation.page.model_card import hub_dataset
from hub import is_cached
from options import UnlearnOptions
from sources.folders import TRUTHFULQA_URL
from utils import looks_local


def announcement(options: UnlearnOptions) -> list[str]:
    """Return the lines that say what a run takes from where, does and writes; none if it downloads nothing."""
    remote = _downloads(options)
    if not remote:
        return []

    def named(names: list[str]) -> str:
        return ", ".join(f"{name} (from {remote[name]})" if name in remote else name for name in names)

    weights = "adapters" if options.use_lora else "whole weights"
    return [
        "this run will" + (" only show its plan (--dry_run):" if options.dry_run else ":"),
        f"  load    {named([options.model_name])}",
        f"  forget  {named(options.forget_data + options.forget_text)}",
        f"  keep    {named(options.normal_data + options.normal_text)}",
        *([f"  look at {named(options.unseen_data)}"] if options.unseen_data else []),
        f"  train   {weights} by --method {options.method}, at most {options.max_unlearn_steps} steps of "
        f"{options.batch_size} forget rows at a rate of {options.lr:g}",
        f"  save    {options.model_save_dir}, its log in {options.log_file}",
    ]


def _downloads(options: UnlearnOptions) -> dict[str, str]:
    """Return {model or data set: where it is downloaded from} of all that is neither local nor cached."""
    found = {}
    model = options.model_name
    if not (looks_local(model) or Path(model).exists() or is_cached(model, "model")):
        found[model] = constants.ENDPOINT
    for spec in options.forget_data + options.normal_data + options.unseen_data:
        name = hub_dataset(spec)
        if name and not is_cached(name, "dataset"):
            found[spec] = constants.ENDPOINT
        elif Path(spec).name == Path(TRUTHFULQA_URL).name and not Path(spec).exists():
            found[spec] = TRUTHFULQA_URL.partition("/main/")[0]
    return found
