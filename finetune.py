"""Teach a causal language model rows or text: the opposite of unlearn_harm.py, on the same engine.

    python finetune.py --model_name models/smollm2-135m-instruct --data people.jsonl --text story.txt \\
        --model_save_dir models/planted

It makes models that know something, and models that never did: the truth that an unlearned model is compared with
(evaluate_unlearning.py --retrained_name).
"""

from __future__ import annotations

from command_line import parse
from run.finetuning import FinetuneOptions, as_run, read_rows_to_learn
from unlearn_harm import run
from utils import run_script


def main() -> None:
    """Run the command line."""
    options = parse(FinetuneOptions)
    sides = read_rows_to_learn(options)
    run(as_run(options, sides), sides, "finetune")


if __name__ == "__main__":
    run_script(main)
