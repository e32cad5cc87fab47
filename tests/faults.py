"""A storage that fails on demand: a proxy before the emulator of gcs.py, as a process of its own.

    python tests/faults.py PORT_OF_THE_EMULATOR SEED      prints its own port

Owns which requests are refused, delayed, cut off or damaged; what it isn't told to spoil, it passes on unchanged. The
rules come by HTTP (`Faults.set`), and it counts what it did (`Faults.counts`).
"""

import asyncio
import collections
import contextlib
import json
import random
import re
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from gcs import Emulator, environment

CONTROL = "/faults"
ANY, UPLOAD, DOWNLOAD, DELETE = ".*", "(POST|PUT) /upload/.*", "GET .*alt=media.*", "DELETE .*"
MEDIA = "POST /upload/.*uploadType=media.*"
AT_ONCE = 4
"""Requests under way to the emulator, which answers one after the other; more would wait for a second TCP attempt."""


@dataclass
class Rule:
    """What happens to a share of the requests whose `METHOD /path?query` matches; the first rule that fires counts."""

    kind: str
    """One of KINDS."""
    match: str = ANY
    share: float = 1.0
    status: int = 503
    seconds: float = 0.0
    times: int | None = None
    """It fires only so often."""


@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def bytes(self, body: bytes) -> bytes:
        kept = [(name, value) for name, value in self.headers
                if name.lower() not in ("connection", "content-length", "transfer-encoding", "expect")]
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{name}: {value}" for name, value in kept)]
        if body or self.method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body


class Reset(Exception):
    """The client's connection is to be broken off, after these bytes."""

    def __init__(self, sent: bytes = b""):
        self.sent = sent


class Proxy:
    """The server's side."""

    def __init__(self, port: int, seed: int):
        self.port, self.random = port, random.Random(seed)
        self.rules: list[Rule] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.under_way = asyncio.Semaphore(AT_ONCE)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await read_request(reader, writer):
                try:
                    writer.write(await self.answer(request))
                    await writer.drain()
                except Reset as reset:
                    writer.write(reset.sent)
                    await writer.drain()
                    linger = struct.pack("ii", 1, 0)  # closing sends RST
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return
        writer.close()

    async def answer(self, request: Request) -> bytes:
        if urlsplit(request.target).path == CONTROL:
            return self.control(request)
        rule = self.choose(f"{request.method} {request.target}")
        self.counts["all"] += 1
        if rule is None:
            return await self.forward(request, request.body)
        self.counts[rule.kind] += 1
        return await KINDS[rule.kind](self, rule, request)

    def control(self, request: Request) -> bytes:
        if request.method == "PUT":
            self.rules = [Rule(**rule) for rule in json.loads(request.body)]
            self.counts.clear()
        return response(200, json.dumps(self.counts).encode())

    def choose(self, line: str) -> Rule | None:
        for rule in self.rules:
            if rule.times != 0 and re.fullmatch(rule.match, line) and self.random.random() < rule.share:
                rule.times = None if rule.times is None else rule.times - 1
                return rule
        return None

    async def forward(self, request: Request, body: bytes) -> bytes:
        async with self.under_way:
            reader, writer = await asyncio.open_connection("localhost", self.port)
            writer.write(request.bytes(body))
            answer = await reader.read(-1)
            writer.close()
        # The emulator closes after each answer; the proxy keeps the client's connection.
        return answer.replace(b"HTTP/1.0", b"HTTP/1.1", 1)


async def refuse(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    error = {"code": rule.status, "message": "a fault on demand", "errors": [{"message": "a fault on demand"}]}
    return response(rule.status, json.dumps({"error": error}).encode())


async def delay(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    await asyncio.sleep(rule.seconds)
    return await proxy.forward(request, request.body)


async def reset(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    raise Reset


async def unanswered(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    """It was done, but the client doesn't learn it."""
    await proxy.forward(request, request.body)
    raise Reset


async def truncate(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    """Half of the answer."""
    head, blank, body = (await proxy.forward(request, request.body)).partition(b"\r\n\r\n")
    raise Reset(head + blank + body[:len(body) // 2])


async def shorten(proxy: Proxy, rule: Rule, request: Request) -> bytes:
    """Half of the upload is stored, and called a success."""
    return await proxy.forward(request, request.body[:len(request.body) // 2])


KINDS = {"refuse": refuse, "delay": delay, "reset": reset, "unanswered": unanswered, "truncate": truncate,
         "shorten": shorten}


def response(status: int, body: bytes) -> bytes:
    return (f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode() + body


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """None at the end of the connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    known = {name.lower(): value.lower() for name, value in headers}
    if known.get("expect") == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if known.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(known.get("content-length", 0)))
    return Request(method, target, headers, body)


async def serve(port: int, seed: int) -> None:
    proxy = Proxy(port, seed)
    clients = set()  # asyncio itself keeps no task alive

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.create_task(proxy.client(reader, writer))
        clients.add(client)
        client.add_done_callback(clients.discard)

    server = await asyncio.start_server(connected, "localhost", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass
class Faults:
    """A running proxy, from the side of a test."""

    environment: dict[str, str]
    """For a process whose storage is to fail; this process's own leads past the proxy."""
    address: str

    def set(self, *rules: Rule) -> None:
        """From now on these rules; none = a storage without faults. Counting begins anew."""
        self._ask("PUT", json.dumps([asdict(rule) for rule in rules]).encode())

    def counts(self) -> dict[str, int]:
        """Requests by what was done to them; `all` of them."""
        return self._ask("GET", None)

    def _ask(self, method: str, data: bytes | None) -> Any:
        asked = urllib.request.Request(self.address + CONTROL, data, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def faults(emulator: Emulator, seed: int = 0) -> Iterator[Faults]:
    """Starts a proxy before the emulator and ends it."""
    upstream = urlsplit(emulator.environment["STORAGE_EMULATOR_HOST"]).port
    process = subprocess.Popen([sys.executable, __file__, str(upstream), str(seed)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Faults(environment(port), f"http://localhost:{port}")
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
