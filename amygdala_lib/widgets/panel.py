"""Panels: what the steering panel and the readout panel have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import ipywidgets
from IPython.display import HTML, display

from ..errors import AmygdalaError
from .drawing import draw_message
from .frontend import has_front_end
from .latest import Job, Latest

LABELLED = {"description_width": "initial"}


class Panel(ABC):
    """Controls above an output that a thread fills in; without a front end, a picture of it.

    Show it as a cell's last line. A front end that is not recognised gets the picture too: show
    `panel.widget` there.
    """

    def __init__(self) -> None:
        self.status = ipywidgets.HTML()
        self.output = ipywidgets.HTML(layout={"width": "100%"})
        self._work = Latest(self._failed)
        self.widget: ipywidgets.Widget

    @abstractmethod
    def html(self) -> str:
        """The panel as it is, for pages that nobody can move a slider on."""

    @abstractmethod
    def start(self) -> None:
        """Begin to show what the controls stand for now, in place of whatever is being done."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all is shown; False if that took longer than `timeout` seconds."""
        return self._work.wait(timeout)

    def close(self) -> None:
        """Stop what runs and take the panel off the page."""
        self._work.cancel()
        self.widget.close()

    def _ipython_display_(self) -> None:
        if has_front_end():
            self.start()
            display(self.widget)
        else:
            display(HTML(self.html()))

    def _submit(self, job: Job, message: str) -> None:
        self.status.value = draw_message(message)
        self._work.submit(job)

    def _failed(self, error: Exception) -> None:
        kind = "" if isinstance(error, AmygdalaError) else f"{type(error).__name__}: "
        self.status.value = draw_message(f"{kind}{error}", error=True)
