"""The rows of a log for TensorBoard, beside the log."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from .log import numbers


def summary_writer() -> type:
    """TensorBoard's ``SummaryWriter``, which is loaded where a run asks for it.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train: tensorboard needs the package tensorboard; pip install 'wam-kernels[tensorboard]'",
            name="tensorboard",
        ) from error
    return SummaryWriter


class TensorBoard:
    """Writes rows of a log as scalars by step, and the picture that an evaluation names.

    Args:
        folder: Of the run; events go to its ``tensorboard/``.
        step: The last step that stays; 0 removes what is there.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        writer, events = summary_writer(), folder / "tensorboard"
        if not step and events.exists():
            shutil.rmtree(events)
        self.folder, self._writer = folder, writer(str(events), purge_step=step + 1 if step else None)

    def add(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        for name, value in numbers(row):
            if name != "step":
                self._writer.add_scalar(name, value, step)
        picture = row.get("evaluation", {}).get("picture")
        if picture is not None:
            pixels = np.array(Image.open(self.folder / picture).convert("RGB"))
            self._writer.add_image("evaluation", pixels, step, dataformats="HWC")

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
