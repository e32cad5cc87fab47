"""The objects of the scripted gcloud: gs:// names with generations, in a folder or in the storage emulator.

And the two small languages in gcloud's arguments: KEY=VALUE lists, paths into a resource.
"""

import json
import os
import urllib.parse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

State = Callable[[], AbstractContextManager[dict[str, Any]]]


class Failure(Exception):
    """A call that ends with a code and a line."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class Objects:
    """gs:// objects with generations, in FOLDER/objects or in the emulator."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder / "objects"
        self.state = state
        self.host = os.environ.get("STORAGE_EMULATOR_HOST")

    def _http(self, method: str, path: str, data: bytes | None = None) -> bytes:
        import urllib.error
        import urllib.request  # half of a call's time, and most calls don't need it

        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.host}/{path}", data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            raise Failure(f"HTTPError {error.code}: {path}") from error

    def _local(self, name: str) -> Path:
        return self.folder / urllib.parse.quote(name.removeprefix("gs://"), safe="")

    @staticmethod
    def _url(name: str) -> str:
        bucket, key = name.removeprefix("gs://").split("/", 1)
        return f"storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"

    def generation(self, name: str) -> int:
        """0: there is no such object."""
        if not self.host:
            with self.state() as state:
                return state["generations"].get(name, 0) if self._local(name).exists() else 0
        try:
            return int(json.loads(self._http("GET", self._url(name)))["generation"])
        except Failure as failure:
            if "404" in str(failure):
                return 0
            raise

    def get(self, name: str) -> bytes:
        if self.host and self.generation(name):
            return self._http("GET", self._url(name) + "?alt=media")
        if self.host or not self._local(name).exists():
            raise Failure(f"The following URLs matched no objects or files:\n{name}")
        return self._local(name).read_bytes()

    def put(self, name: str, data: bytes, match: int | None) -> None:
        if self.host:
            bucket, key = name.removeprefix("gs://").split("/", 1)
            query = {"uploadType": "media", "name": key, **({} if match is None else {"ifGenerationMatch": match})}
            self._http("POST", f"upload/storage/v1/b/{bucket}/o?{urllib.parse.urlencode(query)}", data)
            return
        with self.state() as state:
            file = self._local(name)
            if match is not None and (state["generations"].get(name, 0) if file.exists() else 0) != match:
                raise Failure("HTTPError 412: At least one of the pre-conditions you specified did not hold.")
            state["generations"][name] = state["generations"].get(name, 0) + 1
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)

    def delete(self, name: str, match: int | None) -> None:
        if self.host:
            query = "" if match is None else f"?ifGenerationMatch={match}"
            self._http("DELETE", self._url(name) + query)
            return
        with self.state() as state:
            file = self._local(name)
            if not file.exists():
                raise Failure(f"The following URLs matched no objects or files:\n{name}")
            if match is not None and state["generations"][name] != match:
                raise Failure("HTTPError 412: At least one of the pre-conditions you specified did not hold.")
            file.unlink()

    def list(self, prefix: str) -> list[str]:
        if not self.host:
            found = list(self.folder.iterdir()) if self.folder.exists() else []
            names = [f"gs://{urllib.parse.unquote(file.name)}" for file in found]
            return [name for name in names if name.startswith(prefix)]
        bucket, _, key = prefix.removeprefix("gs://").partition("/")
        listing = json.loads(self._http("GET", f"storage/v1/b/{bucket}/o?prefix={urllib.parse.quote(key, safe='')}"))
        return [f"gs://{bucket}/{item['name']}" for item in listing.get("items", [])]


def pairs(text: str) -> dict[str, str]:
    """Of a flag KEY=VALUE,KEY=VALUE or, with another delimiter, ^|^KEY=VALUE|KEY=VALUE."""
    delimiter, _, rest = text[1:].partition("^") if text.startswith("^") else (",", "", text)
    found = (pair.partition("=") for pair in rest.split(delimiter) if pair)
    return {key: value for key, _, value in found}


def field(item: Any, path: str) -> Any:
    """A value by a gcloud path such as tpu.nodeSpec[0].node.acceleratorType or name.basename()."""
    for part in path.replace("[", ".").replace("]", "").split("."):
        if part == "basename()":
            item = str(item).rsplit("/", 1)[-1]
        elif isinstance(item, list):
            item = item[int(part)] if int(part) < len(item) else ""
        else:
            item = item.get(part, "") if isinstance(item, dict) else ""
    return item
