"""The plots of the page, as SVG text. Every line has a colour and a shape of its own, for the colour-blind."""

from __future__ import annotations

import io
import itertools
import math

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from evaluation.attacks.base import read_step_label
from evaluation.train_log import LoggedTerm, TrainLog

matplotlib.rcParams["text.parse_math"] = False  # a file's name may hold dollar signs
BEFORE_COLOUR, AFTER_COLOUR, GREEN, PURPLE = "#b35806", "#2166ac", "#1b7837", "#762a83"
TERM_COLOURS = (BEFORE_COLOUR, AFTER_COLOUR, GREEN, "#e69f00", "#000000", "#d6604d")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MEASURE_NAMES = {"nll": "NLL", "kl": "KL to the original"}
UNITS = {"nll": "nats a token", "kl": "nats a token"}


def relearn_plot(report: dict) -> str | None:
    """Plot the recovered share over the steps of fine-tuning, a line per attack and kind of rows; None if no attack has
    steps."""
    curves: dict[tuple[str, str], list] = {}
    for attack in report.get("attacks", []):
        label = read_step_label(attack["variant"])
        if label and attack["back"]["value"] is not None:
            kind, step = label
            curves.setdefault((attack["name"], kind), []).append((step, attack["back"]))
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(7, 2.8))
    styles = itertools.cycle(zip(("o-", "s--", "^:", "D"), (BEFORE_COLOUR, AFTER_COLOUR, GREEN, PURPLE), strict=True))
    for ((_, kind), points), (line, colour) in zip(curves.items(), styles, strict=False):
        if len(points) > 1:
            points = [(0, {"value": 0.0, "low": 0.0, "high": 0.0}), *points]  # attacked is what was forgotten
        steps, rates = zip(*points, strict=True)
        values = [rate["value"] for rate in rates]
        errors = [[v - rate["low"] for v, rate in zip(values, rates, strict=True)],
                  [rate["high"] - v for v, rate in zip(values, rates, strict=True)]]  # fmt: skip
        axes.errorbar(steps, values, yerr=errors, fmt=line, color=colour, capsize=2, label=kind)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("share that is back")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def front_plot(runs: list[dict]) -> str:
    """Plot a sweep's runs: harmful answers on topic against the worst kept ratio. The Pareto front is joined."""
    figure, axes = plt.subplots(figsize=(7, 4))
    front = [run for run in runs if run["on_front"]]
    axes.plot([r["forget"] for r in front], [r["keep"] for r in front], "s-", color=AFTER_COLOUR, label="front")
    others = [run for run in runs if not run["on_front"]]
    axes.plot([r["forget"] for r in others], [r["keep"] for r in others], "o", color=BEFORE_COLOUR, label="beaten")
    for run in runs:
        axes.annotate(run["run"].replace(",", "\n"), (run["forget"], run["keep"]), fontsize=6,
                      xytext=(4, -4), textcoords="offset points", va="top")  # fmt: skip
    axes.set_xlabel("harmful prompts still on topic (less is better)")
    axes.set_ylabel("worst kept ratio of on-topic answers (more is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def layers_plot(layers: dict) -> str:
    """Plot the NLL of the forgotten answers after every layer of both models."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    for label, colour, marker in (("before", BEFORE_COLOUR, "o"), ("after", AFTER_COLOUR, "s")):
        axes.plot(range(len(layers[label])), layers[label], marker, ls="-", ms=4, color=colour, label=label)
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return _svg(figure)


def curves_plot(log: TrainLog) -> str:
    """Plot every term of the run over its steps: NLL above, all other measures below with the development KL."""
    evals = [event for event in log.evals if event.get("dev_kl") is not None]
    above = [term for term in log.terms if term.measure == "nll"]
    below = [term for term in log.terms if term.measure != "nll"]
    panels = [terms for terms, is_drawn in ((above, bool(above)), (below, bool(below or evals))) if is_drawn]
    figure, grid = plt.subplots(len(panels), 1, figsize=(7, 2.5 * len(panels)), sharex=True, squeeze=False)
    places = {term.field: i for i, term in enumerate(log.terms)}
    for axes, terms in zip(grid[:, 0], panels, strict=True):
        for term in terms:
            _term_line(axes, term, log.steps, places[term.field])
        units = [UNITS.get(term.measure, term.measure) for term in terms]
        if terms is below and evals:
            axes.plot([event["step"] for event in evals], [event["dev_kl"] for event in evals], "D", color=PURPLE,
                      label="development KL", gid="development-kl")  # fmt: skip
            units.append(UNITS["kl"])
        axes.set_ylabel(" / ".join(dict.fromkeys(units)))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    grid[-1, 0].set_xlabel("step")
    return _svg(figure)


def _term_line(axes, term: LoggedTerm, steps: list[dict], place: int) -> None:
    """Draw one term over the steps, with a gap where a step holds no value. `place`: the term's in the objective."""
    values = [event.get(term.field) for event in steps]
    axes.plot([event["step"] for event in steps], [math.nan if value is None else value for value in values],
              color=TERM_COLOURS[place % len(TERM_COLOURS)], ls=LINE_STYLES[place % len(LINE_STYLES)],
              label=term_label(term), gid=f"term-{term.field}")  # fmt: skip


def term_label(term: LoggedTerm) -> str:
    """Return a term's entry in the legend, such as 'bad_loss (NLL, rises)'."""
    details = [MEASURE_NAMES.get(term.measure, term.measure), term.better]
    return f"{term.field} ({', '.join(filter(None, details))})"


# ------------------------------------------------------------------------------------------------- parts
def _svg(figure) -> str:
    """Return a figure as the text of an <svg> element, the same bytes for the same figure, and close it."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "unlearning"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prolog, which names an address
