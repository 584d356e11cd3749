"""A ledger under ten kills, and one of 200 requests."""

import json
import os
import random
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
    """The process alone is killed, or all of them; what ends is the state that nothing was killed in, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        begin(folder, model_folders["llama"], data_files["facts"], states={}, asked=("R1",))
    started = time.monotonic()
    command("apply", cwd=whole)
    seconds = time.monotonic() - started
    before, draw, killed = (cut / "ledger/ledger.jsonl").read_bytes(), random.Random(29), 0
    for kill in range(10):
        process = subprocess.Popen([sys.executable, str(ROOT / SCRIPT), "apply"], cwd=cut, env=ENVIRONMENT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if kill % 2 else process.kill()
            killed += 1
        process.wait()
        held = run_cli(SCRIPT, "apply", "--dry_run", cwd=cut)
        while held.returncode == 2 and "another process is writing" in held.stderr:  # a script that was left alone
            time.sleep(0.5)
            held = run_cli(SCRIPT, "apply", "--dry_run", cwd=cut)
        assert (cut / "ledger/ledger.jsonl").read_bytes().startswith(before)
        if len(entries(cut)) == 3:
            break
    assert killed >= 3, "it was through before it could be killed"
    command("apply", cwd=cut)
    command("verify", cwd=cut)
    ours, theirs = (load_file(next((folder / "ledger/states/0001").glob("*.safetensors"))) for folder in (whole, cut))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    own = ("at", "hash", "previous", "seconds", "report", "model")
    one, other = ({k: v for k, v in entries(folder)[-1].items() if k not in own} for folder in (whole, cut))
    assert one == other


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
