"""A recipe on the planted model with several seeds, under attack, and a table of what each gave: make recipe-full.

    python benchmarks/recipe_seeds.py NAME [--seeds 1 2 3] [--attacks quantise prefill ...] [--at_once 3]

Each seed is a run of recipes/NAME/planted.yaml and an evaluation of recipes/NAME/evaluate.yaml, of all planted rows,
by the scripts themselves. A report that is there already is read again. The planted model and the twin are the same for
all seeds: their answers are asked once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.figures import figures
from evaluation.metrics.statistics import Estimate
from evaluation.stages import ASKED_BY, take_answers

ATTACKS = ["quantise", "prefill", "rephrase", "few_shot", "relearn"]
FIGURES = (r"(forget|keep)\.(?!published|all)[^.]*\.(answered|wanted_given|recall|extraction_strength)"
           r"|forget\.(forget_quality|auc_min_k|privacy_leakage)|attack\..*")  # fmt: skip
ALL_PROMPTS = 220  # of a group: more than any planted one has; of the 840 everyday prompts a sample
MODELS = ("before", "retrained")  # the unlearned model's figures have no such ending


def report_folder(name: str, seed: int) -> Path:
    """Return where the report of one seed lies."""
    return ROOT / "reports" / f"{name}-seed{seed}"


def report_of(name: str, seed: int, options: argparse.Namespace, earlier: Path | None) -> dict:
    """Run a recipe with one seed, and its evaluation; return report.json.

    earlier: another seed's report, from which the answers of the models that all seeds share are taken.
    """
    run, folder = f"{name}-seed{seed}", report_folder(name, seed)
    if not (folder / "report.json").is_file():
        recipe = ROOT / "recipes" / name
        _script("unlearn_harm.py", "--config", recipe / "planted.yaml", "--seed", seed, "--model_save_dir",
                f"models/{run}", "--log_file", f"logs/{run}.log", "--overwrite", "--resume")  # fmt: skip
        if earlier is not None:
            take_answers(earlier, folder)
        _script("evaluate_unlearning.py", "--config", recipe / "evaluate.yaml", "--model_name", f"models/{run}",
                "--train_log", f"logs/{run}.jsonl", "--report_dir", folder, "--prompts_per_group", options.prompts,
                "--attacks", *options.attacks, "--attack_prompts", options.attack_prompts,
                "--seed", ASKED_BY)  # fmt: skip
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _script(name: str, *words) -> None:
    """Run a script of the suite as a user does; its failure ends this one."""
    subprocess.run([sys.executable, ROOT / name, *map(str, words)], check=True, cwd=ROOT)


def table(reports: list[dict], wanted: str) -> list[str]:
    """Return lines: a figure's name, its value before and in the twin, and with its interval for each seed."""
    found = [figures(report) for report in reports]
    names = [name for name, figure in found[0].items() if figure.value is not None and re.fullmatch(wanted, name)
             and name.rpartition(".")[2] not in MODELS]  # fmt: skip
    lines = []
    for name in names:
        beside = [_value(found[0].get(f"{name}.{model}")) for model in MODELS]
        seeds = [_value(of_seed.get(name), interval=True) for of_seed in found]
        lines.append(
            " | ".join([f"{name:<60}", *(f"{text:>6}" for text in beside), *(f"{text:>22}" for text in seeds)])
        )
    return lines


def _value(figure: Estimate | None, *, interval: bool = False) -> str:
    if figure is None or figure.value is None:
        return "-"
    return f"{figure.value:.3g}" + (f" ({figure.low:.3g} to {figure.high:.3g})" if interval and figure.low is not None
                                    else "")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a folder of recipes/ with planted.yaml and evaluate.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=ALL_PROMPTS, help="--prompts_per_group")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--attack_prompts", type=int, default=32, help="of the forgotten ones, that are attacked")
    parser.add_argument(
        "--at_once", type=int, default=1, help="seeds side by side, for a GPU: small models leave it idle"
    )
    parser.add_argument("--figures", default=FIGURES, help="regular expression of the figures' names")
    options = parser.parse_args()
    if not (ROOT / "recipes" / options.name / "planted.yaml").is_file():
        sys.exit(
            f"recipe_seeds.py: recipes/{options.name}/planted.yaml is not there: name a recipe for the planted model"
        )
    if options.at_once == 1:
        reports, earlier = [], None
        for seed in options.seeds:
            reports.append(report_of(options.name, seed, options, earlier))
            earlier = report_folder(options.name, seed)
    else:  # the shared models are then asked by each
        with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
            reports = list(pool.map(lambda seed: report_of(options.name, seed, options, None), options.seeds))
    print("\n".join([f"figure | before | twin | seeds {', '.join(map(str, options.seeds))}"]
                    + table(reports, options.figures)))  # fmt: skip


if __name__ == "__main__":
    main()
