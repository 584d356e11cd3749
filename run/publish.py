"""A saved model's way to the hub (`--push_to_hub`): which of its files go there, and that a run never fails for it."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from options import UnlearnOptions
from utils import UsageError, log

# What tells of the rows stays here: hashes of those that were trained on, by which one who guesses a row can tell that
# it was there, and files, counts and categories of them.
KEPT_HERE = ("trained_on.json", "run_manifest.json", "*_args.json")


def refuse_bad_name(options: UnlearnOptions) -> None:
    """Raise UsageError if --push_to_hub is no name that the hub takes; warn if nobody is logged in."""
    if options.push_to_hub is None:
        return
    from huggingface_hub import get_token  # of the hub's client, which most runs do without
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(options.push_to_hub)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {options.push_to_hub}: {' '.join(str(error).split())}; give it as "
                         "OWNER/NAME") from error  # fmt: skip
    if get_token() is None:
        log.warning("--push_to_hub %s: nobody is logged in at the hub, so the model will stay here; 'hf auth login' "
                    "before the run ends, or HF_TOKEN, mends that", options.push_to_hub)  # fmt: skip


def push(folder: Path, name: str) -> None:
    """Put a model with its card on the hub, in a repository that is private if it is new. What fails is a warning."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        name = api.create_repo(name, private=True, exist_ok=True).repo_id  # with the owner, if only the name was given
        commit = api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=list(KEPT_HERE),
                                   commit_message="The model after unlearning")  # fmt: skip
    except Exception as error:  # of the network, the hub or its client: the model is saved, and stays so
        log.warning("--push_to_hub %s: %s; the model is in %s, and 'hf upload %s %s --exclude %s' puts it there", name,
                    " ".join(str(error).split())[:200] or type(error).__name__, folder, name, folder,
                    " ".join(map(repr, KEPT_HERE)))  # fmt: skip
        return
    kept = sorted(path.name for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, one) for one in KEPT_HERE))
    log.info("the model is on the hub as %s (%s); not put there, since they tell of its rows: %s", name,
             commit.commit_url, ", ".join(kept))  # fmt: skip
