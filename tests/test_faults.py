"""The proxy spoils what it is told to, as it is told to, and nothing else."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from faults import DELETE, DOWNLOAD, MEDIA, UPLOAD, Faults, Rule, faults
from gcs import BUCKET, Emulator

DATA = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def proxy(gcs: Emulator) -> Iterator[Faults]:
    with faults(gcs) as started:
        yield started


def put(proxy: Faults, name: str, data: bytes = DATA) -> int:
    url = f"{proxy.address}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
    asked = urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"}, method="POST")
    with urllib.request.urlopen(asked) as answer:
        return int(json.loads(answer.read())["size"])


def get(proxy: Faults, name: str) -> bytes:
    with urllib.request.urlopen(f"{proxy.address}/storage/v1/b/{BUCKET}/o/{quote(name)}?alt=media") as answer:
        return answer.read()


def test_it_passes_on_what_it_is_not_told_to_spoil(proxy: Faults) -> None:
    proxy.set()
    assert put(proxy, "whole") == len(DATA) and get(proxy, "whole") == DATA
    assert proxy.counts() == {"all": 2}


def test_a_share_of_the_requests_is_refused(proxy: Faults) -> None:
    put(proxy, "shared", b"x")
    proxy.set(Rule("refuse", DOWNLOAD, share=0.5, status=429))
    found = []
    for _ in range(40):
        try:
            found.append(get(proxy, "shared"))
        except urllib.error.HTTPError as error:
            assert error.code == 429
    assert 5 < len(found) < 35 and proxy.counts() == {"all": 40, "refuse": 40 - len(found)}
    assert put(proxy, "other") == len(DATA)


def test_only_so_often(proxy: Faults) -> None:
    proxy.set(Rule("refuse", UPLOAD, status=500, times=1))
    with pytest.raises(urllib.error.HTTPError):
        put(proxy, "often")
    assert put(proxy, "often") == len(DATA)


def test_connections_break(proxy: Faults) -> None:
    proxy.set(Rule("reset", UPLOAD))
    with pytest.raises(ConnectionError):
        put(proxy, "broken")
    proxy.set()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(proxy, "broken")
    proxy.set(Rule("unanswered", UPLOAD))
    with pytest.raises(ConnectionError):
        put(proxy, "unanswered")
    proxy.set(Rule("truncate", DOWNLOAD))
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        get(proxy, "unanswered")
    proxy.set()
    assert get(proxy, "unanswered") == DATA


def test_half_an_upload_is_kept(proxy: Faults) -> None:
    proxy.set(Rule("shorten", MEDIA))
    assert put(proxy, "half") == len(DATA) // 2 and get(proxy, "half") == DATA[:len(DATA) // 2]


def test_a_delete_can_be_refused(proxy: Faults) -> None:
    proxy.set(Rule("refuse", DELETE, status=403))
    put(proxy, "kept")
    asked = urllib.request.Request(f"{proxy.address}/storage/v1/b/{BUCKET}/o/kept", method="DELETE")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked)
    assert get(proxy, "kept") == DATA


def test_tensorstore_and_gcsfs_work_through_it(proxy: Faults, gcs: Emulator) -> None:
    """In a process of its own, as TensorStore reads its address once."""
    import subprocess
    import sys

    from conftest import OUTER_ENVIRONMENT, ROOT

    proxy.set()
    folder = gcs.folder()
    program = f"""
from crystal_jax import files
files.write_bytes("{folder}/a", b"x" * 3_000_000)
print(len(files.read_bytes("{folder}/a")), files.list_files(files.as_path("{folder}")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=False,
                          env={**OUTER_ENVIRONMENT, **proxy.environment})
    assert done.stdout == "3000000 {'a'}\n", done.stderr
    assert proxy.counts()["all"] >= 3
