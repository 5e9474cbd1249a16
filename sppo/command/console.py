"""What a command writes to its terminal or log: plain text, and never a reason to fail."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

# C0 controls but tab and line feed, DEL, C1; marks that turn the direction of text; line separators; half characters
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_COLOUR = re.compile("\x1b\\[[0-9;]*m")  # bold, a colour and back: changes how a text looks, and nothing else
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_BAR = re.compile(r"(?:[\r\n]|\x1b\[A)*")  # what a progress bar moves the cursor with, in front of its text


def printable(text: str) -> str:
    """Text of a prompt, a model's file or a server, so that a terminal only shows it: controls as `\\x1b` or `\\u202e`.

    A password in an address becomes `***`. Tabs and line feeds stay.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], _CREDENTIALS.sub("***@", text))


class Console:
    """stdout or stderr of a command. All else than writing is the stream's own.

    A reader that has gone (`| head`), a terminal that was closed or a full disk ends the showing, not the work.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        bar = _BAR.match(text)
        moves = bar[0] if bar else ""
        parts = _COLOUR.split(text[len(moves) :])
        colours = [*_COLOUR.findall(text[len(moves) :]), ""]
        shown = "".join(printable(part) + colour for part, colour in zip(parts, colours, strict=True))
        try:
            self._stream.write(moves + shown)
        except OSError:
            self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Show nothing more, here and in what is started from now on."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def use_console() -> None:
    """Write to stdout and stderr through a Console. Where one is closed (`>&-`), to nowhere.

    A file that is opened later would else get its number, and what is written to stdout would go into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - to the end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in an encoding that does not have the character
        if not isinstance(stream, Console):
            setattr(sys, name, Console(stream))
