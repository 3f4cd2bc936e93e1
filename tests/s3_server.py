"""An S3 server on loopback for tests, and a TCP proxy that treats connections badly on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.request import ProxyHandler, build_opener

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def moto_server(startup_s: float = 60) -> Iterator[int]:
    """Run moto's server in a process of its own; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + startup_s
        while True:
            try:
                opener.open(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"moto_server did not start (exit code {process.poll()})") from None
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def use_server(monkeypatch: pytest.MonkeyPatch, port: int, user_info: str = "") -> None:
    """Point the AWS variables at a server on loopback, and at nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://{user_info}127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


@dataclass
class Fault:
    """What happens to a connection once it has brought ``after`` bytes to the client."""

    after: int
    kind: Literal["reset", "close", "stall", "trickle", "503"] = "reset"


TRICKLE_S = 0.05  # for a byte


class FlakyProxy:
    """Forwards connections to ``target`` on loopback; ``faults(n)`` says what befalls connection n (from 0), if anything.

    Attributes:
        port: where it listens.
        num_connections, num_bytes: connections so far, and bytes brought to clients.
        num_left: trickling connections that clients have left.
    """

    def __init__(self, target: int, faults: Callable[[int], Fault | None]) -> None:
        self.target, self.faults = target, faults
        self.num_connections = self.num_bytes = self.num_left = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        listen = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listen, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        number = self.num_connections
        self.num_connections += 1
        fault = await asyncio.to_thread(self.faults, number)
        if fault is not None and fault.kind == "503":
            await client_in.read(1 << 16)
            client_out.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await client_out.drain()
            client_out.close()
            return
        server_in, server_out = await asyncio.open_connection("127.0.0.1", self.target)
        upstream = asyncio.create_task(_forward(client_in, server_out))
        try:
            # Cancelled when the proxy stops; asyncio would log that as a fault of the connection.
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._bring(server_in, client_out, fault)
        finally:
            upstream.cancel()
            server_out.close()
            client_out.close()

    async def _bring(self, source: asyncio.StreamReader, client: asyncio.StreamWriter, fault: Fault | None) -> None:
        left = fault.after if fault else sys.maxsize
        while chunk := await source.read(1 << 14):
            client.write(chunk[:left])
            await client.drain()
            self.num_bytes += min(left, len(chunk))
            left -= len(chunk)
            if fault and left < 0:
                if fault.kind == "trickle":
                    await self._trickle(chunk[left:], client)
                    left = 0
                    continue
                if fault.kind == "stall":
                    await asyncio.sleep(3600)
                elif fault.kind == "reset":
                    client.transport.abort()
                return

    async def _trickle(self, rest: bytes, client: asyncio.StreamWriter) -> None:
        for byte in rest:
            try:
                client.write(bytes([byte]))
                await client.drain()
            except ConnectionError:
                self.num_left += 1
                raise
            self.num_bytes += 1
            await asyncio.sleep(TRICKLE_S)


class FaultyGateway:
    """Passes HTTP requests on to ``target`` on loopback and spoils a share of them, drawn by ``seed``.

    A spoilt request meets, in turn: an answer of 503; an answer of 500 that did take effect; a connection reset in the middle
    of the answer; an answer that ends too early, cleanly. FlakyProxy spoils connections, which clients keep for many
    requests.

    Attributes:
        port: where it listens.
        requests, faults: Counters of requests by method, and of spoilt ones by kind.
        begun: Counter of objects by path that were asked for from their beginning.
    """

    KINDS = ("503", "500", "reset", "truncation")

    def __init__(self, target: int, share: float = 0.05, seed: int = 0) -> None:
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        rng, lock = random.Random(seed), threading.Lock()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    gateway.requests[self.command] += 1
                    kind = gateway.KINDS[gateway.faults.total() % 4] if rng.random() < share else None
                    if kind:
                        gateway.faults[kind] += 1
                    if self.command == "GET" and self.headers.get("Range", "bytes=0-") == "bytes=0-":
                        gateway.begun[self.path] += 1
                    keep = rng.random()
                if kind == "503":
                    self.answer(503, {}, b"")
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                upstream.request(self.command, self.path, body, dict(self.headers))
                response = upstream.getresponse()
                content = response.read()
                upstream.close()
                if kind == "500":
                    self.answer(500, {}, b"")
                    return
                headers = {name: value for name, value in response.getheaders() if name.lower() not in _PER_CONNECTION}
                self.answer(response.status, headers, content, kind, int(keep * len(content)))

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

            def answer(
                self, status: int, headers: dict[str, str], content: bytes, kind: str | None = None, keep: int = 0
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content[:keep] if kind else content)
                if kind == "reset":  # closing without lingering sends RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = self.close_connection or kind is not None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FaultyGateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


_PER_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "date", "server")


async def _forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await source.read(1 << 14):
            sink.write(chunk)
            await sink.drain()
