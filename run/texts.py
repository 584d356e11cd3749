"""What a run does with rows of text, which have no prompt: which terms it refuses, and what it says of the others."""

from __future__ import annotations

from method.terms import Term
from sources.rows import Row
from utils import UsageError, log


def has_text(sources: dict[str, list[list[Row]]]) -> bool:
    """Return whether a side has a source of text."""
    return any(rows and rows[0].is_text for of_side in sources.values() for rows in of_side)


def refuse_terms_without_prompts(terms: list[Term], options, sources: dict[str, list[list[Row]]]) -> None:
    """Raise UsageError for terms that need a forget prompt if all forget rows are text.

    If some are, the log says that these terms leave the text out.
    """
    rows = [row for source in sources["forget"] for row in source]
    of_prompts = [term for term in terms if term.draw.needs_prompt and any(map(term.draw.is_of_kind, rows))]
    is_text = [rows[0].is_text for rows in sources["forget"]]
    if not of_prompts or not any(is_text):
        return
    names = ", ".join(term.name for term in of_prompts)
    if not all(is_text):
        log.info("%s: after prompts only, since the passages of --forget_text have none", names)
        return
    entries = {entry["name"]: entry for entry in options.recipe["terms"]}
    weights = [entries[term.name].get("weight_option") for term in of_prompts]
    switches = dict.fromkeys(f"--{weight} 0" if weight else f"--set {term.name}.weight=0"
                             for term, weight in zip(of_prompts, weights, strict=True))  # fmt: skip
    raise UsageError(f"--forget_text: the term {names} of --method {options.method} needs prompts, and text has none: "
                     f"leave it out with {' '.join(switches)}, or name prompts with --forget_data")  # fmt: skip
