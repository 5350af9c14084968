"""Files: written whole or not at all, and none outside the folder that was named."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


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


_SCRATCH = ".msft_peft-"
# Where a finished set of files waits to be moved into its folder.
_PENDING = f"{_SCRATCH}new"
# Seconds after which a scratch folder is what a killed process left, and no longer one that is being written.
_ABANDONED = 24 * 3600


@contextlib.contextmanager
def replacing_all(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files take the places of those in `folder`, all of them, when the block ends well.

    One renaming decides: the scratch folder gets the name under which `current` looks first. A process that is killed
    before it leaves the old files, and one that is killed after it the new ones: whoever comes next moves them. An
    empty file says that the one of its name is to go. Scratch folders that killed processes left go after a day.

    Raises:
        NotADirectoryError: `folder` exists and is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(f"Provided path ({folder}) should be a directory, not a file")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=_SCRATCH))
    try:
        yield scratch
        while True:
            _move_pending(folder)
            try:
                os.rename(scratch, folder / _PENDING)
                break
            except OSError as error:
                # Another process was faster: its files go first.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _move_pending(folder)


def current(folder: Path, name: str) -> Path | None:
    """The path of a file that `replacing_all` may have written, if there is one; what was left is moved first."""
    with contextlib.suppress(OSError):  # a folder that may only be read
        _move_pending(folder)
    waiting = folder / _PENDING / name
    path = waiting if waiting.is_file() else folder / name
    return path if path.is_file() and (path is not waiting or path.stat().st_size) else None


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if left.name != _PENDING and time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _move_pending(folder: Path) -> None:
    pending = folder / _PENDING
    try:
        names = sorted(os.listdir(pending))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            if (pending / name).stat().st_size == 0:
                (folder / name).unlink(missing_ok=True)
                (pending / name).unlink()
            else:
                os.replace(pending / name, folder / name)
    with contextlib.suppress(OSError):  # another process removed it, or has put its own files there
        pending.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def inside(folder: str | os.PathLike, name: str, source: str) -> str:
    """Join `folder` and a `name` that a file or caller gave.

    Raises:
        ValueError: the result would lie outside `folder`; `source` says where the name came from.
    """
    root, path = os.path.abspath(folder), os.path.abspath(os.path.join(folder, name))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(
            f"{source} names '{name}', which lies outside the folder '{folder}'. Only names inside it are read; "
            f"do not use this checkpoint before you know why it says so."
        )
    return path
