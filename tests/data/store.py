"""An S3-compatible server on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import urllib.request
from collections.abc import Iterator

ENV = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def bucket(name: str) -> Iterator[str]:
    """Yield a function of an address: `s3://NAME/{}?...` to be formatted with a path."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    before = {key: os.environ.get(key) for key in ENV}
    os.environ.update(ENV)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://{host}:{port}/{name}", method="PUT")
        with urllib.request.urlopen(request):
            pass
        yield f"s3://{name}/{{}}?endpoint_override={host}:{port}&scheme=http"
    finally:
        server.stop()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
