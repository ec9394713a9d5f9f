# SPDX-License-Identifier: Apache-2.0
"""Strategy files on the Hugging Face Hub: how one is named, fetched and uploaded.

A name is ``owner/name``, and on request a revision and a place in the repository:
``owner/name@revision:place``. A place that ends in ``.json`` is a file, any other a folder that
holds ``sparse_strategy.json``. A model's own repository is as good as one made for strategies.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dit_sparse.errors import StrategyError
from dit_sparse.methods import METHODS
from dit_sparse.strategy.files import CONFIG_NAME, near_names

_ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@:\s]+))?(?::([^@:\s]+))?")
LOG_IN = "log in with 'hf auth login', or give token="


class Address(NamedTuple):
    """Where a strategy is on the Hub.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit; None: the default branch.
        place: File or folder in the repository; None: its root.
    """

    repo_id: str
    revision: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        """Write it as it is read."""
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo_id}{at}" + ("" if self.place is None else f":{self.place}")


def parse(name: str) -> Address | None:
    """Read a Hub address; None where ``name`` has not its form, or is a JSON file's path."""
    found = _ADDRESS.fullmatch(name)
    if found is None or (found[3] is None and name.endswith(".json")):
        return None
    return Address(found[1], found[2], found[3])


def means_a_file(name: str) -> bool:
    """Say whether a name can be a path: its first part is a folder here, or begins with a dot.

    A name with a revision (``owner/name@main``) is the Hub's.
    """
    first = name.partition("/")[0]
    try:
        return "@" not in name and (first.startswith((".", "~")) or Path(first).is_dir())
    except (OSError, ValueError):  # too long or odd to be a path
        return False


def inside(name: str) -> tuple[Path, str] | None:
    """Read ``FOLDER:place`` of a folder that is there; None: it is no such name."""
    head, _, place = name.rpartition(":")
    try:
        return (Path(head), place) if head and place and Path(head).is_dir() else None
    except (OSError, ValueError):  # too long or odd to be a path
        return None


def file_of(place: str | None, filename: str | None, shown: str) -> str:
    """Name the file at a place: "a/b" + None -> "a/b/sparse_strategy.json".

    Args:
        place: File (ends in ".json") or folder; None: the root.
        filename: Name of the file in the folder; None: the usual one.
        shown: How errors call the whole.
    """
    path = PurePosixPath(place if place is not None else ".")
    if path.suffix == ".json":
        if filename is not None:
            raise StrategyError(
                f"{shown}: already contains a file name, and filename={filename!r} gives "
                "another; use only one"
            )
    else:
        path = path / (CONFIG_NAME if filename is None else filename)
    if path.is_absolute() or ".." in path.parts:
        raise StrategyError(
            f"{shown}: {str(path)!r} is outside the repository; use a path inside it"
        )
    return str(path)


def download(repo_id: str, filename: str, **options: Any) -> Path:
    """Fetch one file of a repository, or find it in the local cache.

    Args:
        repo_id: "owner/name".
        filename: Path of the file in the repository.
        **options: For ``hf_hub_download`` (``revision``, ``token``, ``cache_dir``, ...).

    Raises:
        StrategyError: It is not there, may not be read, or cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = options.get("revision")
    shown = str(Address(repo_id, revision, filename))
    try:
        return fetch(repo_id, filename, **options)
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE or options.get("local_files_only")
        raise StrategyError(
            f"{Address(repo_id, revision)}: no {filename} in the local Hub cache, and "
            + ("offline mode is on" if offline else "the Hub is not reachable")
            + "; download it once with network access, or use a local file or folder"
            + near_names(repo_id, tuple(METHODS))
        ) from error
    except EntryNotFoundError as error:
        raise StrategyError(
            f"{shown}: file not found in the repository; to load another one, use "
            f"{repo_id}:FOLDER or {repo_id}:FILE.json"
        ) from error
    except RevisionNotFoundError as error:
        raise StrategyError(f"{shown}: the repository has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise StrategyError(
            f"{shown}: gated repository; request access on its page, then {LOG_IN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise StrategyError(
            f"{shown}: no local folder or Hub repository has this name; for a private "
            f"repository, {LOG_IN}{near_names(repo_id, tuple(METHODS))}"
        ) from error
    except _failures() as error:
        raise StrategyError(f"{shown}: download failed: {_first_line(error)}") from error


def fetch(repo_id: str, filename: str, **options: Any) -> Path:
    """Fetch one file, asking the Hub once: where it does not answer, the local cache is used.

    The Hub's client asks five times again, which takes half a minute without a network.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not (constants.HF_HUB_OFFLINE or options.get("local_files_only")):
        try:
            url = hf_hub_url(
                repo_id,
                filename,
                revision=options.get("revision"),
                endpoint=options.get("endpoint"),
            )
            get_hf_file_metadata(url, token=options.get("token"))
        except (
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        ):
            raise
        except _failures():
            options["local_files_only"] = True
    return Path(hf_hub_download(repo_id, filename, **options))


def upload(
    data: bytes,
    repo_id: str,
    filename: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> str:
    """Put one file into a repository, which is made if need be; returns the commit's URL.

    Args:
        data: Content of the file.
        repo_id: "owner/name", or "name" for the account that is logged in.
        filename: Path of the file in the repository.
        commit_message: Of the commit.
        private: Whether a repository made now is private; None: as the account has it.
        token: Of the account; None: the one that is logged in.
        endpoint: Address of the Hub, where it is another one.
        **options: For ``HfApi.upload_file`` (``revision``, ``create_pr``, ...).

    Raises:
        StrategyError: Not allowed, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    elsewhere = {} if endpoint is None else {"endpoint": endpoint}
    try:
        api = HfApi(token=token, **elsewhere)  # type: ignore[arg-type]
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=data,
            path_in_repo=filename,
            repo_id=repository.repo_id,
            commit_message=commit_message,
            **options,
        )
    except LocalTokenNotFoundError as error:
        raise StrategyError(f"{repo_id}: upload failed: {LOG_IN}") from error
    except _failures() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = f"; {LOG_IN}" if status in {401, 403} else ""
        raise StrategyError(f"{repo_id}: upload failed: {_first_line(error)}{hint}") from error
    return str(commit.commit_url)


def _failures() -> tuple[type[Exception], ...]:
    """List what the client raises where it gets no good answer."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Among its bases is the HTTP library's own error (httpx or requests): no connection at all.
    bases = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (*bases, HFValidationError, OSError)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
