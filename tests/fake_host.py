"""What a host of a pod talks to, on one port of this machine: the metadata server, the storage, the TPU API.

Invariant: storage and API answer only to the token that the metadata server gives out.
"""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "ya29.the-token"
BUCKET, RUN = "my-bucket", "crystal-7b"


class Surroundings:
    """`attributes`: of the instance. `objects`: key under RUN/pod/ to bytes. `deleted`: what the API was told to."""

    def __init__(self, **attributes: str) -> None:
        given = {key.replace("_", "-"): text for key, text in attributes.items()}
        self.attributes = {"crystal-bucket": BUCKET, "crystal-run": RUN, "crystal-incarnation": "3",
                           "crystal-expires": "4000000000", "crystal-hosts": "1", "crystal-slices": "1",
                           "agent-worker-number": "0", **given}
        self.objects: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.failing = 0  # so many requests to the storage are answered with 503
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def environment(self) -> dict[str, str]:
        """For the scripts and the agent."""
        address = f"127.0.0.1:{self._server.server_port}"
        return {"GCE_METADATA_HOST": address, "STORAGE_EMULATOR_HOST": f"http://{address}", "TPU_API": f"http://{address}"}

    def json(self, key: str) -> Any:
        return json.loads(self.objects[key])

    def __enter__(self) -> "Surroundings":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def metadata(self, path: str) -> str | None:
        known = {"project/project-id": "my-project", "instance/zone": "projects/1/zones/us-east5-a",
                 "instance/service-accounts/default/token": json.dumps({"access_token": TOKEN, "expires_in": 3600})}
        return known.get(path) or self.attributes.get(path.removeprefix("instance/attributes/"))

    def storage(self, method: str, path: str, query: dict[str, str], data: bytes) -> tuple[int, bytes]:
        if self.failing:
            self.failing -= 1
            return 503, b"busy"
        objects = f"/storage/v1/b/{BUCKET}/o"
        prefix = f"{RUN}/pod/"
        if method == "POST" and path == f"/upload{objects}":
            key = query["name"].removeprefix(prefix)
            if query.get("ifGenerationMatch") == "0" and key in self.objects:
                return 412, b""
            self.objects[key] = data
            return 200, b"{}"
        if method == "GET" and path == objects:
            names = [prefix + key for key in sorted(self.objects) if (prefix + key).startswith(query["prefix"])]
            return 200, json.dumps({"items": [{"name": name} for name in names]}).encode()
        key = urllib.parse.unquote(path.removeprefix(f"{objects}/")).removeprefix(prefix)
        return (200, self.objects[key]) if method == "GET" and key in self.objects else (404, b"")


def _handler(world: Surroundings) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path, _, query = self.path.partition("?")
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path.startswith("/computeMetadata/v1/"):
                found = world.metadata(path.removeprefix("/computeMetadata/v1/"))
                right = self.headers.get("Metadata-Flavor") == "Google"
                code, reply = (404, b"") if found is None or not right else (200, found.encode())
            elif path.startswith("/v2/"):
                assert self.command == "DELETE"
                code, reply = (200, b"{}") if self.headers.get("Authorization") == f"Bearer {TOKEN}" else (401, b"")
                world.deleted += [self.path] if code == 200 else []
            else:
                code, reply = world.storage(self.command, path, dict(urllib.parse.parse_qsl(query)), data)
            self.send_response(code)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
