"""Report a run's figures to a tracker as well (`--report_to`), through accelerate's trackers. Knows which figures go
there, and that a tracker is never in the way of a run: what fails in it is one warning, and the run goes on without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from options import UnlearnOptions
from utils import RunLog, log

PROJECT = "unlearning"  # under which a tracker lists its runs
# W&B would also send what is printed, the command line and the repository's address, which name files
QUIET_WANDB = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}
KINDS = {"step": "train", "eval": "eval"}  # events with figures of a step -> what their names begin with


class TrackedLog(RunLog):
    """The log of a run whose events of `KINDS` go to its tracker too: numbers alone, never a prompt or an answer."""

    def __init__(self, options: UnlearnOptions, *, write: bool, resume: bool):
        super().__init__(options.log_file, write=write, resume=resume)
        self._name, self._tracker = options.report_to, None
        if write and self._name != "none":
            self._guarded(lambda: self._start(options))

    def _start(self, options: UnlearnOptions) -> None:
        """Start the tracker. TensorBoard's files lie in a folder beside the log, named as the log and by the time."""
        if self._name not in {str(name) for name in get_available_trackers()}:
            raise RuntimeError(f"the package {self._name} is not installed")
        name = f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        given = {"tensorboard": {"run_name": name, "logging_dir": str(self.path.parent)},
                 "mlflow": {"experiment_name": PROJECT, "run_name": name},
                 "wandb": {"run_name": PROJECT, "name": name, "settings": QUIET_WANDB}}  # fmt: skip
        tracker = LOGGER_TYPE_TO_CLASS[self._name](**given.get(self._name, {"run_name": PROJECT, "name": name}))
        tracker.start()
        settings = dataclasses.asdict(options).items()
        tracker.store_init_configuration(
            {key: value for key, value in settings if isinstance(value, bool | int | float)}
        )
        self._tracker = tracker
        log.info("figures go to %s as well, as run %s", self._name, name)

    def event(self, kind: str, line: str, **fields) -> None:
        """Log an event, and report its numbers at its step."""
        super().event(kind, line, **fields)
        if self._tracker and kind in KINDS:
            numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
            figures = {f"{KINDS[kind]}/{name}": value for name, value in numbers.items() if name != "step"}
            self._guarded(lambda: self._tracker.log(figures, step=fields["step"]))

    def close(self) -> None:
        """End the tracker's run, if it has one."""
        if self._tracker:
            self._guarded(self._tracker.finish)
            self._tracker = None

    def _guarded(self, act: Callable[[], None]) -> None:
        """Do something with the tracker; if it fails, warn and let go of the tracker."""
        try:
            act()
        except Exception as error:  # whatever a tracker raises: no run may fail for it
            self._tracker = None
            log.warning("--report_to %s: %s; the run goes on without it", self._name,
                        " ".join(str(error).split())[:200] or type(error).__name__)  # fmt: skip
