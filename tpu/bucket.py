"""Small objects of one run in its bucket, from a virtual machine: read, write, list, remove.

Standard library only, since it runs before anything is installed. Its invariant: a `write` that is told a generation
changes nothing unless the object still has it (0: doesn't exist). The rights are those of the machine's service
account; STORAGE_EMULATOR_HOST leads to an emulator, which asks for none.
"""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

SECONDS = 30
"""Of one request."""


def metadata(path: str) -> str:
    """What the metadata server knows of this machine; OSError where there is none."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return reply.read().decode()


@dataclass
class Bucket:
    """The objects under gs://NAME/PREFIX."""

    name: str
    prefix: str
    _token: str = ""
    _until: float = field(default=0.0)

    def read(self, key: str) -> bytes | None:
        """An object's bytes; None if there is none."""
        try:
            return self._call("GET", f"storage/v1/b/{self.name}/o/{self._quoted(key)}?alt=media")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            error.close()
            return None

    def write(self, key: str, data: bytes, generation: int | None = None) -> bool:
        """Writes the whole object; False if it hasn't that generation."""
        query = {"uploadType": "media", "name": f"{self.prefix}/{key}"}
        if generation is not None:
            query["ifGenerationMatch"] = str(generation)
        try:
            self._call("POST", f"upload/storage/v1/b/{self.name}/o?{urllib.parse.urlencode(query)}", data)
        except urllib.error.HTTPError as error:
            if error.code != 412:
                raise
            error.close()
            return False
        return True

    def list(self, start: str) -> list[str]:
        """The keys that begin so."""
        keys, page = [], ""
        while True:
            query = {"prefix": f"{self.prefix}/{start}", **({"pageToken": page} if page else {})}
            found = json.loads(self._call("GET", f"storage/v1/b/{self.name}/o?{urllib.parse.urlencode(query)}"))
            keys += [item["name"].removeprefix(f"{self.prefix}/") for item in found.get("items", [])]
            page = found.get("nextPageToken", "")
            if not page:
                return keys

    def read_json(self, key: str) -> Any:
        """None if there is no such object, or it isn't JSON."""
        data = self.read(key)
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            return None

    def write_json(self, key: str, value: Any, generation: int | None = None) -> bool:
        """On one line, so that several can be read one after another."""
        return self.write(key, json.dumps(value).encode() + b"\n", generation)

    def _quoted(self, key: str) -> str:
        return urllib.parse.quote(f"{self.prefix}/{key}", safe="")

    def _call(self, method: str, path: str, data: bytes | None = None) -> bytes:
        host = os.environ.get("STORAGE_EMULATOR_HOST")
        headers = {"Content-Type": "application/octet-stream"}
        if not host:
            headers["Authorization"] = f"Bearer {self._find_token()}"
        address = f"{host or 'https://storage.googleapis.com'}/{path}"
        request = urllib.request.Request(address, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return reply.read()

    def _find_token(self) -> str:
        if time.monotonic() > self._until:
            found = json.loads(metadata("instance/service-accounts/default/token"))
            # A minute before its end it may expire on the way.
            self._token, self._until = found["access_token"], time.monotonic() + found["expires_in"] - 60
        return self._token
