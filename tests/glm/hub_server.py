"""A hub of one model on 127.0.0.1: just enough of its HTTP interface for huggingface_hub to fetch from."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Hub(ThreadingHTTPServer):
    daemon_threads = True
    name: str
    commit: str
    files: Mapping[str, bytes]
    error_code: str | None
    fetched: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        api, files = f"/api/models/{hub.name}", f"/{hub.name}/resolve/{hub.commit}/"
        if hub.error_code or not path.startswith((api, files)):
            return self._send(404, b"", {"X-Error-Code": hub.error_code or "RepoNotFound"}, with_body)
        if path.startswith(files):
            file_name = path.removeprefix(files)
            body = hub.files[file_name]
            if with_body:
                hub.fetched.append(file_name)
            headers = {"ETag": f'"{_blob_id(body)}"', "X-Repo-Commit": hub.commit}
            return self._send(200, body, headers, with_body)
        if path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": _blob_id(body)}
                for name, body in hub.files.items()
            ]
            return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, with_body)
        model = {"id": hub.name, "sha": hub.commit, "siblings": [{"rfilename": name} for name in hub.files]}
        return self._send(200, json.dumps(model).encode(), {"Content-Type": "application/json"}, with_body)

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
    with _Hub(("127.0.0.1", 0), _Handler) as hub:
        hub.name, hub.commit, hub.files, hub.error_code, hub.fetched = name, commit, files, error_code, []
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{hub.server_port}", hub.fetched
        finally:
            hub.shutdown()
            thread.join()
