"""--deterministic: torch's kernels that add in one order."""

from conftest import ROOT, run_python


def test_deterministic_takes_torchs_kernels_of_one_order():
    """In a process of its own: the switch holds for all that follows."""
    run = run_python("-c", "import os, torch, utils\n"
                     "utils.seed_everything(1)\n"
                     "assert not torch.are_deterministic_algorithms_enabled()\n"
                     "utils.seed_everything(1, deterministic=True)\n"
                     "assert torch.are_deterministic_algorithms_enabled()\n"
                     "assert torch.is_deterministic_algorithms_warn_only_enabled(), 'it would end the run'\n"
                     "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n", cwd=ROOT)  # fmt: skip
    assert run.returncode == 0, run.stderr
