"""How a run's folder is reserved and left, what a checkpoint holds, and which runs are the same one."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from engine.checkpoint import OutputDirLock, describe_leftovers
from utils import UsageError


# ------------------------------------------------------------------------------------------------- the lock
def test_lock_after_a_block_leaves_nothing(tmp_path):
    """Not even the parent folders that the lock file needed."""

    def refused_run():
        with OutputDirLock(tmp_path / "models/mine/out"):
            assert (tmp_path / "models/mine/.out.lock").is_file()
            raise UsageError("refused")

    with pytest.raises(UsageError, match="refused"):
        refused_run()
    assert list(tmp_path.iterdir()) == []


def test_lock_keeps_folders_that_were_there_or_are_used(tmp_path):
    (tmp_path / "models").mkdir()
    lock = OutputDirLock(tmp_path / "models/mine/out")
    lock.close()
    lock.close()
    assert [f.name for f in tmp_path.iterdir()] == ["models"]
    assert list((tmp_path / "models").iterdir()) == []
    with OutputDirLock(tmp_path / "models/mine/out"):
        (tmp_path / "models/mine/out").mkdir()
    assert [f.name for f in (tmp_path / "models/mine").iterdir()] == ["out"]


def test_lock_held_by_another_is_refused_and_stays(tmp_path):
    with OutputDirLock(tmp_path / "out"):
        with pytest.raises(UsageError, match="another run is writing to it"):
            OutputDirLock(tmp_path / "out")
        assert (tmp_path / ".out.lock").is_file()
    OutputDirLock(tmp_path / "out").close()


def test_lock_of_a_process_that_ends_with_an_error_is_removed(tmp_path):
    """As a refusal ends a run: an exception that nobody catches, or sys.exit."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
            "from engine.checkpoint import OutputDirLock\nheld = OutputDirLock(Path('models/out'))\n"
            "assert Path('models/.out.lock').exists()\nsys.exit(2)")  # fmt: skip
    assert run_python("-c", code, cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_parent_survives_a_forked_child(tmp_path):
    with OutputDirLock(tmp_path / "out") as lock:
        if (child := os.fork()) == 0:
            lock.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert lock.path.is_file()


def test_describe_leftovers_names_folder_number_and_size(tmp_path):
    assert describe_leftovers(tmp_path / "out") is None
    (tmp_path / "out-checkpoints").mkdir()
    assert describe_leftovers(tmp_path / "out") is None
    for step in (2, 4):
        folder = tmp_path / f"out-checkpoints/step-{step:06d}"
        folder.mkdir()
        with open(folder / "model.safetensors", "wb") as file:
            file.truncate(3 * 2**28)  # 0.75 GiB, of which the disk holds nothing
    line = describe_leftovers(Path(tmp_path / "out"))
    assert line.startswith(f"{tmp_path / 'out-checkpoints'} still holds 2 checkpoints (1.50 GiB)")
    assert "can be deleted" in line
