"""How a file of results is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside ``path``, with the same ending, to write to; it then takes the place of what was there.

    Folders on the way are made. Whatever goes wrong, ``path`` is all old or all new, also where several processes
    write it.

    Raises:
        OSError: no room, or no right to write; the message names ``path``.
    """
    part = path.with_name(f"part.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before is unchanged") from error
    finally:
        part.unlink(missing_ok=True)
