"""Attacks: what an adversary does to get the forgotten answers back.

To add one: write a function `attack(target: AttackTarget) -> list[AttackResult]` in a file of this folder and register
it in ATTACKS. Its name is then valid in --attacks, its worst variant is the figure `attack.NAME` of --require, and its
control is asked likewise. `on_text` is its form for passages of text, which go on where a prompt is answered. A probe
reads the weights instead of answers: it is reported, and brings nothing back.
"""

from evaluation.attacks import (
    ablation,
    logit_lens,
    prompts,
    pruning,
    quantisation,
    reading,
    relearning,
    resampling,
    text,
)
from evaluation.attacks.base import Attack, Probe
from utils import UsageError

WRAPPERS = prompts.WRAPPERS
EXAMPLES, RELEARN = frozenset({"examples"}), frozenset({"relearn"})

ATTACKS: dict[str, Attack | Probe] = {
    "quantise": Attack(run=quantisation.quantise, on_text=quantisation.quantise, family="weights"),
    "prune": Attack(run=pruning.prune, on_text=pruning.prune, family="weights"),
    "ablate": Attack(run=ablation.ablate, family="weights", needs=EXAMPLES),
    "prefill": Attack(run=prompts.prefill, on_text=text.more_words, family="prompt"),
    "suffix": Attack(run=prompts.affirmative_suffix, family="prompt"),
    "rephrase": Attack(run=prompts.rephrase, on_text=text.asked_otherwise, family="prompt"),
    "few_shot": Attack(run=prompts.few_shot, on_text=text.other_passages, family="prompt", needs=EXAMPLES),
    "reverse": Attack(run=reading.reverse_query, family="reading"),
    "sampling": Attack(run=resampling.sampling, on_text=resampling.sampling, family="sampling"),
    "multiple_choice": Attack(run=reading.multiple_choice, family="reading", needs=EXAMPLES),
    "relearn": Attack(
        run=relearning.relearn, on_text=relearning.relearn, family="fine-tuning", needs=RELEARN, control="retrained"
    ),
    "probe": Probe(logit_lens.logit_lens_nll, report_key="layers"),
}


def attack_names(requested: list[str]) -> list[str]:
    """Return the names that --attacks asks for: none, all, or those given. Raises UsageError for an unknown name."""
    if requested == ["none"]:
        return []
    if requested == ["all"]:
        return list(ATTACKS)
    if unknown := [name for name in requested if name not in ATTACKS]:
        raise UsageError(f"--attacks {' '.join(unknown)}: must be all, none, or among {' '.join(ATTACKS)}")
    return requested
