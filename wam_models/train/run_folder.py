"""The folder of a run: what was run, log rows as they come, the latest checkpoint, one process at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, locked_folder, remove_checkpoint, saved_as
from ..runtime.checks import writable_folder
from ..runtime.files import new_file
from .kept import remove_kept
from .tensorboard import TensorBoard, summary_writer


class RunFolder:
    """The files of a run: log rows as they come, the latest checkpoint.

    Args:
        out: The folder.
        resume: The checkpoint that the run goes on from.
        overwrite: Whether another run in the folder may be lost.
        tensorboard: Write the log's rows for TensorBoard too.
        files: Name and text of files that say what was run.

    Raises:
        ValueError: a folder that cannot be written, or that holds another run.
        ModuleNotFoundError: ``tensorboard`` without that package.
    """

    def __init__(
        self,
        out: str | Path,
        resume: Checkpoint | None = None,
        *,
        overwrite: bool = False,
        tensorboard: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.out, self.resume, self.overwrite = Path(out), resume, overwrite
        self.tensorboard, self.files = tensorboard, dict(files or {})
        if tensorboard:
            summary_writer()
        self.log, self.checkpoint = self.out / "log.jsonl", self.out / "checkpoint"
        for folder in (self.out, self.checkpoint):
            writable_folder("--out", folder)
        self._check_contents()

    def _check_contents(self) -> None:
        """Refuses a folder with another run in it, unless that may be overwritten."""
        saved = None
        with suppress(ValueError) if self.overwrite else nullcontext():
            saved = saved_as(self.checkpoint)
        resume = self.resume
        self.continues = saved is not None and resume is not None and saved == (resume.save_id, resume.metadata)
        occupied = saved is not None or (self.log.exists() and self.log.stat().st_size > 0)
        if occupied and not self.continues and not self.overwrite:
            resumed = "" if saved is None else f"go on from {self.checkpoint} with --resume, "
            raise ValueError(
                f"--out: {self.out} holds {'a' if resume is None else 'another'} run; {resumed}lose it with "
                "--overwrite (overwrite=True), or name another folder"
            )

    @contextmanager
    def begin(self, step: int) -> Iterator[None]:
        """Keeps the log's rows up to this step, or nothing of another run, and is open for more.

        Raises:
            ValueError: another process trains into the folder, or did so since it was looked at.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.out, wait=False))
            except BlockingIOError as error:
                raise ValueError(
                    f"--out: another process trains into {self.out} right now; wait for its end, or name another folder"
                ) from error
            self._check_contents()
            self._drop_rows_after(step)
            for name, text in self.files.items():
                with new_file(self.out / name) as part:
                    part.write_text(text, encoding="utf-8")
            self._file = stack.enter_context(self.log.open("ab", buffering=0))
            kept = step if self.continues else 0
            self._board = stack.enter_context(TensorBoard(self.out, kept)) if self.tensorboard else None
            yield

    def _drop_rows_after(self, step: int) -> None:
        before = self.log.read_bytes() if self.log.exists() else b""
        if not self.continues:
            remove_checkpoint(self.checkpoint)
            remove_kept(self.out)
        # rows behind the checkpoint belong to steps that are run again, and a kill can leave half a row
        rows = [line + b"\n" for line in before.splitlines() if self.continues and _step_of(line) <= step]
        if (kept := b"".join(rows)) != before:
            part = self.log.with_name("log.jsonl.part")
            part.write_bytes(kept)
            part.replace(self.log)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row; whoever reads the log finds it at once."""
        unwritten = json.dumps(row).encode() + b"\n"
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise OSError(f"train: cannot write {self.log}: {error.strerror}") from error
        if self._board is not None:
            self._board.add(row)


def _step_of(line: bytes) -> float:
    """Of a row of the log; infinity where that cannot be read."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
