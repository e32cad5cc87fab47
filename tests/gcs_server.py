"""The storage emulator with what it lacks: generations. A change that names one is made to no other.

`python gcs_server.py ARGS` is `python -m gcp_storage_emulator ARGS`; it takes one request at a time, so that nothing
comes between the look and the change.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.__main__ import main
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.server import GET, HANDLERS


def generation(request: Any, storage: Any, name: str) -> str:
    """Of the object as it is; 0 where there is none."""
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def guarded(change: Callable[..., Any]) -> Callable[..., Any]:
    """Answers 412 where the object has another generation than the one that the request names."""

    def handle(request: Any, response: Any, storage: Any) -> None:
        wanted = request.query.get("ifGenerationMatch")
        if wanted and "upload_id" not in request.query:
            body = request.data  # read in any case: it stands before the next request
            name = request.params.get("object_id") or request.query.get("name", [None])[0] or body["meta"]["name"]
            if generation(request, storage, name) != wanted[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        change(request, response, storage)

    return handle


def stamped(read: Callable[..., Any]) -> Callable[..., Any]:
    """Says which generation of an object was read."""

    def handle(request: Any, response: Any, storage: Any) -> None:
        read(request, response, storage)
        if "object_id" in request.params:
            response["X-Goog-Generation"] = generation(request, storage, request.params["object_id"])

    return handle


if __name__ == "__main__":
    for _, methods in HANDLERS:
        for method, handler in methods.items():
            methods[method] = stamped(handler) if method == GET else guarded(handler)
    main()
