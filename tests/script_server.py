"""Run the project's scripts for the tests, each in a process forked from one that has the packages loaded.

    python tests/script_server.py

Loading torch and transformers takes a script seconds, and the tests start a hundred of them. Reads one JSON line a
script from its input, {"script", "argv", "cwd", "stdout", "stderr": files to write}, and answers with its exit code.
"""

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what every script loads, but nothing that starts a thread: a forked process has none of them
MODULES = ("torch", "torch.distributed", "transformers", "transformers.models.auto", "accelerate", "peft", "pandas",
           "datasets", "rouge_score.rouge_scorer", "scipy.stats", "tqdm.auto", "yaml", "jinja2")  # fmt: skip
SCRIPTS = ("unlearn_harm", "evaluate_unlearning", "finetune")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    for name in (*MODULES, *SCRIPTS):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every forked process goes through all that is loaded once more as it ends: 3 s, now 0.6 s
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            run(**asked)  # leaves this process as a script leaves its own
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(script: str, argv: list[str], cwd: str, stdout: str, stderr: str) -> None:
    """Run a script with its arguments; ends the process."""
    os.chdir(cwd)
    for descriptor, name in ((0, os.devnull), (1, stdout), (2, stderr)):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
    sys.argv = [str(ROOT / script), *argv]
    for name in SCRIPTS:  # the script itself runs as a new module, as in a new process
        sys.modules.pop(name, None)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        sys.exit(end.code)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
