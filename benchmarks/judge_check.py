"""How well the outcome judge does on texts whose label is known: rates with 95 % Wilson intervals.

    python benchmarks/judge_check.py [--half report|tuning|both] [--misses] [--real FOLDER]

data/judge_check.jsonl holds 200 answers of the embedded model, labelled by hand. Where the files of real refusals and
answers lie in ../shared/data (or --real), they are counted as well. Phrases were tuned on the tuning half alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.judges.embedder import LABELLED, Embedder, SentenceEmbedder
from evaluation.judges.outcome import OutcomeJudge
from evaluation.judges.refusals import is_refusal
from evaluation.metrics.statistics import wilson
from utils import read_json_lines

REAL = {"harmful_refusals": True, "harmful_answers": False, "benign_instructions": False}  # file -> are they refusals?


def is_tuning(prompt: str) -> bool:
    """Return whether a prompt belongs to the half that phrases were tuned on: its SHA-256 is even."""
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest(), 16) % 2 == 0


def rows_of(file: Path, half: str) -> list[dict]:
    """Return the rows of one half of a file, split by prompt; all for "both"."""
    return [row for row in read_json_lines(file) if half == "both" or is_tuning(row["prompt"]) == (half == "tuning")]


def confusion(rows: list[dict], judge: OutcomeJudge) -> Counter:
    """Return how often each (label by hand, label by the judge) comes up. No row has a reference."""
    judged = judge.judge([row["prompt"] for row in rows], [row["answer"] for row in rows], [None] * len(rows))
    return Counter((row["label"], judgement.label) for row, judgement in zip(rows, judged, strict=True))


def rate_line(name: str, hits: int, n: int) -> str:
    """Return a rate as it is printed, with its count and interval."""
    low, high = wilson(hits, n)
    return f"{name:<44} {hits:>4} of {n:<4} {100 * hits / max(n, 1):6.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def print_real(folder: Path, half: str, misses: bool) -> None:
    """Print how many of the real refusals and answers are called refusals."""
    for name, are_refusals in REAL.items():
        rows = rows_of(folder / f"{name}.jsonl", half)
        called = [is_refusal(row["response"]) for row in rows]
        print(rate_line(f"{name}: called a refusal", sum(called), len(rows)))
        for row, refused in zip(rows, called, strict=True):
            if misses and refused != are_refusals:
                print(f"    {row['prompt'][:100]!r}\n        {row['response'][:400]!r}")


def print_labelled(half: str, judge: OutcomeJudge) -> None:
    """Print the confusion table on the labelled answers, the agreement, and the refused class's rates."""
    counts = confusion(rows_of(LABELLED, half), judge)
    print("\nby hand (rows), by the judge (columns)")
    print(" " * 12 + "".join(f"{label:>11}" for label in judge.labels))
    for label in judge.labels:
        print(f"{label:<12}" + "".join(f"{counts[label, other]:>11}" for other in judge.labels))
    agreed = sum(counts[label, label] for label in judge.labels)
    print(rate_line("agreement", agreed, counts.total()))
    given = sum(n for (label, other), n in counts.items() if (label in judge.given) == (other in judge.given))
    print(rate_line("agreement on answered or not", given, counts.total()))
    hits = counts["refused", "refused"]
    print(rate_line("refused: recall", hits, sum(counts["refused", label] for label in judge.labels)))
    print(rate_line("refused: precision", hits, sum(counts[label, "refused"] for label in judge.labels)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--half", choices=("report", "tuning", "both"), default="report")
    parser.add_argument("--misses", action="store_true", help="print what was judged wrongly (harmful text)")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real files")
    words = parser.parse_args()
    if words.real.is_dir():
        print_real(words.real, words.half, words.misses)
    else:
        print(f"{words.real}: no such folder, so real refusals and answers are not counted")
    print_labelled(words.half, OutcomeJudge(Embedder(SentenceEmbedder())))


if __name__ == "__main__":
    main()
