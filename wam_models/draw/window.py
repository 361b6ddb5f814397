"""A window that shows pictures while they are made, where there is a screen."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

from PIL import Image


def no_window_because() -> str | None:
    """Why this process can open no window, in a few words; None where it can."""
    try:
        import tkinter
    except ImportError as error:
        return f"this Python has no tkinter ({error}; Debian: apt install python3-tk)"
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        return "there is no screen (DISPLAY is not set)"
    try:
        tkinter.Tk().destroy()
    except tkinter.TclError as error:
        return f"there is no screen ({error})"
    return None


class Window:
    """Pictures one after the other, each for at least ``seconds``; one that is closed stays closed.

    Args:
        title: Of the window.
        seconds: That a picture is shown.
    """

    def __init__(self, title: str, seconds: float) -> None:
        import tkinter

        self.seconds, self.shown, self._until = seconds, 0, 0.0
        self._root: tkinter.Tk | None = tkinter.Tk()
        self._root.title(title)
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self._picture: Any = None  # tkinter does not hold it

    def show(self, picture: Image.Image) -> None:
        from tkinter import TclError

        from PIL import ImageTk

        if self._root is None:
            return
        time.sleep(max(0.0, self._until - time.monotonic()))
        try:
            self._picture = ImageTk.PhotoImage(picture, master=self._root)
            self._label.configure(image=self._picture)
            self._root.update()
        except TclError:  # the user closed it
            self._root = None
            return
        self.shown += 1
        self._until = time.monotonic() + self.seconds

    def close(self) -> None:
        from tkinter import TclError

        if self._root is not None:
            with suppress(TclError):
                self._root.destroy()
        self._root = self._picture = None
