"""The real command, killed with SIGKILL at ten moments, one inside a save, and resumed each time."""

import random
import re
import signal
import subprocess
import sys
import time

from conftest import ENVIRONMENT, ROOT, run_cli
from test_resume import run_killed, same_weights
from test_run import SMALL, data_words


def test_ten_kills_change_no_bit(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['opt']}", *data_words(data_files), *SMALL, "--max_unlearn_steps=100",
             "--save_every=4", "--eval_every=10", "--kl_budget=0.5", "--log_file=out.log",
             "--model_save_dir=out"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert run_cli("unlearn_harm.py", *words, cwd=whole).returncode == 0
    draw = random.Random(20)
    killed = 0
    for kill in range(10):
        if kill == 4:
            run = run_killed(cut, [*words, "--resume"], "utils", "sync", 9)  # in the middle of a save
            killed += run.returncode == -signal.SIGKILL
            assert list((cut / "out-checkpoints").glob(".*.part")), run.stderr
            continue
        command = [sys.executable, str(ROOT / "unlearn_harm.py"), *map(str, words), "--resume"]
        old = len(_log(cut))
        process = subprocess.Popen(command, cwd=cut, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        # The steps are over in a second or in a minute, as the machine is: which step it is killed after is
        # drawn, so that no machine is through with them early; where in the step that follows, the clock decides.
        last = 6 * kill + draw.randint(1, 6)
        while _last_step(_log(cut)[old:]) < last and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed == 10, "a run that has ended cannot be killed: raise --max_unlearn_steps"
    finished = run_cli("unlearn_harm.py", *words, "--resume", "--overwrite", cwd=cut)
    assert finished.returncode == 0, finished.stderr
    assert same_weights(whole / "out", cut / "out")


def _log(folder) -> list[str]:
    log = folder / "out.jsonl"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def _last_step(lines: list[str]) -> int:
    """The last step that these lines of a log tell of; 0 before the first. Not `events`: a line that is being written
    while it is read may not be whole JSON yet."""
    steps = [found[1] for line in lines if (found := re.match(r'{"event": "step", "step": (\d+),', line))]
    return int(steps[-1]) if steps else 0
