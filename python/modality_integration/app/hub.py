"""Locate the files of a name: in a folder, in the hub's cache, or on the hub, with one short request.

transformers retries for half a minute before it reports that there is no network.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

from modality_integration.app.errors import InputError

SECONDS = 5.0  # to wait for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT is set
_OF_THE_LIBRARY = 3.0
# A cached model, adapter or processor has at least one of these.
_FIRST_FILES = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")


class Source(NamedTuple):
    """Where files are read from: `folder`, or if that is None, the hub name `name`."""

    name: str
    folder: Path | None
    revision: str | None = None
    note: str | None = None

    @property
    def where(self) -> str:
        """The name for transformers' `from_pretrained`; for a cached hub name, the folder in the cache.

        Given a hub name, transformers asks the hub for more than it needs, even with local_files_only.
        """
        return self.name if self.folder is None else str(self.folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`. Code shipped with a model is never run, without prompting."""
        local = self.folder is not None
        return {"local_files_only": local, "revision": None if local else self.revision, "trust_remote_code": False}

    def file(self, name: str) -> Path | None:
        """The file of that name, downloaded if necessary; None if there is none."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(self.name, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)


def find(what: str, name: str, revision: str | None = None) -> Source:
    """Locate the files of `name`. what: the argument it was given as, for messages.

    Raises InputError within seconds if they are neither local nor available on the hub.
    """
    if Path(name).is_dir():
        return Source(name, Path(name))
    if Path(name).exists():
        raise InputError(f"{what}: {name} is a file; pass the folder that contains it")
    if looks_like_path(name):
        raise InputError(f"{what}: {name} does not exist")

    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{what}: {name!r} is neither a local folder nor a valid hub name") from None
    cached = cached_folder(name, revision)
    if cached and cached.name == revision:  # a commit never changes
        return Source(name, cached, revision)
    why = _why_unreachable(what, name, revision)
    if why is None:
        return Source(name, None, revision)
    if cached:
        return Source(name, cached, revision, f"{name} was read from the hub's cache (commit {cached.name[:8]}): {why}")
    at = f" at revision {revision}" if revision else ""
    raise InputError(
        f"{what}: {name} is not a local folder, the hub's cache ({HF_HUB_CACHE}) does not contain it{at}, and "
        f"{ENDPOINT} cannot be reached ({why}); offline, pass the folder where it was saved"
    )


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of `name` at `revision` in the hub's cache, named after the commit; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    for file in _FIRST_FILES:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be a folder: a hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _why_unreachable(what: str, name: str, revision: str | None) -> str | None:
    """None if the hub knows `name`, else why it cannot be reached. Sends the one request that starts every download.

    Raises InputError if the hub answers that this user has no access to such a model.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    given = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    seconds = float(given) if re.fullmatch(r"\d+(\.\d+)?", given) else SECONDS
    raised: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=seconds)
            raised.append(None)
        except Exception as error:  # from whichever HTTP library huggingface_hub uses; distinguished below
            raised.append(error)

    # The timeout covers each step of a request but not name resolution, so the wait for the thread limits the total.
    # Before the first request of a day huggingface_hub also fetches a list.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds + _OF_THE_LIBRARY)
    error = raised[0] if raised else TimeoutError("timed out")
    if isinstance(error, GatedRepoError):
        raise InputError(f"{what}: {name} is gated; accept its terms on the hub, then run `hf auth login`") from error
    if isinstance(error, RepositoryNotFoundError):
        raise InputError(
            f"{what}: {name} is not a local folder, and the hub has no model of that name that you can access (for "
            "private ones, run `hf auth login`)"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise InputError(f"revision: {name} has no branch, tag or commit {revision!r}") from error
    if error is None:
        return None
    if isinstance(error, HfHubHTTPError):  # it answered; other problems are reported when files are read
        status = error.response.status_code
        return f"it answered with status {status}" if status >= 500 else None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if "timed out" in str(error).lower() or not str(error):
        return f"no answer within {seconds:g} seconds; to wait longer, set HF_HUB_ETAG_TIMEOUT in seconds"
    return re.sub(r"^\[Errno [^]]*\] ", "", str(error).strip().splitlines()[0])
