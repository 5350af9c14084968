"""Files: written whole or not at all, and none outside the folder that was named."""

import contextlib
import os
import tempfile
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
