"""A cloud's metadata service on loopback, as a preemptible machine sees it."""

from __future__ import annotations

import http.server
import json
import threading
from datetime import UTC, datetime, timedelta


class Metadata:
    """A cloud's metadata service, as EC2 and Compute Engine have it, on loopback."""

    def __init__(self) -> None:
        self.gone_at: datetime | None = None
        metadata = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.answer("secret" if self.path == "/latest/api/token" else None)

            def do_GET(self) -> None:
                gone_at = metadata.gone_at
                if self.path == "/latest/meta-data/spot/instance-action":
                    trusted = self.headers.get("X-aws-ec2-metadata-token") == "secret"
                    when = gone_at and gone_at.strftime("%Y-%m-%dT%H:%M:%SZ")
                    self.answer(json.dumps({"action": "terminate", "time": when}) if when and trusted else None)
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    known = self.headers.get("Metadata-Flavor") == "Google"
                    self.answer(("TRUE" if gone_at else "FALSE") if known else None)
                else:
                    self.answer(None)

            def answer(self, text: str | None) -> None:
                self.send_response(404 if text is None else 200)
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def take_away_in(self, seconds: float) -> None:
        self.gone_at = datetime.now(UTC) + timedelta(seconds=seconds)

    def __enter__(self) -> Metadata:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
