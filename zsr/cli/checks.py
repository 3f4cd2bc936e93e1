"""What ``zsr doctor`` looks at. A check yields findings; none may raise, hang or change anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zsr.cli.uploads import upload_size
from zsr.config import RunConfig

RAY_DEFAULT = "http://127.0.0.1:8265"
_DEMO = Path(".zsr")  # where `make demo` keeps its services' addresses and Ray's token
_TESTED_RAY = "2.60.0"
_RAY_UPLOAD_LIMIT = 512e6
_TIMEOUT_S = 3


@dataclass(frozen=True)
class Surroundings:
    """What the checks are about."""

    config: RunConfig
    ray_address: str
    working_dir: Path


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do unless all is well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    says: str
    fix: str = ""


Check = Callable[[Surroundings], Iterator[Finding]]


def guarded(check: Check, around: Surroundings) -> Iterator[Finding]:
    """Run a check; a check that breaks is itself a finding."""
    try:
        yield from check(around)
    except Exception as error:  # whatever is broken here must not hide the other lines
        yield Finding(check.__name__, "fail", f"{type(error).__name__}: {error}", "the check itself failed; see above")


def python(around: Surroundings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{version}, {os.cpu_count()} cores")


def torch(around: Surroundings) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        yield Finding(
            "torch", "ok", f"{torch.__version__}, {torch.cuda.device_count()} GPU: {', '.join(sorted(names))}"
        )
    elif around.config.launch.gpus_per_worker:
        says = f"{torch.__version__}, no GPU here, and launch.gpus_per_worker={around.config.launch.gpus_per_worker:g}"
        yield Finding("torch", "warn", says, "fine on a head node; for a run here set launch.gpus_per_worker=0")
    else:
        yield Finding("torch", "ok", f"{torch.__version__}, CPU only, {torch.get_num_threads()} threads")


def torchvision(around: Surroundings) -> Iterator[Finding]:
    import torchvision

    from zsr import _torchvision

    how = "operators declared by zsr" if _torchvision._library is not None else "matches torch"
    import open_clip

    yield Finding("torchvision", "ok", f"{torchvision.__version__}, {how}; open_clip {open_clip.__version__}")


def ray(around: Surroundings) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("ray", "warn", "not installed", "pip install 'zsr[ray]'; `zsr train --local` works without")
        return
    if importlib.util.find_spec("aiohttp_cors") is None:
        yield Finding("ray", "fail", f"{version} without its dashboard", "pip install 'ray[default,train,tune]'")
    elif version != _TESTED_RAY:
        yield Finding("ray", "warn", f"{version}, tested with {_TESTED_RAY}", f"pip install ray=={_TESTED_RAY}")
    else:
        yield Finding("ray", "ok", version)
    token, source = _ray_token(around.ray_address)
    if os.environ.get("RAY_AUTH_MODE") == "token" and not token:
        yield Finding("ray auth", "fail", f"RAY_AUTH_MODE=token, but {source}", "ray get-auth-token --generate")
    elif os.environ.get("RAY_AUTH_MODE") is None and token:
        # Ray's clients send the token only when told to, though its servers ask for it by themselves.
        fix = "export RAY_AUTH_MODE=token" + (f" RAY_AUTH_TOKEN_PATH={source}" if source.startswith(str(_DEMO)) else "")
        yield Finding("ray auth", "warn", f"token in {source}, RAY_AUTH_MODE not set", fix)
    else:
        yield Finding("ray auth", "ok", f"RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', '(not set)')}")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    status = http_status(f"{around.ray_address}/api/version", headers)
    if status == 200:
        yield Finding("ray cluster", "ok", f"{around.ray_address} answers")
    elif status in (401, 403):
        fix = "use the head's token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        yield Finding("ray cluster", "fail", f"{around.ray_address} refuses the token", fix)
    else:
        fix = "`make demo` starts one; or set RAY_API_SERVER_ADDRESS"
        yield Finding("ray cluster", "warn", f"nothing answers at {around.ray_address}", fix)


def mlflow(around: Surroundings) -> Iterator[Finding]:
    tracking = around.config.tracking
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or demo_address("mlflow") or ""
    if tracking.name != "mlflow" and not uri:
        yield Finding("mlflow", "ok", f"not used; tracking.name={tracking.name}")
    elif importlib.util.find_spec("mlflow") is None:
        yield Finding("mlflow", "fail", "not installed", "pip install 'zsr[mlflow]'")
    elif not uri:
        yield Finding("mlflow", "fail", "no address", "set tracking.uri or MLFLOW_TRACKING_URI")
    elif not uri.startswith("http"):
        yield Finding("mlflow", "ok", f"{uri.partition(':')[0]} store, not asked")
    else:
        status = http_status(f"{uri.rstrip('/')}/health", {})
        if status == 200:
            yield Finding("mlflow", "ok", f"{uri} answers")
        elif status == 403:
            fix = "start the server with --allowed-hosts and this host's name"
            yield Finding("mlflow", "fail", f"{uri} refuses this host name", fix)
        else:
            fix = "start it, or mend the address; a run goes on without it and keeps its numbers in a file"
            yield Finding("mlflow", "warn", f"nothing answers at {uri}", fix)


def s3(around: Surroundings) -> Iterator[Finding]:
    config = around.config
    wanted = [a for a in (config.data.train, config.data.val, config.launch.storage) if a.startswith("s3://")]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not wanted and not endpoint:
        yield Finding("s3", "ok", "not used")
    elif importlib.util.find_spec("boto3") is None:
        yield Finding("s3", "fail", "boto3 is not installed", "pip install 'zsr[s3]'")
    elif endpoint and http_status(endpoint, {}) is None:
        yield Finding("s3", "fail", f"nothing answers at {endpoint}", "mend AWS_ENDPOINT_URL")
    else:
        yield Finding("s3", "ok", f"{endpoint or 'the default endpoint'}, for {len(wanted)} of this run's addresses")


def data(around: Surroundings) -> Iterator[Finding]:
    from zsr.data.shards import ShardSet

    config = around.config
    for what, address in (("data.train", config.data.train), ("data.val", config.data.val)):
        try:
            shards = ShardSet(address, config.data.cache_dir)
        except (ValueError, OSError) as error:
            yield Finding(what, "fail", str(error), f"set {what}, or make the set with `zsr data convert`")
            continue
        num_shards = len(shards.index.shards)
        says = f"{address}: {len(shards)} images, {len(shards.classes)} classes, {num_shards} shards"
        batch = config.train.batch_size
        if what == "data.train" and config.data.last_batch == "drop" and len(shards) < batch:
            fix = f"set train.batch_size to at most {len(shards)}, or data.last_batch=complete"
            yield Finding(what, "fail", f"{says}; fewer than one batch of {batch}", fix)
        elif what == "data.train" and address.startswith("s3://") and num_shards < config.launch.workers:
            fix = "write smaller shards: zsr data convert --samples-per-shard"
            yield Finding(what, "warn", f"{says} for {config.launch.workers} workers, each of which fetches all", fix)
        else:
            yield Finding(what, "ok", says)


def disk(around: Surroundings) -> Iterator[Finding]:
    storage = around.config.launch.storage
    places = {"storage": Path("." if storage.startswith("s3://") else storage)}
    places["cache"] = Path(around.config.data.cache_dir or os.environ.get("ZSR_CACHE") or "~/.cache/zsr").expanduser()
    for what, place in places.items():
        existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        state: Literal["ok", "warn", "fail"] = "ok" if free > 10 else "warn" if free > 1 else "fail"
        yield Finding(f"disk {what}", state, f"{free:.1f} GB free for {place}", "free some, or choose another folder")


def working_dir(around: Surroundings) -> Iterator[Finding]:
    size, largest = upload_size(around.working_dir)
    says = f"`ray job submit --working-dir {around.working_dir}` uploads {size / 1e6:.1f} MB"
    if size < 100e6:
        yield Finding("upload", "ok", says)
    else:
        state: Literal["warn", "fail"] = "fail" if size > _RAY_UPLOAD_LIMIT else "warn"
        biggest = ", ".join(f"{name} {bytes / 1e6:.0f} MB" for name, bytes in largest)
        yield Finding("upload", state, f"{says}: {biggest}", "name what is not needed in .rayignore")


ALL: tuple[Check, ...] = (python, torch, torchvision, ray, mlflow, s3, data, disk, working_dir)


def demo_address(service: str) -> str | None:
    """Where a service that `make demo` started in this folder listens, if it still runs."""
    from zsr.launch.services import Services

    found = Services(_DEMO / "demo.json").get(service)
    return None if found is None else found.address


def _ray_token(address: str) -> tuple[str, str]:
    """The token for this cluster and where it is from; never printed."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if address == demo_address("ray") and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        path = _DEMO / "ray-token"
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", f"{path} is not there"


def http_status(url: str, headers: dict[str, str]) -> int | None:
    """The status of a GET, or None if nothing answers."""
    if not url.startswith(("http://", "https://")):
        return None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
