"""A hub of one model on 127.0.0.1: just enough of its HTTP interface for huggingface_hub to fetch from."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Hub(ThreadingHTTPServer):
    daemon_threads = True
    name: str
    commit: str
    files: Mapping[str, bytes]
    error_code: str | None
    claimed: Mapping[str, int]
    stalls: bool
    fetched: list[str]
    ended: threading.Event
    num_requests: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.num_requests += 1
        api, files = f"/api/models/{hub.name}", f"/{hub.name}/resolve/{hub.commit}/"
        if hub.error_code or not path.startswith((api, files)):
            return self._send(404, b"", {"X-Error-Code": hub.error_code or "RepoNotFound"}, with_body)
        if path.startswith(files):
            file_name = path.removeprefix(files)
            body = hub.files[file_name]
            if with_body:
                hub.fetched.append(file_name)
            headers = {"ETag": f'"{_blob_id(body)}"', "X-Repo-Commit": hub.commit}
            if with_body and hub.stalls and file_name.startswith("model"):
                return self._stall(body, headers)
            return self._send(200, body, headers, with_body)
        if path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": _blob_id(body)}
                for name, body in hub.files.items()
            ]
            return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, with_body)
        model = {"id": hub.name, "sha": hub.commit, "siblings": self._siblings()}
        return self._send(200, json.dumps(model).encode(), {"Content-Type": "application/json"}, with_body)

    def _siblings(self) -> list[dict[str, object]]:
        sizes = {name: len(body) for name, body in self.server.files.items()} | dict(self.server.claimed)
        return [{"rfilename": name, "size": size} for name, size in sizes.items()]

    def _stall(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Half of a file, and then nothing until whoever wanted it is gone."""
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(2 * len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        with suppress(OSError):  # killed, it is gone with a reset
            self.connection.recv(1)
        self.close_connection = True
        self.server.ended.set()

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Requests are not news."""


def _blob_id(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def serve_hub(
    files: Mapping[str, bytes], name: str = "org/name", commit: str = "a" * 40, error_code: str | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve one model; yields the endpoint and the growing list of files that were fetched.

    With `error_code` everything is answered by 404 and that code (RepoNotFound, GatedRepo, RevisionNotFound).
    """
    with running_hub(files, name, commit, error_code) as hub:
        yield hub.endpoint, hub.fetched


@contextmanager
def running_hub(
    files: Mapping[str, bytes],
    name: str = "org/name",
    commit: str = "a" * 40,
    error_code: str | None = None,
    *,
    claimed: Mapping[str, int] | None = None,
    stalls: bool = False,
) -> Iterator[_Hub]:
    """As `serve_hub`, the server itself. `claimed` are sizes that it says; with `stalls` weights come by half."""
    with _Hub(("127.0.0.1", 0), _Handler) as hub:
        hub.name, hub.commit, hub.files, hub.error_code, hub.fetched = name, commit, files, error_code, []
        hub.claimed, hub.stalls, hub.ended, hub.num_requests = claimed or {}, stalls, threading.Event(), 0
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
