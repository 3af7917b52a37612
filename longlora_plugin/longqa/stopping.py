"""Ending a build early, between two steps and with a reason."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from longlora_plugin.longqa.settings import EXIT_INTERRUPTED


class Stop(Exception):
    """The build ends here; `exit_code` is one of the EXIT_ constants."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class Interrupt:
    """Ctrl-C as a wish that is looked at between steps: no step is ever left half done.

    Replies under way are waited for, since they are paid for; a second Ctrl-C ends the process
    there and then, which is as safe as a kill is.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.asked:
            if sys.stderr.isatty():
                # A progress display hides the cursor.
                os.write(2, b"\x1b[?25h\n")
            os._exit(EXIT_INTERRUPTED)
        self.asked = True

    def check(self) -> None:
        if self.asked:
            raise Stop("interrupted", EXIT_INTERRUPTED)
