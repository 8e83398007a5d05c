"""Where the files of a name are: a folder, the hub's cache, or the hub, which is asked once and not for long.

transformers asks again and again, for half a minute, before it says that there is no network.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

from modality_integration.app.errors import InputError

SECONDS = 5.0  # for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says how long
_OF_THE_LIBRARY = 3.0
# One of these is in the cache if anything of a model, an adapter or a processor is.
_FIRST_FILES = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")


class Source(NamedTuple):
    """Where files are read: from `folder`, or where that is None, by the hub name `name`."""

    name: str
    folder: Path | None
    revision: str | None = None
    note: str | None = None

    @property
    def where(self) -> str:
        """For transformers' `from_pretrained`: of a hub name that is cached, the folder in the cache.

        By its name, transformers asks the hub for more than it then needs, even if told that files are local.
        """
        return self.name if self.folder is None else str(self.folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained`, too. Code that comes with a model is not run, and nobody is asked whether."""
        local = self.folder is not None
        return {"local_files_only": local, "revision": None if local else self.revision, "trust_remote_code": False}

    def file(self, name: str) -> Path | None:
        """The file of that name, from the hub if need be; None if there is none."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(self.name, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)


def find(what: str, name: str, revision: str | None = None) -> Source:
    """Where the files of `name` are. what: the argument that it was given as, for messages.

    Raises InputError, within seconds, where they are neither here nor to be had.
    """
    if Path(name).is_dir():
        return Source(name, Path(name))
    if Path(name).exists():
        raise InputError(f"{what}: {name} is a file; give the folder it is in")
    if looks_like_path(name):
        raise InputError(f"{what}: {name} does not exist")

    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{what}: {name!r} is no folder here, and no hub name") from None
    cached = cached_folder(name, revision)
    if cached and cached.name == revision:  # a commit never changes
        return Source(name, cached, revision)
    why = _why_unreachable(what, name, revision)
    if why is None:
        return Source(name, None, revision)
    if cached:
        return Source(name, cached, revision, f"{name} is what the hub's cache has (commit {cached.name[:8]}): {why}")
    at = f" of its revision {revision}" if revision else ""
    raise InputError(
        f"{what}: {name} is no folder here, the hub's cache ({HF_HUB_CACHE}) has nothing{at}, and {ENDPOINT} cannot be "
        f"reached ({why}); offline, give the folder that it was saved in"
    )


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Where the hub's cache has `name` at `revision`: a folder named after the commit; None if it has none of it."""
    from huggingface_hub import try_to_load_from_cache

    for file in _FIRST_FILES:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: a hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _why_unreachable(what: str, name: str, revision: str | None) -> str | None:
    """None if the hub knows `name`, else why it cannot be asked; one request, as every download begins with.

    Raises InputError if it answers that there is no such model for this user.
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
        except Exception as error:  # of whichever HTTP library huggingface_hub uses; told apart below
            raised.append(error)

    # The timeout is of each step of a request but not of resolving a name, so a thread is waited for in all. Before the
    # first request of a day huggingface_hub asks for a list of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds + _OF_THE_LIBRARY)
    error = raised[0] if raised else TimeoutError("timed out")
    if isinstance(error, GatedRepoError):
        raise InputError(f"{what}: {name} is gated: accept its terms on the hub, then `hf auth login`") from error
    if isinstance(error, RepositoryNotFoundError):
        raise InputError(
            f"{what}: {name} is no folder here, and the hub has no model of that name that it shows to you (private "
            "ones take `hf auth login`)"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise InputError(f"revision: {name} has no branch, tag or commit {revision!r}") from error
    if error is None:
        return None
    if isinstance(error, HfHubHTTPError):  # it answered; what else is wrong is said where files are read
        status = error.response.status_code
        return f"it answers with status {status}" if status >= 500 else None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if "timed out" in str(error).lower() or not str(error):
        return f"no answer in {seconds:g} seconds (HF_HUB_ETAG_TIMEOUT, in seconds, waits longer)"
    return re.sub(r"^\[Errno [^]]*\] ", "", str(error).strip().splitlines()[0])
