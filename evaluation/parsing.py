"""The options of an evaluation: the command line over the data options of the run that made the model."""

from __future__ import annotations

import dataclasses
import sys

from command_line import OneLineParser, config_words, peek, underscored, words_of
from engine.paths import read_args
from evaluation.members import SPLIT_OPTIONS
from evaluation.options import AUTO, EvaluateOptions
from options import DataOptions
from utils import UsageError


def parse_evaluation(argv: list[str] | None = None) -> EvaluateOptions:
    """Read the options of an evaluation; the defaults are those of the training run that made the model."""
    argv = underscored(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(EvaluateOptions)
    argv = config_words(EvaluateOptions, argv) + argv
    own = [side for side in ("forget", "normal")
           if any(peek(argv, f"{side}_{kind}") is not None for kind in ("data", "text"))]  # fmt: skip
    run_argv = words_of_run(peek(argv, "model_name") or EvaluateOptions.model_name, own)
    trained = EvaluateOptions(**vars(parser.parse_args(run_argv)))
    options = EvaluateOptions(**vars(parser.parse_args(run_argv + argv)))
    if options.relearn_lr == AUTO and not options.retrained_name:
        raise UsageError("--relearn_lr auto: it is chosen on a model that never knew the rows: name one with "
                         "--retrained_name, or give a rate")  # fmt: skip
    options.split = options.split or ("test" if run_argv else "all")
    changed = [name for name in SPLIT_OPTIONS if getattr(trained, name) != getattr(options, name)]
    if run_argv and changed and options.split != "all":
        raise UsageError(f"--{changed[0]} {getattr(options, changed[0])}: the run that made {options.model_name} split "
                         f"its rows with {getattr(trained, changed[0])}, so training prompts would be reported as "
                         "unseen; leave the option out, or pass --split all")  # fmt: skip
    return options


def words_of_run(folder: str, own: list[str]) -> list[str]:
    """Return, as arguments, the options that an evaluation takes over from the run that made the model.

    These are its data options, seed and original. `own`: sides that are given data or text of one's own, for which
    the run's data and text are left out, and the run's categories with its forget data.
    """
    made = read_args(folder)
    if made is None:
        return []
    made_with = made["options"]
    names = {field.name for field in dataclasses.fields(DataOptions)} & made_with.keys() | {"seed"}
    names -= {f"{side}_{kind}" for side in own for kind in ("data", "text")}
    if "forget" in own:
        names -= {"unseen_data", "harm_categories"}
    return words_of({"original_name": made_with["model_name"], **{name: made_with[name] for name in sorted(names)}})
