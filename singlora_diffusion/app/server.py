"""`singlora app`: the page and the server behind it, for this machine alone unless it is told otherwise."""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from .. import settings as ranges
from ..errors import UserError
from ..terminal import escaped
from .places import Places
from .settings import LOOPBACK, PASSWORD, AppSettings

if TYPE_CHECKING:
    import gradio as gr

LARGEST = 200 << 20
"""Bytes of an uploaded file: more than a photograph or an adapter usually has."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'"
)
"""Content-Security-Policy: the browser itself asks nobody else for anything."""
PAUSE = 0.1
"""Seconds between two looks for clicks. Gradio's own millisecond keeps a processor busy by 8 % with nothing to do."""
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def run(settings: AppSettings) -> None:
    """Serve the page until Ctrl-C. Trainings go on then; the next start finds them.

    Raises:
        UserError: Gradio is not installed, a folder cannot be used, or the port is taken.
    """
    ranges.check(settings)
    places = Places(settings.output_dir.absolute(), tuple(one.absolute() for one in settings.folders))
    for folder in places.others:
        if not folder.is_dir():
            raise UserError(f"--folders {escaped(folder, 1000)}: no such folder")
    files.check_writable(places.root, "--output_dir")
    serve(settings, places)


def serve(settings: AppSettings, places: Places) -> None:
    """Until this process is told to end."""
    os.environ.update(QUIET)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install 'singlora-diffusion[app]'") from error
    places.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="singlora-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(places)
        try:
            url = launch(page, settings, places)
            print(f"{url}: open it in a browser; Ctrl-C ends the page, trainings go on", flush=True)
            threading.Thread(target=_warm, daemon=True).start()
            while True:
                time.sleep(3600)  # which Ctrl-C ends on Windows too, unlike a lock without a timeout
        finally:
            page.close(verbose=False)


def build(places: Places) -> gr.Blocks:
    """The page."""
    import gradio as gr

    from . import making
    from .pages import files as files_page
    from .pages import generate, score, subject, train

    with gr.Blocks(title="SingLoRA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML("<h1>SingLoRA</h1><p>Teach an image model one subject. Nothing leaves this machine unasked.</p>")
        with gr.Tab("Subject"):
            of_subject = subject.build(places)
        with gr.Tab("Train"):
            train.build(places, of_subject, page)
        with gr.Tab("Generate") as tab:
            generate.build(places, page, tab, making.Maker())
        with gr.Tab("Score") as tab:
            score.build(places, page, tab)
        with gr.Tab("Files") as tab:
            files_page.build(places, page, tab)
    return page


def launch(page: gr.Blocks, settings: AppSettings, places: Places) -> str:
    """Serve the page in a thread; returns its address.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    here = settings.host in LOOPBACK
    password = None if here else os.environ.get(PASSWORD) or secrets.token_urlsafe(12)
    if password and not os.environ.get(PASSWORD):
        print(f"password (any name goes with it): {password}", flush=True)
    hosts = ["127.0.0.1", "localhost", "[::1]"] if here else ["*"]  # else a page elsewhere could name itself as ours
    theme = gr.themes.Default(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # all text stands out from its ground by 4.5 to 1
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        link_text_color="*primary_700",
    )
    page.queue(default_concurrency_limit=4)
    page._queue.sleep_when_free = PAUSE
    try:
        _, url, _ = page.launch(
            server_name=settings.host,
            server_port=settings.port or _free_port(settings.host),
            inbrowser=settings.browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            auth=None if password is None else lambda _, given: hmac.compare_digest(given.encode(), password.encode()),
            max_file_size=LARGEST,
            allowed_paths=[str(places.root), *map(str, places.others)],
            footer_links=[],
            theme=theme,
            # not `css`, which puts its own selectors before ours, so that those for phones no longer match
            head=f"<style>{_beside('page.css')}</style><script>{_beside('page.js')}</script>",
            app_kwargs={
                "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Policy)],
                "docs_url": None,
                "redoc_url": None,
            },
        )
    except OSError as error:
        raise UserError(f"--port {settings.port}: cannot be listened on ({error}); try --port 0") from error
    return str(url)


class Policy:
    """Says with every answer what the browser may ask for."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                said = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *said]}
            await send(message)

        await self.app(scope, receive, with_policy)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def _warm() -> None:
    """Load what the first click would wait for."""
    from .. import models

    models.meta_networks("toyworld")
