"""TOFU's truth ratio and its aggregates (Maini et al. 2024).

All losses are mean token NLLs in nats, of the answer with the token that ends it, as the authors' code computes them.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

TOFU_SETS = {"Real Authors": "eval_real_author_wo_options.json", "Real World": "eval_real_world_wo_options.json",
             "Retain": "eval_log.json", "Forget": "eval_log_forget.json"}  # fmt: skip


def truth_ratio(true_nll, false_nll) -> np.ndarray:
    """Return exp(NLL of a paraphrased true answer - mean NLL of false ones) of every row: (n,).

    Below 1, the true answer is likelier. true_nll (n,), false_nll (n, m): mean token NLL in nats. Source: TOFU, Maini
    et al. 2024, eq. 1.
    """
    nats = np.asarray(true_nll, float) - np.asarray(false_nll, float).mean(axis=-1)
    return np.exp(np.clip(nats, -700, 700))  # a broken model's would be no finite number


def forget_truth_ratio(ratio):
    """Return min(R, 1 / R) of truth ratios, whose mean TOFU reports of the forget set: 1 if the model cannot tell the
    true answer from false ones."""
    return np.exp(-np.abs(np.log(np.asarray(ratio, float))))


def kept_truth_ratio(ratio):
    """Return max(0, 1 - R) of truth ratios, whose mean TOFU reports of what shall be kept: 1 if the true answer is far
    likelier than false ones."""
    return np.maximum(0, 1 - np.asarray(ratio, float))


def tofu_model_utility(log: dict) -> dict:
    """Return the model utility and its nine parts from an evaluation log in the TOFU authors' layout.

    The same three figures of the forget set, if the log has it, stand beside them; they are no part of the utility. It
    is the harmonic mean of ROUGE-L recall, probability and truth ratio on three sets (Maini et al. 2024,
    sect. 2.2).
    """
    parts = {}
    for name, file in TOFU_SETS.items():
        if name == "Forget" and file not in log:
            continue
        rows = log[file]
        true = np.exp(-_values(rows["avg_gt_loss"]))  # (n,)
        if name.startswith("Real"):  # there the false answers are options: the true one's share among them
            true = true / (true + np.exp(-_values(rows["average_perturb_loss"])).sum(axis=-1))
        ratio = truth_ratio(_values(rows["avg_paraphrased_loss"]), _values(rows["average_perturb_loss"]))
        aggregate = forget_truth_ratio if name == "Forget" else kept_truth_ratio
        parts[f"ROUGE {name}"] = float(_values(rows["rougeL_recall"]).mean())
        parts[f"Prob. {name}"] = float(true.mean())
        parts[f"Truth Ratio {name}"] = float(aggregate(ratio).mean())
    useful = [value for name, value in parts.items() if not name.endswith(" Forget")]
    return {"model_utility": float(scipy.stats.hmean(useful)), **parts}


def forget_quality(ratios, retrained_ratios) -> dict:
    """Return p-value and statistic of the two-sample KS test between the truth ratios of two models on the forget set:
    (n,), (m,).

    The second model never saw the forget set: with a high p-value the two cannot be told apart.
    """
    test = scipy.stats.ks_2samp(ratios, retrained_ratios)
    return {"p_value": float(test.pvalue), "statistic": float(test.statistic)}


def tofu_forget_quality(log: dict, retain_log: dict) -> dict:
    """Return `forget_quality` from two evaluation logs in the TOFU authors' layout."""
    return forget_quality(*(
        truth_ratio(_values(rows["avg_paraphrased_loss"]), _values(rows["average_perturb_loss"]))
        for rows in (log[TOFU_SETS["Forget"]], retain_log[TOFU_SETS["Forget"]])
    ))  # fmt: skip


def _values(by_row) -> np.ndarray:
    """Return the numbers of a log's column, which is a list or {row: number}: (n,) or (n, m)."""
    return np.array(list(by_row.values()) if isinstance(by_row, dict) else by_row, dtype=float)
