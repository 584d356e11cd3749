"""What `--dry_run` says of memory, against what the run then takes, on the embedded model with the demo's rows."""

import json
import re

import pytest
from conftest import ROOT, run_cli

EMBEDDED = ROOT / "models/smollm2-135m-instruct"


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the embedded model is not set up: make test-slow does it")
def test_the_plans_peak_is_the_runs(tmp_path):
    words = ["--config=configs/demo.yaml", "--max_unlearn_steps=12", "--set=dev.prompts=4",
             "--log_file", tmp_path / "a.log",
             "--cache_dir", tmp_path / "cache", "--model_save_dir", tmp_path / "out"]  # fmt: skip
    plan = run_cli("unlearn_harm.py", *words, "--dry_run", cwd=ROOT)
    assert plan.returncode == 0, plan.stderr
    expected = float(re.search(r"^memory +([\d.]+) GiB", plan.stdout, re.M).group(1))
    run = run_cli("unlearn_harm.py", *words, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    measured = json.loads((tmp_path / "out/unlearn_args.json").read_text())["run"]["peak_gib"]
    assert measured == pytest.approx(expected, rel=0.2)
