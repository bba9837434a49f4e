"""A small Hugging Face Hub on loopback: the requests of `huggingface_hub`, and the failures of a real Hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LARGE = 1000  # bytes from which on a file has a SHA-256, as LFS gives it, instead of git's checksum


@dataclass
class Repository:
    """Files of one model. ``sizes`` makes the Hub report another size; ``gated`` refuses files, ``status`` everything;
    ``tree``: only the tree lists them."""

    files: dict[str, bytes]
    gated: bool = False
    status: int = 0
    tree: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        names = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in self.files.items())
        return hashlib.sha1(repr(names).encode()).hexdigest()


@dataclass
class FakeHub:
    """``served``: (method, path, Range) of each request. ``cuts``: bytes after which the next answers break off."""

    url: str
    repositories: dict[str, Repository]
    served: list[tuple[str, str, str | None]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The files whose contents were requested."""
        return [path.split("/", 5)[5] for method, path, _ in self.served if method == "GET" and "/resolve/" in path]


@contextmanager
def fake_hub(**repositories: Repository) -> Iterator[FakeHub]:
    """Serve repositories; a name's "__" is its slash."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.served.append((self.command, path, self.headers["Range"]))
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
            if match is not None:
                self._model(hub.repositories.get(match[1]), match[1], body)
                return
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
            if match is not None:
                self._tree(hub.repositories[match[1]], body)
                return
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            repository = hub.repositories.get(match[1]) if match is not None else None
            if match is None or repository is None:
                self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)
            elif repository.status:
                self._send(repository.status, {}, b"", body)
            elif repository.gated:
                self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
            elif match[2] not in ("main", repository.commit) or match[3] not in repository.files:
                code = "EntryNotFound" if match[3] not in repository.files else "RevisionNotFound"
                self._send(404, {"X-Error-Code": code, "X-Repo-Commit": repository.commit}, b"", body)
            else:
                self._file(repository, repository.files[match[3]], body)

        def _model(self, repository: Repository | None, name: str, body: bool) -> None:
            if repository is None:
                self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)
            elif repository.status:
                self._send(repository.status, {}, b"", body)
            else:
                siblings = [_sibling(repository, file) for file in repository.files if not repository.tree]
                answer = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}
                self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

        def _tree(self, repository: Repository, body: bool) -> None:
            entries = [
                {"type": "file", "path": file, "oid": sibling["blobId"], "size": sibling["size"]}
                | ({"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}} if lfs else {})
                for file in repository.files
                for sibling in [_sibling(repository, file)]
                for lfs in [sibling.get("lfs")]
            ]
            entries.append({"type": "directory", "path": "sub", "oid": "0" * 40})
            self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode(), body)

        def _file(self, repository: Repository, content: bytes, body: bool) -> None:
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if wanted is None:
                self._send(200, headers, content, body)
            else:
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(206, headers, content[start:], body)

        def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body and "ETag" in headers and hub.cuts:
                self.wfile.write(content[: hub.cuts.pop(0)])
                self.close_connection = True
            elif body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(
        f"http://127.0.0.1:{server.server_port}",
        {name.replace("__", "/"): repository for name, repository in repositories.items()},
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sibling(repository: Repository, file: str) -> dict[str, Any]:
    content = repository.files[file]
    size = repository.sizes.get(file, len(content))
    sibling: dict[str, Any] = {"rfilename": file, "size": size}
    sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if len(content) >= _LARGE:
        sibling["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
    return sibling
