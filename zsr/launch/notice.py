"""A sidecar for preemptible machines: turns the cloud's notice into a drain of this machine's Ray node.

    python -m zsr.launch.notice --cloud aws        # beside `ray start` on every spot machine; --cloud gcp likewise

AWS gives two minutes (instance-action in the metadata of a spot instance), Google 30 seconds (the instance's preempted
flag). Draining with that deadline makes Ray place nothing new here and tells training, which writes a checkpoint and
goes on until the machine is gone; Ray then starts it again elsewhere without counting a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

ENDPOINT = "http://169.254.169.254"
MARGIN_S = 5.0
"""Before the machine goes: the deadline that Ray is told is earlier by this much."""
GCP_NOTICE_S = 30.0
CONNECT_PAUSE_S = 5.0


def seconds_left_aws(endpoint: str) -> float | None:
    """Seconds until EC2 takes this instance away; None while there is no notice.

    Raises:
        OSError: no metadata service answers.
    """
    token = _ask(f"{endpoint}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    try:
        notice = _ask(f"{endpoint}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # the usual answer: nothing is planned
            return None
        raise
    at = datetime.fromisoformat(json.loads(notice)["time"])
    return (at - datetime.now(UTC)).total_seconds()


def seconds_left_gcp(endpoint: str) -> float | None:
    """Seconds until Compute Engine takes this instance away; None while there is no notice.

    Raises:
        OSError: no metadata service answers.
    """
    flag = _ask(f"{endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if flag.strip() == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": seconds_left_aws, "gcp": seconds_left_gcp}


def watch(seconds_left: Callable[[], float | None], poll_s: float) -> float:
    """Wait for a notice; return the seconds that it leaves. A service that does not answer is asked again."""
    silent = False
    while True:
        try:
            left = seconds_left()
            if left is not None:
                return left
            silent = False
        except (OSError, ValueError, KeyError) as error:
            if not silent:  # said once an outage
                _say(f"notice=unknown problem={str(error)[:200]!r}")
            silent = True
        time.sleep(poll_s)


def find_node(address: str, node_name: str | None) -> str:
    """Id of this machine's Ray node, or of the one with this name; waits until it has joined."""
    import ray

    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            try:
                if node_name is None:
                    return str(ray.get_runtime_context().get_node_id())
                found = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeName"] == node_name]
                if found:
                    return str(found[0])
            finally:
                ray.shutdown()
        except (ConnectionError, RuntimeError, ValueError) as error:
            _say(f"node=waiting problem={str(error).splitlines()[0][:200]!r}")
        time.sleep(CONNECT_PAUSE_S)


def drain(address: str, node_id: str, seconds: float) -> None:
    """Drain a node, as one that is preempted in so many seconds.

    Raises:
        OSError: Ray refused.
    """
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this machine back"]
    command += ["--deadline-remaining-seconds", str(max(int(seconds), 1))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ray drain-node: {(done.stdout + done.stderr).strip()[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Watch until there is a notice, then drain; 0 once Ray has accepted."""
    parser = argparse.ArgumentParser(
        prog="python -m zsr.launch.notice", description="From the cloud's notice to a drain."
    )
    parser.add_argument("--cloud", choices=sorted(CLOUDS), required=True)
    parser.add_argument("--address", default="auto", help="of the cluster (default: the one that runs here)")
    parser.add_argument("--node-name", help="what `ray start --node-name` said, where a machine holds several nodes")
    parser.add_argument("--poll", type=float, default=2.0, help="seconds between questions (default: %(default)s)")
    parser.add_argument("--endpoint", default=ENDPOINT, help="of the metadata service (default: %(default)s)")
    asked = parser.parse_args(argv)
    address = asked.address
    node_id = find_node(address, asked.node_name)
    _say(f"watching={asked.cloud} node={node_id}")
    left = watch(lambda: CLOUDS[asked.cloud](asked.endpoint), asked.poll)
    _say(f"notice={asked.cloud} node={node_id} seconds_left={left:.0f}")
    drain(address, node_id, left - MARGIN_S)
    _say(f"drained={node_id}")
    return 0


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service is this machine's own
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=2) as answer:
        return str(answer.read().decode())


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
