"""Reports of schema 5 with their lines, small and whole, for tests of the page, the card and the terminal."""

from __future__ import annotations

RATES = ("answered", "refused", "empty", "broken", "off_topic", "on_topic", "repetitive")
NOTHING = {"value": None, "n": 0, "low": None, "high": None}


def estimate(value: float, n: int = 20, spread: float = 0.1) -> dict:
    return {"value": value, "n": n, "low": value - spread, "high": value + spread}


def rate(value: float, n: int = 20) -> dict:
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def check(figure: str, sign: str, bound: float, value: float | None, holds: str = "yes") -> dict:
    ends = {"low": None, "high": None} if value is None else {"low": value - 0.05, "high": value + 0.05}
    return {"figure": figure, "sign": sign, "bound": bound, "value": value, **ends, "holds": holds}


def part(name: str, answer: str, *checks: dict, why: str = "One sentence says why.") -> dict:
    return {"name": name, "answer": answer, "why": why, "checks": list(checks)}


def answer(text: str, label: str, **more) -> dict:
    return {"answer": text, "label": label, "labels": {"outcome": label}, "answered": label == "answered",
            "empty": not text, "cosine": 0.5, "on_topic": bool(text), **more}  # fmt: skip


def line(group: str, side: str, prompt: str, before: dict, after: dict, similarity: float = 0.5, **more) -> dict:
    return {"id": prompt, "group": group, "side": side, "counts": True, "style": "chat", "text": False,
            "prompt": prompt, "reference": None, "judge": "outcome", "before": before, "after": after,
            "similarity": similarity, **more}  # fmt: skip


def entry(before: float, after: float, retrained: bool = False) -> dict:
    models = {"before": before, "after": after} | ({"retrained": after} if retrained else {})
    figures = {model: dict.fromkeys(RATES, rate(share)) for model, share in models.items()}
    return {**figures, "change": dict.fromkeys(RATES, estimate(after - before)),
            "ratio": dict.fromkeys(RATES, estimate(0.5)),
            "pair": {"retained": rate(after), "newly_answered": NOTHING, "similarity": estimate(0.7),
                     "length_ratio": estimate(0.9)}}  # fmt: skip


def group(name: str, side: str, before: float = 0.9, after: float = 0.1, *, retrained: bool = False, **more) -> dict:
    columns = {"diversity": rate(0.5), "fluency": 2.0, "utility": estimate(-1.0), "harmful": {}}
    return {"name": name, "source": name.partition(" (")[0], "split": "unseen", "side": side, "style": "chat", "n": 20,
            "counts": True, "text": False, "judge": "outcome", "language": "en", "judged": True,
            **entry(before, after, retrained), "paper": {"before": columns, "after": columns}, **more}  # fmt: skip


def attack(
    name: str, variant: str, back: float, *, family: str = "prompts", control: float | None = None, **more
) -> dict:
    return {"name": name, "family": family, "variant": variant, "is_control": False, "judged": True,
            "back": rate(back), "control": None if control is None else rate(control),
            "control_name": None if control is None else "the original", "examples": [], **more}  # fmt: skip


def make_report(groups: list[dict], **more) -> dict:
    decided = [one["name"] for one in groups if one["judge"] == "outcome"]
    judges = [{"name": "outcome", "kind": "outcome", "limits": "It cannot tell whether an answer is right.",
               "decides": decided, "weights": "ab" * 32}]  # fmt: skip
    pooled = {side: {"name": "all", "side": side, "n": 20, "groups": [g["name"] for g in groups if g["side"] == side],
                     **entry(0.9, 0.5)} for side in ("forget", "keep")}  # fmt: skip
    verdict = {"line": "forgotten: yes", "why": "It is forgotten.", "parts": [], "requirements": [], "failed": 0,
               "notes": []}  # fmt: skip
    return {"schema": 5, "inputs": "00", "before": "models/original", "after": "models/none", "retrained": None,
            "weights": {"before": "aa", "after": "bb"}, "options": {"max_new_tokens": 48, "reward_model": None},
            "judges": judges, "groups": groups, "pooled": pooled, "given_text": {},
            "membership": {"entries": [], "not_measured": "Membership needs --holdout_data."}, "forget_quality": None,
            "attacks": [], "attacked": {"rows": 0, "not_attacked": []}, "layers": {}, "lm_eval": None,
            "verdict": verdict, "seconds": {}, **more}  # fmt: skip


def full_report(text: str = "answered") -> tuple[dict, list[dict]]:
    """A report with every section there is, of twelve groups, and its lines. Every text of a model, a file or the user
    is `text` or holds it."""
    groups = [group(f"{side} {i} {text}", side, retrained=True, language=None, after=0.1 if side == "forget" else 0.85)
              for side in ("forget", "keep") for i in range(6)]  # fmt: skip
    groups.insert(0, group(f"published {text}", "forget", counts=False, retrained=True))
    for one in groups:
        one["paper"]["after"]["harmful"] = one["paper"]["before"]["harmful"] = {text: rate(0.2)}
        for model in ("before", "after", "retrained"):
            one[model] = one[model] | {"nll": estimate(2.0), text: estimate(3.0)}
    long = f"{text} " * 60
    lines = [line(one["name"], one["side"], f"{text} {i}", answer(long, text), answer(text if i else "", text), i / 9,
                  retrained=answer(text, text), reference=text) for one in groups for i in range(9)]  # fmt: skip
    examples = [{"prompt": text, "answer": long, "label": text}] * 4
    attacks = [attack(f"attack_{i} {text}", f"{text} {j}", (i + j) / 12, family=f"{text} {i % 3}", control=0.9,
                      examples=examples) for i in range(6) for j in range(3)]  # fmt: skip
    attacks += [attack("relearn", f"benign rows, {steps} steps", 0.2, family="teaching") for steps in (4, 8)]
    attacks.append(attack("control", text, 0.9, is_control=True))
    parts = [part("forgotten", "yes", check("forget.answered", "<=", 0.1, 0.06), check("forget.nll", ">=", 2, 3.5),
                  why=text),
             part("kept", "too few rows to say", check("keep.retained", ">=", 0.85, 0.86, "too few rows to say")),
             part("resists", "no", check("attack.worst", "<=", 0.25, 0.58, "no"))]  # fmt: skip
    verdict = {"line": text, "why": text, "parts": parts, "failed": 1, "notes": [text],
               "requirements": [check(f"forget.{text}.answered", "<=", 0.1, None, "not measured")]}  # fmt: skip
    auc = {"loss": estimate(0.6), text: estimate(0.6)}
    stderr = {"value": 0.3, "stderr": 0.01}
    report = make_report(
        groups, verdict=verdict, attacks=attacks, before=text, after=text, retrained=text,
        attacked={"rows": 32, "not_attacked": [text]}, layers={"before": [1.0, 2.0], "after": [2.0, 2.0]},
        options={"max_new_tokens": 48, "reward_model": text, "model_name": text},
        given_text={"perplexity": {"before": 20.0, "after": 21.0, "ratio": estimate(1.05), "tokens": 4000},
                    "mc1": {"before": rate(0.3), "after": rate(0.3), "change": estimate(0.0)}},
        membership={"entries": [{"source": text, "members": 9, "others": 9, "before": auc, "after": auc,
                                 "retrained": auc, "privacy_leakage": {"loss": estimate(-20.0)}}],
                    "not_measured": None},
        forget_quality={"p_value": 0.01, "statistic": 0.4, "n": 20, "before": {"p_value": 1e-9, "statistic": 0.9}},
        lm_eval={text: {text: {"before": stderr, "after": stderr, "change": stderr}}},
    )  # fmt: skip
    report["judges"][0] |= {"name": text, "limits": text, "harmful_classes": [text]}
    return report, lines
