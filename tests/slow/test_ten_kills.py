"""The real command, killed with SIGKILL at ten moments drawn by the clock, one inside a save, and resumed each time."""

import random
import signal
import subprocess
import sys
import time

from conftest import ENVIRONMENT, ROOT, run_cli
from test_resume import run_killed, same_weights
from test_run import SMALL, data_words


def test_ten_kills_change_no_bit(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['opt']}", *data_words(data_files), *SMALL, "--max_unlearn_steps=60",
             "--save_every=4", "--eval_every=10", "--kl_budget=0.5", "--log_file=out.log",
             "--model_save_dir=out"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert run_cli("unlearn_harm.py", *words, cwd=whole).returncode == 0
    draw = random.Random(20)  # the moments are by the clock, so the seed only spreads them
    killed = 0
    for kill in range(10):
        if kill == 4:
            run = run_killed(cut, [*words, "--resume"], "checkpoint", "sync", 9)  # in the middle of a save
            killed += run.returncode == -signal.SIGKILL
            assert list((cut / "out-checkpoints").glob(".*.part"))
            continue
        command = [sys.executable, str(ROOT / "unlearn_harm.py"), *map(str, words), "--resume"]
        process = subprocess.Popen(command, cwd=cut, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        before = _steps(cut)
        while _steps(cut) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.8))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 8, "a run that has ended cannot be killed: raise --max_unlearn_steps"
    last = run_cli("unlearn_harm.py", *words, "--resume", "--overwrite", cwd=cut)
    assert last.returncode == 0, last.stderr
    assert same_weights(whole / "out", cut / "out")


def _steps(folder) -> int:
    log = folder / "out.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0
