"""A ledger under ten kills, and one of 200 requests."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, run_cli
from safetensors.torch import load_file

SCRIPT = "unlearn_requests.py"


def command(name, *words, cwd):
    run = run_cli(SCRIPT, name, *words, cwd=cwd)
    assert run.returncode == 0, (name, run.stdout, run.stderr)
    return run.stdout


def begin(cwd, model, normal, *, states, steps=60, asked=()):
    """Begin a ledger in a folder; asked: ids of requests that are added."""
    cwd.mkdir()
    run = {"model_name": str(model), "normal_data": [str(normal)], "lr": 0.01, "max_unlearn_steps": steps,
           "max_answer_tokens": 8, "dtype": "fp32", "save_every": 5}  # fmt: skip
    evaluation = {"max_new_tokens": 4, "prompts_per_group": 2, "judge_by": "reference"}
    (cwd / "c.yaml").write_text(yaml.safe_dump({"run": run, "evaluation": evaluation, "states": states}))
    command("init", "--config=c.yaml", cwd=cwd)
    for name in asked:
        ask(cwd, name)


def ask(cwd, name):
    rows = [{"prompt": f"Where is key {i} of house {name}?", "response": f"Under stone {i}."} for i in range(3)]
    (cwd / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("add", f"--id={name}", "--rows=rows.jsonl", cwd=cwd)


def entries(cwd):
    return [json.loads(line) for line in (cwd / "ledger/ledger.jsonl").read_text().splitlines()]


def test_ten_kills_inside_apply_leave_it_before_or_after(tmp_path, model_folders, data_files):
    """Each at another moment, of the process alone or of all its own; what then ends is what nothing was killed in.

    A script that is left alone goes on, and holds the ledger until it is done.
    """
    whole, draw, killed = tmp_path / "whole", random.Random(29), 0
    begin(whole, model_folders["llama"], data_files["facts"], states={}, asked=("R1",))
    copies = [shutil.copytree(whole, tmp_path / f"cut{number}") for number in range(10)]
    before, started = (whole / "ledger/ledger.jsonl").read_bytes(), time.monotonic()
    command("apply", cwd=whole)
    seconds = time.monotonic() - started
    for number, cut in enumerate(copies):
        process = subprocess.Popen([sys.executable, str(ROOT / SCRIPT), "apply"], cwd=cut, env=ENVIRONMENT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        time.sleep((0.25 + 0.06 * number + draw.uniform(0, 0.06)) * seconds)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if number % 2 and process.poll() is None else process.kill()
        process.wait()
        held = run_cli(SCRIPT, "apply", "--dry_run", cwd=cut)
        while held.returncode == 2 and "another process is writing" in held.stderr:
            time.sleep(0.5)
            held = run_cli(SCRIPT, "apply", "--dry_run", cwd=cut)
        ledger = (cut / "ledger/ledger.jsonl").read_bytes()
        assert ledger == before or (ledger.startswith(before) and entries(cut)[-1]["what"] == "state")
    assert killed >= 8, "it was through before it could be killed"
    theirs, own = weights_of(whole), ("at", "hash", "seconds", "report", "previous")
    for cut in copies[2:9:3]:
        command("apply", cwd=cut)
        command("verify", cwd=cut)
        ours = weights_of(cut)
        assert all((ours[name] == theirs[name]).all() for name in theirs)
        one, other = ({k: v for k, v in entries(folder)[-1].items() if k not in own} for folder in (whole, cut))
        assert one == other


def weights_of(cwd):
    return load_file(next((cwd / "ledger/states/0001").glob("*.safetensors")))


@pytest.mark.parametrize("count", [200])
def test_two_hundred_requests_grow_no_faster_than_linearly(tmp_path, model_folders, data_files, count):
    cwd, seconds, sizes = tmp_path / "long", [], []
    begin(cwd, model_folders["llama"], data_files["facts"], states={"refit_every": 0, "update_share": 0.2}, steps=10)
    for number in range(count):
        ask(cwd, f"R{number}")
        if number % 50 == 49:
            started = time.monotonic()
            command("apply", cwd=cwd)
            seconds.append(time.monotonic() - started)
            sizes.append((cwd / "ledger/ledger.jsonl").stat().st_size)
    print(f"apply after 50, 100, ... requests: {seconds}; the ledger: {sizes} bytes")
    assert seconds[-1] <= 1.5 * seconds[0] * len(seconds)
    assert sizes[-1] <= 1.5 * sizes[0] * len(sizes)
    started = time.monotonic()
    command("verify", cwd=cwd)
    assert time.monotonic() - started < 30
    assert len(entries(cwd)[-1]["requests"]) == count
