"""The rows of a run: what earlier runs trained on, which rows the looks ask, and the account of all in the log."""

from __future__ import annotations

import dataclasses

from data_module import Sides, sample
from engine.paths import made_by_run
from engine.trained_on import TRAINED_ON, TrainedOn
from method.draws import Wanted
from method.sampler import UnlearnBatchSampler
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from run.account import SourceAccount, account_lines, make_account, visits_line
from sources.rows import Row
from utils import RunLog, UsageError, log


def read_chain(model_name: str) -> TrainedOn:
    """Return what earlier runs trained the base on; an empty record if none made it.

    Warns if a run made it and its record is missing.
    """
    found = TrainedOn.read(model_name)
    if found is None and made_by_run(model_name):
        log.warning("%s: a run made it and %s is missing, so what that run trained on may count as unseen: put the "
                    "file back", model_name, TRAINED_ON)  # fmt: skip
    return found or TrainedOn()


def without_seen(splits: dict[str, list[dict]], trained_on: TrainedOn) -> dict[str, list[dict]]:
    """Return the splits with the held-out rows that an earlier run trained on moved to the train split; log how many.

    The evaluation moves them too, with the record that this run leaves.
    """
    moved = {side: [trained_on.move_to_train(parts) for parts in of_side] for side, of_side in splits.items()}
    count = {side: sum(len(after["train"]) - len(before["train"])
                       for before, after in zip(splits[side], moved[side], strict=True)) for side in moved}  # fmt: skip
    if any(count.values()):
        log.info("%d forget and %d normal rows are not held out but train, and %d rows of --unseen_data are not asked: "
                 "earlier runs trained on them", count["forget"], count["normal"], count["unseen"])  # fmt: skip
    return moved


def development_rows(sides: Sides, splits: dict, options: UnlearnOptions, count: int) -> dict[str, list[Row]]:
    """Return {side: dev rows} for the looks during the run. It trains on none of them, unless no forget row is held
    out: the looks then ask listed ones."""
    held_out = [row for side in ("forget", "unseen") for parts in splits[side] for row in parts["dev"]]
    if not held_out and splits["forget"]:
        log.info("the looks ask forget rows that are trained on: none is held out (--unseen_data, --dev_share)")
    forget = sample(held_out or [row for parts in splits["forget"] for row in parts["train"]], count, options.seed)
    by_spec = {source.spec: parts["dev"] for source, parts in zip(sides.normal, splits["normal"], strict=True)}
    share = -(-count // len(by_spec))  # of each source, even if it is listed twice
    normal = [row for rows in by_spec.values() for row in sample(rows, share, options.seed)]
    if options.kl_budget and not normal:
        raise UsageError("--kl_budget: no normal row is held out to measure it on; raise --dev_share or give more rows")
    return {"forget": forget, "normal": normal}


def log_account(
    run_log: RunLog, sampler: UnlearnBatchSampler, formatter: PromptFormatter, options: UnlearnOptions, sides: Sides,
    splits: dict,
) -> list[SourceAccount]:  # fmt: skip
    """Log what became of the rows of each source, and what of it the run does not use; return the account."""
    limits = {side: sampler.answer_tokens(side) or options.max_answer_tokens
              for side in ("forget", "normal")}  # fmt: skip
    account = make_account(sides, splits, formatter, limits)
    if any(draw.teaches for draw in sampler.draws):
        account = [dataclasses.replace(source, side="learned") for source in account]
    lines = account_lines(account)
    run_log.event("rows", "\n".join(lines), sources=[dataclasses.asdict(source) for source in account])
    visited = {(e.source, e.index) for e in sampler.examples("forget")}
    trained = sum(map(len, sampler.rows["forget"]))
    if line := visits_line(trained, len(visited), options.max_unlearn_steps):
        log.warning(line)
    wanted = sum(source.wanted for source in account if source.side == "forget")
    if wanted and not any(isinstance(draw, Wanted) for draw in sampler.draws):
        log.info("%d wanted answers are not trained on: no term of --method %s draws them", wanted,
                 options.method)  # fmt: skip
    return account
