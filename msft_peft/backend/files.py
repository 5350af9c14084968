"""Files: whole or not at all, and from a directory or the Hub alike."""

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not.

    A reader, and a crash, see the old file or the new one, never half of one.

    Raises:
        NotADirectoryError: the parent of `path` exists and is a file.
    """
    if path.parent.is_file():
        raise NotADirectoryError(f"Provided path ({path.parent}) should be a directory, not a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's files are private; give the new one what any new file gets.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fetch(source: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The local path of file `name` in a directory or a Hub repository; None if there is no such file.

    Args:
        source: an existing directory, or a repository id.
        name: the file's name.
        subfolder: folder below `source`.
        hub: passed on to `huggingface_hub.hf_hub_download`.

    Raises:
        TypeError: `hub` holds what that function does not take: a mistyped option, say, or one of torch's.
        FileNotFoundError: `source` is no directory, and cannot be a repository id or was not found as one.
    """
    unknown = sorted(set(hub) - set(inspect.signature(hf_hub_download).parameters))
    if unknown:
        raise TypeError(
            f"unexpected keyword arguments {unknown}: beside its own, this takes what huggingface_hub.hf_hub_download "
            "takes (revision, token, cache_dir, local_files_only, ...)."
        )
    directory = Path(source)
    if directory.is_dir():
        path = directory / (subfolder or "") / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub))
    except (OSError, ValueError) as error:  # no such file or repository, no network, or no repository id at all
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise FileNotFoundError(
            f"'{source}' is no directory here, and '{name}' could not be had from the Hub under that name: {error}"
        ) from error
