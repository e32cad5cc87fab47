"""What the real gcloud sends for tpu/create and its fellows, caught by an API of our own on the loopback."""

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tpu_pods import ZONE, make_pod, normal

GCLOUD = shutil.which("gcloud")
GOLDEN = Path(__file__).with_name("gcloud_bodies.json")
PARENT = f"/v2/projects/my-project/locations/{ZONE}/queuedResources"

pytestmark = pytest.mark.skipif(GCLOUD is None, reason="gcloud isn't installed")


class Api(http.server.BaseHTTPRequestHandler):
    """Records each request; answers with an operation that is done, a resource, or what the test asks for."""

    requests: ClassVar[list[dict[str, Any]]] = []
    reply: ClassVar[tuple[int, dict[str, Any]] | None] = None

    def answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append({"method": self.command, "path": self.path, "body": json.loads(text) if text else None})
        code, found = self.reply or (200, {"name": f"projects/my-project/locations/{ZONE}/operations/o", "done": True,
                                           "response": {}})
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that leads gcloud to it."""
    Api.requests, Api.reply = [], None
    (tmp_path / "token").write_text("token")
    (tmp_path / "gcloud-config").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            **os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud-config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{server.server_port}/",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        }
        server.shutdown()


def gcloud(api: dict[str, str], argv: list[str]) -> subprocess.CompletedProcess[str]:
    assert GCLOUD
    return subprocess.run([GCLOUD, *argv], env=api, capture_output=True, text=True, check=False, timeout=120,
                          stdin=subprocess.DEVNULL)


def created(folder: Path, text: str) -> list[str]:
    """The arguments that tpu/create gives to gcloud."""
    pod = make_pod(folder)
    pod.write(text)
    pod.put("launch.json", "{}")
    result = pod("create", "--incarnation=3")
    assert result.returncode == 0, result.stderr
    return next(call for call in pod.cloud.calls() if call[3:4] == ["create"])


def shortened(request: dict[str, Any]) -> dict[str, Any]:
    """Without what changes from day to day; of the scripts that travel in the metadata, their first line."""
    metadata = request["body"]["tpu"]["nodeSpec"][0]["node"]["metadata"]
    for key, value in metadata.items():
        metadata[key] = value.split("\n")[0]
    return json.loads(normal([json.dumps(request)]).strip("'"))


CASES = {
    "v4, spot": "TPU_TYPE=v4-512",
    "v5e, on demand": "TPU_TYPE=v5litepod-256\nCAPACITY=on-demand",
    "v5p, reserved": "CAPACITY=reserved",
    "v6e, two slices, spot": "TPU_TYPE=v6e-256\nSLICES=2",
}


def test_bodies_of_creation(api: dict[str, str], tmp_path: Path) -> None:
    """The golden file; when a change is wanted, delete the file and run this twice."""
    found = {}
    for number, (title, text) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        result = gcloud(api, created(tmp_path / str(number), text))
        assert result.returncode == 0, result.stderr
        found[title] = shortened(Api.requests.pop())
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{GOLDEN.name}: written anew; look at it and run this again")
    assert found == json.loads(GOLDEN.read_text())


def test_what_the_bodies_must_say() -> None:
    """The golden file itself: money, network and rights."""
    for title, request in json.loads(GOLDEN.read_text()).items():
        body, spec = request["body"], request["body"]["tpu"]["nodeSpec"][0]
        assert ("spot" in body) == ("spot" in title)
        assert ("guaranteed" in body or "reservationName" in body) == ("reserved" in title)
        assert request["path"].startswith(f"{PARENT}?")
        assert spec["node"]["networkConfig"]["enableExternalIps"] is False
        assert spec["node"]["serviceAccount"]["scope"] == ["https://www.googleapis.com/auth/cloud-platform"]
        assert spec["node"]["labels"]["crystal-run"] == "crystal-7b"
        assert ("multisliceParams" in spec) == ("two slices" in title)
        assert not re.search(r"token|secret|password|private", json.dumps(request), re.I)


def test_the_trap_of_the_alpha_track(api: dict[str, str], tmp_path: Path) -> None:
    """Why the scripts use the track that is generally available."""
    assert gcloud(api, ["alpha", *created(tmp_path, "")]).returncode == 0
    assert Api.requests.pop()["body"]["provisioningModel"] == "STANDARD"


def test_deletion_and_reset(api: dict[str, str]) -> None:
    place = ["crystal-7b", "--project=my-project", f"--zone={ZONE}"]
    assert gcloud(api, ["compute", "tpus", "queued-resources", "delete", *place, "--force", "--quiet",
                        "--async"]).returncode == 0
    assert gcloud(api, ["compute", "tpus", "queued-resources", "reset", *place, "--quiet", "--async"]).returncode == 0
    sent = [(request["method"], request["path"].replace("&alt=json", "").replace("alt=json&", ""))
            for request in Api.requests]
    assert sent[0] == ("DELETE", f"{PARENT}/crystal-7b?force=True")
    assert sent[1][1].startswith(f"{PARENT}/crystal-7b:reset")


@pytest.mark.parametrize("code, status, gone", [
    (404, "NOT_FOUND", True), (404, "PROJECT", False), (401, "UNAUTHENTICATED", False),
    (403, "PERMISSION_DENIED", False)])
def test_only_our_own_not_found_means_gone(api: dict[str, str], monkeypatch: pytest.MonkeyPatch, code: int, status: str,
                                           gone: bool) -> None:
    from tpu.cloud import Cloud
    from tpu.decide import GONE

    text = {"NOT_FOUND": f"Resource '{PARENT[4:]}/crystal-7b' was not found",
            "PROJECT": "Project 'my-project' was not found"}.get(status, "no")
    Api.reply = (code, {"error": {"code": code, "message": text,
                                  "status": "NOT_FOUND" if status == "PROJECT" else status}})
    for name, value in api.items():
        monkeypatch.setenv(name, value)
    state = Cloud("my-project", "crystal-7b", "gs://my-bucket/crystal-7b/pod", []).describe(ZONE).state
    assert state == (GONE if gone else None)


def test_a_described_resource_is_read(api: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tpu.cloud import Cloud, Resource

    node = {"labels": {"crystal-run": "crystal-7b"}, "metadata": {"crystal-incarnation": "3"}}
    Api.reply = (200, {"name": f"{PARENT[4:]}/crystal-7b", "state": {"state": "WAITING_FOR_RESOURCES"},
                       "tpu": {"nodeSpec": [{"nodeId": "crystal-7b", "node": node}]}})
    for name, value in api.items():
        monkeypatch.setenv(name, value)
    found = Cloud("my-project", "crystal-7b", "gs://my-bucket/crystal-7b/pod", []).describe(ZONE)
    assert found == Resource("WAITING_FOR_RESOURCES", True, "3")
