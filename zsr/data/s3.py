"""Shards in object storage: downloads that survive cut connections and never hand over wrong bytes.

A download that breaks, stalls or trickles goes on where it stopped, and only if the object is still the one it began
with. Waiting times between tries grow and are random, so that a cluster does not come back in step. Credentials and
endpoint are the AWS standard ones (environment, profile, role; ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``);
neither is written to a log or a message.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from zsr.data.cache import ShardCache
from zsr.data.index import Shard, ShardFile
from zsr.data.storage import FileMissing, Storage, empty_folder

log = logging.getLogger(__name__)

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 10
STALL_TIMEOUT_S = 20  # a connection that brings nothing for so long is given up
LEAST_BYTES_PER_S = 1024  # and one that brings less than this for so long
MAX_FAILURES = 8  # in a row, without progress in between
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 15.0
CHUNK_BYTES = 1 << 16  # most that is taken off a connection at once

_TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError"}


class TooSlowError(ConnectionError):
    """A connection brings something, but so little that another one is worth a try."""


class S3Storage(Storage):
    """``s3://bucket/prefix``; shards are downloaded into ``cache_folder`` once for all processes of this machine.

    Raises:
        ValueError: the address has no bucket or carries credentials, or boto3 is not installed.
    """

    is_remote = True

    def __init__(self, address: str, cache_folder: Path, cache_bytes: int = 0) -> None:
        parts = urlsplit(address)
        if "@" in parts.netloc or ":" in parts.netloc:
            raise ValueError(
                "an s3:// address is s3://bucket/prefix; credentials belong in AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, the server in AWS_ENDPOINT_URL_S3"
            )
        if not parts.netloc:
            raise ValueError(f"an s3:// address is s3://bucket/prefix, not {address!r}")
        try:
            import boto3  # noqa: F401
        except ImportError:
            raise ValueError(f"reading {address} needs boto3; install it with `pip install boto3`") from None
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.address = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.cache = ShardCache(cache_folder, cache_bytes)
        self.num_retries = 0
        """Requests that this process had to repeat."""
        self._local = threading.local()

    def read_text(self, name: str) -> str:
        key = self._key(name)

        def read() -> str:
            answer = self._client().get_object(Bucket=self.bucket, Key=key)
            return b"".join(pieces(answer["Body"], answer["ContentLength"])).decode("utf-8")

        return self._persist(name, read)

    def fetch(self, shard: Shard) -> Path:
        return self.cache.get(shard, self.address, lambda partial: self._download(shard, partial))

    def list_tars(self) -> list[ShardFile]:
        prefix = self._key("")

        def read() -> list[dict[str, Any]]:
            pages = self._client().get_paginator("list_objects_v2")
            answers = pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            return [entry for answer in answers for entry in answer.get("Contents", [])]

        found = [ShardFile(e["Key"].removeprefix(prefix), e["Size"], e["ETag"]) for e in self._persist("", read)]
        return [entry for entry in found if entry.file.endswith(".tar")]

    def digest(self, found: ShardFile) -> str:
        return self.cache.adopt(found, self.address, lambda partial: self._download(found, partial))

    def parent(self) -> S3Storage:
        above = self.prefix.rpartition("/")[0]
        return S3Storage(f"s3://{self.bucket}/{above}", self.cache.folder, self.cache.max_bytes)

    def put(self, local: Path, name: str) -> None:
        def write() -> None:
            with local.open("rb") as file:
                self._client().put_object(Bucket=self.bucket, Key=self._key(name), Body=file)

        self._persist(name, write)

    def workspace(self) -> Path:
        own = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        return empty_folder(self.cache.folder.parent / "convert" / own)

    def remove(self, name: str) -> None:
        self._persist(name, lambda: self._client().delete_object(Bucket=self.bucket, Key=self._key(name)))

    def _download(self, shard: Shard | ShardFile, partial: Path) -> None:
        """Make ``partial`` hold as many bytes as the shard has, keeping what is there already."""
        with partial.open("ab") as file:
            if file.tell() > shard.bytes:
                file.truncate(0)
                file.seek(0)
            etag: dict[str, str] = {}  # of the object that this download began with

            def fetch_rest() -> None:
                if file.tell() < shard.bytes:
                    self._fetch_rest(shard, file, etag)

            self._persist(shard.file, fetch_rest, progress=file.tell)

    def _fetch_rest(self, shard: Shard | ShardFile, file: IO[bytes], etag: dict[str, str]) -> None:
        start = file.tell()
        key, rest = self._key(shard.file), f"bytes={start}-"
        answer = self._client().get_object(Bucket=self.bucket, Key=key, Range=rest, **etag)
        etag["IfMatch"] = answer["ETag"]
        size = start + answer["ContentLength"]
        if size != shard.bytes:
            raise ValueError(f"shard {shard.file} of {self.address} has {size} bytes, the index says {shard.bytes}")
        try:
            for piece in pieces(answer["Body"], answer["ContentLength"]):
                file.write(piece)
        finally:
            file.flush()

    def _persist(self, name: str, request: Callable[[], Result], progress: Callable[[], int] | None = None) -> Result:
        """Do a request until it succeeds, fails for good, or has failed ``MAX_FAILURES`` times without progress."""
        failures = 0
        while True:
            before = progress() if progress else 0
            try:
                return request()
            except Exception as error:
                if not is_transient(error):
                    raise self._explained(error, name) from None
                # Else a server that always trickles would be asked for ever.
                least = STALL_TIMEOUT_S * LEAST_BYTES_PER_S if isinstance(error, TooSlowError) else 1
                failures = 1 if progress and progress() - before >= least else failures + 1
                if failures > MAX_FAILURES:
                    raise OSError(
                        f"{self.address}/{name} could not be transferred: {failures} failures in a row{_reason(error)}"
                    ) from None
                wait = random.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1))
                self.num_retries += 1
                log.warning(
                    "event=s3_retry object=%s/%s at=%d failures=%d wait_s=%.2f error=%s",
                    self.address, name, progress() if progress else 0, failures, wait, type(error).__name__,
                )  # fmt: skip
                time.sleep(wait)

    def _explained(self, error: Exception, name: str) -> Exception:
        """A sentence for what a user can put right; the error itself for the rest."""
        from botocore import exceptions

        what = f"{self.address}/{name}"
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return ValueError(
                f"no AWS credentials for {what}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                "(off AWS, also AWS_EC2_METADATA_DISABLED=true, or each process first waits for a metadata server)"
            )
        if not isinstance(error, exceptions.ClientError):
            ours = not isinstance(error, exceptions.BotoCoreError)
            return error if ours else ValueError(f"{what} cannot be reached: {type(error).__name__}")
        code, status = error_code(error)
        if code == "NoSuchBucket":
            return ValueError(f"there is no bucket {self.bucket!r} at this endpoint; check the address {self.address}")
        if status == 404:
            return FileMissing(f"there is no {what}")
        if status == 416 or code == "InvalidRange":
            return ValueError(f"{what} is shorter than the index says")
        if status == 412:
            return ValueError(f"{what} was replaced while it was being read; start again with the new set")
        if status in (301, 400) and code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"):
            return ValueError(f"the bucket {self.bucket!r} is in another region; set AWS_REGION to the bucket's")
        if status in (401, 403):
            return ValueError(f"no access to {what} ({code}); check the credentials and the bucket's policy")
        return ValueError(f"{what}: the server answers {code} ({status})")

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _client(self) -> Any:
        # One client per thread and process: sockets must not be shared over a fork.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.client = make_client()
            self._local.process = os.getpid()
        return self._local.client

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def pieces(body: Any, size: int) -> Iterator[bytes]:
    """The ``size`` bytes of an answer, as they come.

    Raises:
        TooSlowError: ``STALL_TIMEOUT_S`` went by in which less came than ``LEAST_BYTES_PER_S`` asks for.
        ConnectionError: the connection closed early.
    """
    came = counted = 0
    since = time.monotonic()
    with body as stream:
        # Not `read`, which waits for as many bytes as it was asked for.
        while piece := stream.read1(CHUNK_BYTES):
            yield piece
            came += len(piece)
            waited = time.monotonic() - since
            if waited >= STALL_TIMEOUT_S and came < size:
                if came - counted < STALL_TIMEOUT_S * LEAST_BYTES_PER_S:
                    raise TooSlowError(f"{came - counted} bytes in {waited:.0f} s")
                since, counted = since + waited, came
    if came != size:
        raise ConnectionError("the connection closed early")


def make_client() -> Any:
    """An S3 client of the standard credentials; retrying is left to the caller, who knows how far a download came."""
    import boto3
    from botocore.config import Config as ClientConfig

    has_own_endpoint = bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    config = ClientConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=STALL_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        # Other servers than AWS seldom have a host name per bucket, nor do all know AWS's newer checksums.
        s3={"addressing_style": "path" if has_own_endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # boto3 itself reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return boto3.session.Session(region_name=region).client("s3", config=config)
    except ValueError:  # its text quotes the endpoint, which may hold a password
        raise ValueError("AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is not a URL such as http://host:port") from None


def error_code(error: Any) -> tuple[str, int]:
    """S3's code and the HTTP status of a ClientError."""
    code = error.response.get("Error", {}).get("Code", "")
    return str(code), int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        code, status = error_code(error)
        return status >= 500 or status == 429 or code in _TRANSIENT_CODES
    ours = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*ours, HTTPError, ConnectionError, TimeoutError))


def _reason(error: Exception) -> str:
    # The type alone: botocore's texts quote the endpoint's URL, which may hold a password.
    name = type(error).__name__
    unreachable = name in ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError")
    return f", the last one {name}" + ("; is the endpoint right, and is it up?" if unreachable else "")
