"""Says whether the model hub can be reached, before its clients try for half a minute, and what of it is at hand.

Any answer counts, also an error or one that is late: only a hub (or mirror, HF_ENDPOINT, or proxy) to which no
connection comes about is called unreachable. The question goes through the hub client's own session, which knows
proxies, certificates and what a program set up in its place.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

PATIENCE = 5  # seconds until a connection; HF_HUB_ETAG_TIMEOUT, if it is set, in its place
READ_SECONDS = 1  # a hub that is connected and slow is left to its client
# errors by name, since the client's library was another one twice already
TOO_LATE = "ConnectTimeout"
NO_CONNECTION = {"ConnectError", "ProxyError", "ConnectionError"}


def why_unreachable(name: str, kind: str = "model") -> str | None:
    """Return why a model ("model") or data set ("dataset") cannot be asked for; None if it can, if it is cached, or if
    the client is offline by its own setting, of which it says so itself."""
    return None if is_offline_mode() or is_cached(name, kind) else _no_connection(constants.ENDPOINT)


def is_cached(name: str, kind: str) -> bool:
    """Return whether something of a hub model or data set lies in the local cache."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots")
    return any(folder.glob("*"))


def cached_file(name: str, file: str) -> Path | None:
    """Return a hub model's file in the local cache; None if it was never downloaded, or if no hub model is called so.
    Asks no server."""
    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None


@functools.cache
def _no_connection(endpoint: str) -> str | None:
    """Return why no connection to an address comes about; None if one does. Asked once a process."""
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    errors: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=(seconds, READ_SECONDS, READ_SECONDS, seconds), follow_redirects=False)
            errors.append(None)
        except Exception as error:  # of whichever library the client is built on
            errors.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name with many addresses is tried once for each of them
    asking.start()
    asking.join(seconds)
    kinds = {kind.__name__ for kind in type(errors[0]).__mro__} if errors else {TOO_LATE}
    if TOO_LATE in kinds:
        return f"no connection to {endpoint} within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=30 waits longer"
    if NO_CONNECTION & kinds:
        return f"{endpoint} cannot be reached: {' '.join(str(errors[0]).split())[:100]}"
    return None
