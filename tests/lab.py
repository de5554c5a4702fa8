"""A real JupyterLab in a headless browser, for tests of what people see and drag there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
"""Playwright's own browser is taken where the system has none."""
QUIET = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab, and a browser to look at it with."""

    url: str
    token: str
    settings: Path
    page: Page

    def open(self, notebook: str, theme: str) -> Page:
        """The page with this notebook in it, its kernel ready and nothing run yet."""
        settings = {
            "apputils-extension/themes": {"theme": THEMES[theme]},
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"autoStartDefaultKernel": True},
        }
        for plugin, chosen in settings.items():
            file = self.settings / "lab" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(chosen))
        self.page.goto(f"{self.url}/lab/tree/{notebook}?token={self.token}&reset")
        self.page.locator(".jp-Notebook").wait_for()
        self._themed(theme)
        self.page.wait_for_function(_KERNEL_READY)
        return self.page

    def use_theme(self, theme: str) -> None:
        """Change the theme of the open page, as its settings menu does."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})",
            THEMES[theme],
        )
        self._themed(theme)

    def run_all(self, seconds: float) -> None:
        """Run every cell, for at most so long. Raises AssertionError for one that fails."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(_ALL_RUN, timeout=1000 * seconds)
        failed = self.page.locator("[data-mime-type='application/vnd.jupyter.error']")
        assert not failed.count(), failed.first.inner_text()

    def _themed(self, theme: str) -> None:
        body = self.page.locator(f"body[data-jp-theme-name='{THEMES[theme]}']")
        body.wait_for(state="attached")


_KERNEL_READY = """() => {
    const kernel = window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
_ALL_RUN = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const code = notebook.widgets.filter(cell => cell.model.type === 'code');
    const outputs = code.flatMap(cell => cell.model.outputs.toJSON());
    return outputs.some(output => output.output_type === 'error')
        || code.every(cell => cell.model.executionCount && cell.model.executionState === 'idle');
}"""


@contextmanager
def jupyterlab(folder: Path, settings: Path) -> Iterator[Lab]:
    """Serve `folder` from a JupyterLab of its own, without the user's settings."""
    token = secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(settings / "config"),
        "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
               "--ip=127.0.0.1", f"--IdentityProvider.token={token}",
               f"--notebook-dir={folder}", "--expose-app-in-browser"]  # fmt: skip
    log = settings / "server.log"
    with log.open("w") as output, sync_playwright() as playwright:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            url = _address(server, settings / "runtime", log)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = browser.new_page(viewport={"width": 1280, "height": 1100})
            page.set_default_timeout(120_000)
            yield Lab(url, token, settings, page)
            browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _address(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            address = json.loads(file.read_text())["url"].rstrip("/")
            with urllib.request.urlopen(f"{address}/api"):
                return address
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
