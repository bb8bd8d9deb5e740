"""Files that are either whole or as they were."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` under a temporary name beside ``path`` and rename it, so that nobody ever sees half a file.

    Raises:
        OSError: the write failed (a full disk, no permission); the old file, if any, is untouched and nothing is left over.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror or error}; {path} is left as it was") from error
