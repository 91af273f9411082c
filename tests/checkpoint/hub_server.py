"""As much of the Hugging Face hub as a download needs, on loopback; it counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves one model, whose branch `main` is at `commit`; a file with tensors is held as LFS does."""

    def __init__(self, id_: str, folder: Path, *, commit: str) -> None:
        self.id = id_
        self.folder = folder
        self.commit = commit
        self.gets: Counter[str] = Counter()
        """How often each file was sent."""
        self.asked = 0
        """All requests."""
        self.lie = b""
        """Stands at the beginning of every file with tensors that is sent."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.asked += 1
                code, headers, content = hub.answer(unquote(urlsplit(self.path).path))
                self.send_response(code)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)
                    if "ETag" in headers:
                        hub.gets[self.path.rpartition("/")[2]] += 1

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path in (f"/api/models/{self.id}/revision/{name}" for name in ("main", self.commit)):
            files = [{"rfilename": name, "size": size} | lfs for name, size, lfs in self._files("sha256")]
            return self._json({"id": self.id, "sha": self.commit, "siblings": files})
        if path == f"/api/models/{self.id}/tree/{self.commit}":
            files = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40} | lfs
                for name, size, lfs in self._files("oid")
            ]
            return self._json(files)
        name = path.removeprefix(f"/{self.id}/resolve/{self.commit}/")
        if name != path and (self.folder / name).is_file():
            content = (self.folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if name.endswith(".safetensors"):
                content = self.lie + content[len(self.lie) :]
            return 200, {"X-Repo-Commit": self.commit, "ETag": f'"{digest}"'}, content
        return 404, {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"}, b""

    def _files(self, digest: str) -> list[tuple[str, int, dict[str, Any]]]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                lfs = {digest: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                large = path.suffix in (".safetensors", ".bin")
                found.append((str(path.relative_to(self.folder)), len(content), {"lfs": lfs} if large else {}))
        return found

    @staticmethod
    def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
