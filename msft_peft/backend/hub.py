"""The Hub, always through `huggingface_hub`: a file or a folder down, a folder up, and plain words when that fails."""

import contextlib
import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from msft_peft.backend import arguments
from msft_peft.backend.files import current, inside
from msft_peft.errors import HubError

# What the client raises on purpose, and what its HTTP library does: requests before its version 1, httpx after.
_FAILURES = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
_ABSENT = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)


def fetch(source: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The local path of file `name` in a directory or a Hub repository; None if there is no such file.

    Args:
        source: an existing directory, or a repository id.
        name: the file's name.
        subfolder: folder below `source`.
        hub: passed on to `huggingface_hub.hf_hub_download`.

    Raises:
        TypeError: `hub` holds what that function does not take: a mistyped option, say, or one of torch's.
        ValueError: `subfolder` leads out of the directory.
        FileNotFoundError: `source` is no directory, and cannot be a repository id or was not found as one; or it is
            not in the cache, and the Hub cannot be asked.
        HubError: the Hub refuses, or the download fails. The cache holds whole files alone: try again.
    """
    unknown = sorted(set(hub) - set(inspect.signature(hf_hub_download).parameters))
    if unknown:
        raise TypeError(
            f"unexpected keyword arguments {unknown}: beside its own, this takes what huggingface_hub.hf_hub_download "
            "takes (revision, token, cache_dir, local_files_only, ...)."
        )
    directory = arguments.path("model_id", source)
    if subfolder:
        arguments.path("subfolder", subfolder)
    if directory.is_dir():
        return current(Path(inside(directory, subfolder or "", "subfolder=")), name)
    try:
        with plainly(f"'{source}' is no directory here, and '{name}' could not be had from the Hub under that name"):
            return Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub))
    except FileNotFoundError as error:
        if _no_such_file(error):
            return None
        raise


def fetch_optional(source: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """As `fetch`, for what may well be missing: None, too, where the cache lacks it and the Hub cannot be asked."""
    try:
        return fetch(source, name, subfolder, **hub)
    except (FileNotFoundError, HubError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def fetch_folder(repo_id: str, patterns: list[str], **hub: Any) -> str:
    """A local folder with those files of a Hub repository that match `patterns`.

    Raises:
        FileNotFoundError, HubError: as `fetch`.
    """
    with plainly(f"'{repo_id}' is no directory here, and could not be had from the Hub under that name"):
        return snapshot_download(repo_id, allow_patterns=patterns, **hub)


class Target:
    """A branch of a Hub repository, or a pull request against it, that files are to be put into.

    The repository, and the branch, are made if they are not there.

    Args:
        repo_id: "owner/name", or a name in one's own account.
        token: who one is; default: who is logged in.
        private: of a new repository.
        revision: the branch; default: main.
        create_pr: leave the branch alone and open a pull request.

    Raises:
        HubError: no right to, no network, a bad name, or a repository that is there and not as `private` says.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> None:
        self.api, self.revision, self.create_pr = HfApi(token=token), revision, create_pr
        with _pushing(repo_id):
            self.repo_id = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private is not None and self.api.model_info(self.repo_id).private != private:
                raise HubError(
                    f"'{self.repo_id}' exists and is {'public' if private else 'private'}; nothing was uploaded. "
                    f"Leave out private={private}, or change it first: "
                    f"huggingface_hub.HfApi().update_repo_settings('{self.repo_id}', private={private})."
                )
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)

    def copy(self, name: str, folder: Path) -> bool:
        """Copy a file that is there already into `folder`; False if it is not there.

        Raises:
            HubError: it could not be had.
        """
        try:
            with _pushing(self.repo_id):
                there = self.api.hf_hub_download(self.repo_id, name, revision=self.revision)
        except HubError as error:
            if _no_such_file(error):
                return False
            raise
        shutil.copyfile(there, folder / name)
        return True

    def commit(self, folder: Path, message: str, description: str | None = None) -> CommitInfo:
        """Upload all files below `folder`; see `commit_files`."""
        files = (path for path in folder.rglob("*") if path.is_file())
        return self.commit_files({path.relative_to(folder).as_posix(): path for path in files}, message, description)

    def commit_files(self, files: Mapping[str, Path], message: str, description: str | None = None) -> CommitInfo:
        """Upload files, by their paths there, in one commit: all of them are there afterwards, or none.

        Raises:
            HubError: it failed, and the repository is as it was.
        """
        with _pushing(self.repo_id):
            return self.api.create_commit(
                self.repo_id,
                [CommitOperationAdd(name, files[name]) for name in sorted(files)],
                commit_message=message,
                commit_description=description,
                revision=self.revision,
                create_pr=self.create_pr,
            )


def repository_id(name: str | None) -> str | None:
    """`name` if it can be a model's id on the Hub and is no folder here; otherwise None."""
    parts = (name or "").split("/")
    plain = all(part and not part.startswith(".") and set(part) <= _ID for part in parts)
    return name if plain and len(parts) <= 2 and not os.path.isdir(str(name)) else None


_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@contextlib.contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turn what the client raises into FileNotFoundError (nothing of that name) or HubError (all else).

    Raises:
        FileNotFoundError, HubError: with `what`, the client's own text, and what to do.
    """
    try:
        yield
    except HubError:
        raise
    except _FAILURES as error:
        # "Not in the cache either", "the download was forced": what counts is why the Hub could not be asked.
        reason: BaseException = error
        while reason.__cause__ and (isinstance(reason, LocalEntryNotFoundError) or type(reason) is ValueError):
            reason = reason.__cause__
        absent = isinstance(reason, (*_ABSENT, OfflineModeIsEnabled)) and not isinstance(reason, GatedRepoError)
        raise (FileNotFoundError if absent else HubError)(
            f"{what}: {str(reason).rstrip()}{_advice(reason)}"
        ) from error


def _no_such_file(error: BaseException) -> bool:
    """Whether `plainly` raised this because the repository is there and the file is not."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


@contextlib.contextmanager
def _pushing(repo_id: str) -> Iterator[None]:
    try:
        with plainly(f"'{repo_id}' on the Hub could not be written to"):
            yield
    except FileNotFoundError as error:
        raise HubError(str(error)) from error.__cause__


def _advice(error: BaseException) -> str:
    """What to do about a failure, where its text does not say it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "\nIt is not in the cache either: go online, or look at cache_dir= and HF_HOME."
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return "\nCheck the name, and who you are: pass token=, set HF_TOKEN, or run `hf auth login`."
    if isinstance(error, OSError) and error.errno is not None:
        return "\nCheck the disk that cache_dir= or HF_HOME names."
    if isinstance(error, HFValidationError):
        return ""
    return "\nNothing was changed: try again."
