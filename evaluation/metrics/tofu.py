"""TOFU's truth ratio and its two aggregates (Maini et al. 2024)."""

from __future__ import annotations

import numpy as np
import scipy.stats

TOFU_SETS = {"Real Authors": "eval_real_author_wo_options.json", "Real World": "eval_real_world_wo_options.json",
             "Retain": "eval_log.json"}  # fmt: skip


def truth_ratio(true_nll, false_nll) -> np.ndarray:
    """Return exp(NLL of a paraphrased true answer - mean NLL of false ones) of every row: (n,).

    Below 1, the true answer is likelier. true_nll (n,), false_nll (n, m): mean token NLL in nats. Source: TOFU, Maini
    et al. 2024, eq. 1.
    """
    return np.exp(np.asarray(true_nll, float) - np.asarray(false_nll, float).mean(axis=-1))


def tofu_model_utility(log: dict) -> dict:
    """Return the model utility and its nine parts from an evaluation log in the TOFU authors' layout.

    It is the harmonic mean of ROUGE-L recall, probability and truth ratio on three sets (Maini et al. 2024, sect. 2.2).
    """
    parts = {}
    for name, file in TOFU_SETS.items():
        rows = log[file]
        true = np.exp(-_values(rows["avg_gt_loss"]))  # (n,)
        if name != "Retain":  # there the false answers are options: the true one's share among them
            true = true / (true + np.exp(-_values(rows["average_perturb_loss"])).sum(axis=-1))
        ratio = truth_ratio(_values(rows["avg_paraphrased_loss"]), _values(rows["average_perturb_loss"]))
        parts[f"ROUGE {name}"] = float(_values(rows["rougeL_recall"]).mean())
        parts[f"Prob. {name}"] = float(true.mean())
        parts[f"Truth Ratio {name}"] = float(np.maximum(0, 1 - ratio).mean())
    return {"model_utility": float(scipy.stats.hmean(list(parts.values()))), **parts}


def tofu_forget_quality(log: dict, retain_log: dict) -> dict:
    """Return p-value and statistic of the two-sample KS test between two models' truth ratios on the forget set.

    `retain_log` is the log of a model that never saw the forget set: with a high p-value the two cannot be told apart.
    """
    ratios = [truth_ratio(_values(rows["avg_paraphrased_loss"]), _values(rows["average_perturb_loss"]))
              for rows in (log["eval_log_forget.json"], retain_log["eval_log_forget.json"])]  # fmt: skip
    test = scipy.stats.ks_2samp(*ratios)
    return {"p_value": float(test.pvalue), "statistic": float(test.statistic)}


def _values(by_row) -> np.ndarray:
    """Return the numbers of a log's column, which is a list or {row: number}: (n,) or (n, m)."""
    return np.array(list(by_row.values()) if isinstance(by_row, dict) else by_row, dtype=float)
