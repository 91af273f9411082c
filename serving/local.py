"""An endpoint for the length of a `with` block, for programs that run on Ray already."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from serving.app import ServeSpec, application

HOST = "127.0.0.1"


@contextmanager
def serve_locally(model_dir: Path, *, quant: str = "none", port: int = 0) -> Iterator[str]:
    """Serve a model to this machine alone and yield the address; port 0 takes any that is free."""
    with listening(application(ServeSpec().but(model=str(model_dir), quant=quant)), port=port) as url:
        yield url


@contextmanager
def listening(app: Application, *, port: int = 0) -> Iterator[str]:
    """Run an application on loopback inside the block, then take Serve down."""
    port = _free(port)
    if _get_global_client(raise_if_no_controller_running=False):
        raise ValueError(
            "Serve runs on this Ray cluster already; end it with `serve shutdown`, or use another cluster"
        )
    serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})
    try:
        serve.run(app, name="rayllava", route_prefix="/")
        yield f"http://{HOST}:{port}"
    finally:
        serve.shutdown()


def _free(port: int) -> int:
    """Return `port`, or a free one for 0; ValueError when somebody listens there.

    Serve's proxies would not notice: they share a port with whoever lets them, and the wrong one might answer.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"port={port} cannot be had on {HOST} ({error.strerror}); give another one") from error
        return int(probe.getsockname()[1])
