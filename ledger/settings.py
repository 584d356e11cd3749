"""What a ledger was begun with: options of the runs and of the evaluations of its states, and how states follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from command_line import read_yaml, words_of
from ledger.fitting import FittingSettings
from options import read_settings
from utils import UsageError

# what each state's run gets from the ledger itself
OWN_OF_RUN = {"forget_data", "forget_text", "unseen_data", "model_save_dir", "log_file", "cache_dir",
              "start_adapter", "use_lora", "adapter_only", "merge_into_base", "overwrite", "resume", "dry_run",
              "config", "from_manifest", "make_neighbours", "kl_budget", "shard", "load_in_4bit",
              "dev_share", "test_share", "harm_categories", "report_to"}  # fmt: skip
# options of which a state's requests may take something out, and whether they name text
NORMAL = {"normal_data": False, "normal_text": True}
OWN_OF_EVALUATION = {"model_name", "original_name", "forget_data", "forget_text", "report_dir", "train_log", "config",
                     "split", "require"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LedgerSettings:
    """The sections `run`, `evaluation` and `states`, as the entry `init` holds them in `content`."""

    content: dict
    states: FittingSettings

    @classmethod
    def of(cls, content: dict) -> LedgerSettings:
        """Read what the entry `init` holds. Raises UsageError."""
        return cls(content, read_settings(FittingSettings, content.get("states") or {}, "states"))

    def run_words(self, without: Collection[str] = ()) -> list[str]:
        """Return the options of a state's run as arguments. All train adapters, of whole models."""
        return [*self._words("run", without), "--use_lora"]

    def evaluation_words(self, without: Collection[str] = ()) -> list[str]:
        """Return the options of a state's evaluation as arguments."""
        return self._words("evaluation", without)

    def _words(self, section: str, without: Collection[str]) -> list[str]:
        given = self.content.get(section) or {}
        return words_of({name: value for name, value in given.items() if name not in without})

    def normal_of_evaluation(self, run) -> dict[str, list[str]]:
        """Return the normal rows and texts that states are asked, by option: those of the section `evaluation`, else
        the run's. run: the options of a state's run."""
        given = self.content.get("evaluation") or {}
        own = {name: value if isinstance(value, list) else [value] for name in NORMAL if (value := given.get(name))}
        return {name: list(map(str, own.get(name, [])) if own else getattr(run, name)) for name in NORMAL}


def read_settings_file(path: str) -> LedgerSettings:
    """Read the YAML file of `init`. Raises UsageError for what is no section, or an option that is the ledger's own."""
    content = read_yaml(path, "config")
    for name, section in content.items():
        if name not in ("run", "evaluation", "states"):
            raise UsageError(f"--config {path}: unknown section {name!r}; there are run, evaluation and states")
        if not isinstance(section, dict):
            raise UsageError(f"--config {path}: {name} must hold one 'name: value' a line")
    for name, own in (("run", OWN_OF_RUN), ("evaluation", OWN_OF_EVALUATION)):
        given = {str(key).replace("-", "_"): value for key, value in (content.get(name) or {}).items()}
        if wrong := sorted(given.keys() & own):
            raise UsageError(f"--config {path}: {name}.{wrong[0]} is set by the ledger itself; leave it out")
        if name in content:
            content[name] = given
    if "model_name" not in (content.get("run") or {}):
        raise UsageError(f"--config {path}: run.model_name is missing: it names the first original")
    return LedgerSettings.of(content)
