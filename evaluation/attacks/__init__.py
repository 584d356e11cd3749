"""Attacks: what an adversary does to get the forgotten answers back.

To add one: write a function `attack(target: AttackTarget) -> list[AttackResult]` in a file of this folder and register
it in ATTACKS. Its name is then valid in --attacks, and its worst variant is the figure `attack.NAME` of --require.
A probe reads the weights instead of answers: it is reported, and brings nothing back.
"""

from evaluation.attacks import logit_lens, prompts, quantisation, relearning, resampling
from evaluation.attacks.base import Attack, Probe
from utils import UsageError

WRAPPERS = prompts.WRAPPERS

ATTACKS: dict[str, Attack | Probe] = {
    "quantise": Attack(quantisation.quantise),
    "prefill": Attack(prompts.prefill),
    "rephrase": Attack(prompts.rephrase),
    "few_shot": Attack(prompts.few_shot, needs_examples=True),
    "sampling": Attack(resampling.sampling),
    "relearn": Attack(relearning.relearn, needs_examples=True),
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
