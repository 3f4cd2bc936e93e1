"""cluster/: what can be known of these files without a cloud, a Kubernetes or a Slurm."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private import util as autoscaler

from zsr.config import load_config
from zsr.launch.capacity import LIMITS_VARIABLE
from zsr.launch.cluster import find_limits
from zsr.launch.services import Services
from zsr.launch.sweep import parse_arguments

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas"
LAUNCHER = ["aws.yaml", "gcp.yaml"]
KUBERAY = {"raycluster.yaml": "rayclusters.yaml", "rayjob.yaml": "rayjobs.yaml"}
MANIFESTS = sorted((CLUSTER / "k8s").glob("*.yaml"))
README = (CLUSTER / "README.md").read_text()
PRESET = "tima-vit-b32-imagenet"

Tree = dict[str, Any]


def launcher(name: str) -> Tree:
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def manifest(name: str) -> Tree:
    return dict(yaml.safe_load((CLUSTER / "k8s" / name).read_text()))


def ray_spec(name: str) -> Tree:
    spec = manifest(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def node_groups() -> Iterator[tuple[str, float, float, int]]:
    """File and group, CPUs and GPUs of a node, nodes at most."""
    for name in LAUNCHER:
        tree = launcher(name)
        for node, group in tree["available_node_types"].items():
            if node != tree["head_node_type"]:
                yield f"{name}:{node}", group["resources"]["CPU"], group["resources"]["GPU"], group["max_workers"]
    for name in KUBERAY:
        for group in ray_spec(name)["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            yield (
                f"{name}:{group['groupName']}",
                int(limits["cpu"]),
                int(limits["nvidia.com/gpu"]),
                group["maxReplicas"],
            )
    text = (CLUSTER / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    kept = re.search(r"SLURM_CPUS_PER_TASK - (\d+)", text)
    assert kept is not None
    # The first node keeps some CPUs for the driver; every node must hold a trial, that one too.
    yield "slurm.sh", int(asked["cpus-per-task"]) - int(kept[1]), int(asked["gpus-per-node"]), int(asked["nodes"])


@pytest.mark.parametrize("group", list(node_groups()), ids=lambda group: group[0])
def test_a_trial_fits_a_node_of_every_group(group: tuple[str, float, float, int]) -> None:
    launch = load_config(PRESET, []).launch
    _, cpus, gpus, nodes = group
    assert launch.workers * launch.cpus_per_worker <= cpus
    assert launch.workers * launch.gpus_per_worker <= gpus
    assert launch.gpus_per_worker > 0
    assert nodes >= 1


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_pass_rays_own_checks(name: str) -> None:
    tree = launcher(name)
    schema = json.loads(Path(autoscaler.__file__).parents[1].joinpath("ray-schema.json").read_text())
    jsonschema.validate(tree, schema)
    prepared = autoscaler.prepare_config(copy.deepcopy(tree))
    autoscaler.validate_config(prepared)
    # Ray's defaults, which would come in for anything left out, install a nightly build.
    assert [prepared[key] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")] == [[], [], []]
    # The checks above can fail.
    tree["available_node_types"]["gpu-l4"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError):
        autoscaler.validate_config(autoscaler.prepare_config(tree))


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_bound_the_bill_and_guard_the_cluster(name: str) -> None:
    tree = launcher(name)
    head = tree["available_node_types"][tree["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head["node_config"])
    for node, group in tree["available_node_types"].items():
        if node != tree["head_node_type"]:
            assert group["min_workers"] == 0
            assert 0 < group["max_workers"] <= tree["max_workers"]
            assert is_spot(group["node_config"])
    assert 0 < tree["idle_timeout_minutes"] <= 60
    starts = [tree["head_start_ray_commands"][-1], tree["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in start and "RAY_AUTH_TOKEN_PATH=" in start for start in starts)
    assert {"--num-cpus=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1"} <= set(starts[0].split())
    options = " ".join(tree["docker"]["run_options"])
    assert "no-new-privileges" in options
    assert "--privileged" not in options


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_fixed_port_is_on_the_security_page(name: str) -> None:
    table = (ROOT / "docs" / "security.md").read_text().split("## Ports")[1].split("## By way")[0]
    tree = launcher(name)
    for command in (tree["head_start_ray_commands"][-1], tree["worker_start_ray_commands"][-1]):
        ports = re.findall(r"port=(\d+)", command)
        assert len(ports) >= 4
        assert set(ports) <= set(re.findall(r"\d+", table))


def is_spot(node: Tree) -> bool:
    on_gcp = any(entry.get("provisioningModel") == "SPOT" for entry in node.get("scheduling", []))
    return on_gcp or node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_fit_the_operators_schema(name: str) -> None:
    if not (SCHEMAS / KUBERAY[name]).exists():
        pytest.skip(f"KubeRay's CRDs are not part of this repository, and there is no {SCHEMAS / KUBERAY[name]}")
    tree = manifest(name)
    check = crd_validator(SCHEMAS / KUBERAY[name], tree["apiVersion"])
    assert [f"{list(error.absolute_path)}: {error.message}" for error in check.iter_errors(tree)] == []
    broken = copy.deepcopy(tree)
    spec = broken["spec"].get("rayClusterSpec", broken["spec"])
    spec["workerGroupSpecs"][0]["maxReplica"] = 3
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    spec["autoscalerOptions"]["version"] = "v3"
    assert len(list(check.iter_errors(broken))) == 3


def crd_validator(path: Path, api_version: str) -> jsonschema.Draft7Validator:
    versions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == api_version.split("/")[1])["schema"]["openAPIV3Schema"]
    strict: Tree = strictly(schema)
    strict["properties"].update(apiVersion={}, kind={}, metadata={"type": "object"})
    return jsonschema.Draft7Validator(strict)


def strictly(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON schema: fields that it does not know are refused, as the server would."""
    if isinstance(schema, list):
        return [strictly(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: value if key in ("enum", "required", "default") else strictly(value) for key, value in schema.items()}
    # Under "properties" the keys are names of fields, and one of them may be called "type" or "properties".
    if out.get("type") == "object" and isinstance(out.get("properties"), dict) and "additionalProperties" not in out:
        out["additionalProperties"] = bool(out.get("x-kubernetes-preserve-unknown-fields", False))
    if out.get("nullable") is True and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_scale_from_zero_behind_a_token(name: str) -> None:
    spec = ray_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["idleTimeoutSeconds"] > 0


@pytest.mark.parametrize("name", KUBERAY)
def test_sweeps_on_kubernetes_are_told_the_worker_groups_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ray_spec(name)
    environment = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv(
        LIMITS_VARIABLE, next(entry["value"] for entry in environment if entry["name"] == LIMITS_VARIABLE)
    )
    told = {kind.name: (kind.most, kind.shape.cpus, kind.shape.gpus) for kind in find_limits()[0]}
    groups = {}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        groups[group["groupName"]] = (group["maxReplicas"], float(limits["cpu"]), float(limits["nvidia.com/gpu"]))
    assert told == groups


def test_the_rayjob_ends_by_itself_and_both_manifests_agree() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    assert spec["suspend"] is False
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert ray_spec("rayjob.yaml") == ray_spec("raycluster.yaml")
    script, sweep, *arguments = shlex.split(spec["entrypoint"].replace("/opt/zsr/", ""))[1:]
    assert (ROOT / script).exists()
    assert (
        check_sweep_command([sweep, *arguments]).max_concurrent
        == ray_spec("rayjob.yaml")["workerGroupSpecs"][0]["maxReplicas"]
    )


def pods() -> Iterator[tuple[str, Tree]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield from pod_templates(f"{path.name}:{document['kind']}", document)


def pod_templates(where: str, tree: Any) -> Iterator[tuple[str, Tree]]:
    if isinstance(tree, dict):
        if "containers" in tree:
            yield where, tree
        for key, value in tree.items():
            yield from pod_templates(f"{where}.{key}", value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pod_templates(where, value)


@pytest.mark.parametrize("pod", list(pods()), ids=lambda pod: pod[0])
def test_pods_meet_the_restricted_standard_with_pinned_images(pod: tuple[str, Tree]) -> None:
    spec = pod[1]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert re.search(r":[a-z0-9.-]*\d+\.\d+", container["image"]), f"{container['image']} is not pinned"
        assert "memory" in container["resources"]["limits"]


def test_secrets_are_references_to_what_the_readme_creates() -> None:
    created = {}
    for command in commands():
        if "secret" in command and "generic" in command:
            keys = {word.split("=")[1] for word in command if word.startswith("--from-literal=")}
            created[command[command.index("generic") + 1]] = keys
    referred = [entry for _, pod in pods() for container in pod["containers"] for entry in container.get("env", [])]
    for entry in referred:
        if re.search("PASSWORD|SECRET|TOKEN", entry["name"]):
            reference = entry["valueFrom"]["secretKeyRef"]
            assert reference["key"] in created[reference["name"]]
    assert sum("valueFrom" in entry for entry in referred) >= 8


def test_mlflow_is_served_with_log_in_on_postgresql_to_named_hosts() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "k8s" / "mlflow.yaml").read_text()))
    deployment = next(document for document in documents if document["kind"] == "Deployment")
    arguments = dict(
        argument.removeprefix("--").split("=", 1)
        for argument in deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert arguments["app-name"] == "basic-auth"
    assert arguments["backend-store-uri"].startswith("postgresql://")
    # The list is exact: the address that Ray's pods are given must be on it, port and all.
    environment = ray_spec("rayjob.yaml")["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    address = next(entry["value"] for entry in environment if entry["name"] == "MLFLOW_TRACKING_URI")
    assert address.removeprefix("http://") in arguments["allowed-hosts"].split(",")
    assert not {"*", "*:*"} & set(arguments["allowed-hosts"].split(","))
    services = [document["spec"] for document in documents if document["kind"] == "Service"]
    assert all(service.get("type", "ClusterIP") == "ClusterIP" for service in services)
    assert "--app-name basic-auth" in (CLUSTER / "mlflow_vm.sh").read_text()


def pinned(*files: str) -> dict[str, str]:
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    split = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.partition("[")[0].lower(): version.strip() for name, _, version in split}


def test_versions_are_those_that_were_tested_together() -> None:
    tested = pinned("constraints.txt", "docker/requirements-servers.txt", "docker/requirements-cloud.txt")
    found = 0
    for path in [*CLUSTER.rglob("*.yaml"), *CLUSTER.glob("*.sh"), CLUSTER / "README.md"]:
        text = path.read_text()
        images = re.findall(r"zsr:(ray|mlflow)(\d[\d.]*\d)", text) + [
            ("ray", version) for version in re.findall(r"rayVersion: (\S+)", text)
        ]
        packages = re.findall(r"([A-Za-z0-9_-]+)(?:\[[a-z,]+\])?==(\d[\w.]*\w)", text)
        for name, version in images + packages:
            assert tested[name.lower()] == version, f"{path.name}: {name} {version}"
            found += 1
    assert found > 10


def commands() -> Iterator[list[str]]:
    """The commands of cluster/README.md, as words; variables stay as written."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def check_sweep_command(words: list[str]) -> Any:
    """Parse a sweep's command line; options, preset and settings must exist."""
    name, *arguments = words
    spec = importlib.util.spec_from_file_location("sweep_under_test", ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = parse_arguments(module.SWEEP, [word for word in arguments if not word.startswith("$")])
    load_config(asked.preset, asked.overrides)
    return asked


def test_commands_of_the_readme_name_what_exists() -> None:
    from typer.main import get_command

    from zsr.cli.main import app

    verbs: Any = get_command(app)
    sweeps = paths = spoken = 0
    for words in commands():
        for word in words:
            for path in re.findall(r"(?:file://|^)((?:cluster|docker|sweeps|zsr|tests)/[\w./-]+)", word):
                assert (ROOT / path).exists(), f"README names {path}"
                paths += 1
        if words[:1] == ["zsr"]:
            command = verbs.commands[words[1]]
            if hasattr(command, "commands"):
                assert words[2] in command.commands
            spoken += 1
        if "sweeps/tima_sweep.py" in words:
            check_sweep_command(words[words.index("sweeps/tima_sweep.py") :])
            sweeps += 1
        if words[:2] == ["python", "cluster/local.py"]:
            assert words[2] in ("up", "env", "kill", "down", "status")
        if "--target" in words:
            target = words[words.index("--target") + 1]
            assert re.search(rf"^FROM \S+ AS {target}$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert sweeps >= 4
    assert paths > 15
    assert spoken >= 3


def test_the_readmes_table_lists_every_file() -> None:
    table = README.split("## What it costs")[0]
    listed = set(re.findall(r"`([\w./-]+\.(?:yaml|json|sh|py))`", table)) - {"tests/unit/test_cluster_files.py"}
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert listed == {path.relative_to(CLUSTER).as_posix() for path in files} - {"README.md"}


def test_placeholders_are_what_the_readme_fills_in() -> None:
    placeholders = {
        "aws.yaml": ["123456789012", "ami-00000000000000000", "sg-00000000000000000"],
        "aws-worker-policy.json": ["zsr-bucket-example"],
        "aws-head-policy.json": ["123456789012"],
        "gcp.yaml": ["zsr-example-project", "zsr-example-bucket"],
        "mlflow_vm.sh": ["@CONSTRAINTS@", "@ARTIFACTS@"],
    }
    for name, values in placeholders.items():
        for value in values:
            assert value in (CLUSTER / name).read_text()
            assert value in README, f"the README does not say how to fill in {value} of {name}"
    for path in CLUSTER.glob("*.json"):
        json.loads(path.read_text())


def test_the_mlflow_machine_is_filled_in_by_the_readmes_command(tmp_path: Path) -> None:
    line = next(line for line in README.splitlines() if line.startswith("sed") and "mlflow_vm.sh" in line)
    environment = {**os.environ, "BUCKET": "some-bucket", "HOME": str(tmp_path)}
    (tmp_path / ".zsr-cluster").mkdir()
    subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, check=True)
    filled = (tmp_path / ".zsr-cluster" / "mlflow.sh").read_text()
    assert "ARTIFACTS='s3://some-bucket/mlflow'" in filled
    assert (ROOT / "constraints.txt").read_text() in filled
    assert not re.search(r"^@|'@", filled, re.MULTILINE)
    assert len(filled.encode()) < 16_384  # EC2 takes no more
    subprocess.run(["bash", "-n", str(tmp_path / ".zsr-cluster" / "mlflow.sh")], check=True)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert os.access(path, os.X_OK)


def test_only_containers_of_their_own_use_ray_stop() -> None:
    for path in [CLUSTER / "slurm.sh", CLUSTER / "local.py", *MANIFESTS]:
        lines = [line.partition("#")[0] for line in path.read_text().splitlines() if "``ray stop``" not in line]
        assert not any("ray stop" in line or "pkill" in line or "killall" in line for line in lines), path.name


@pytest.mark.parametrize(
    ("resume_code", "runs", "code"),
    [(0, ["--resume --dry-run", "--resume"], 7), (2, ["--resume --dry-run", ""], 7), (1, ["--resume --dry-run"], 1)],
    ids=["there is one", "there is none", "storage is away"],
)
def test_start_or_resume(tmp_path: Path, resume_code: int, runs: list[str], code: int) -> None:
    sweep = tmp_path / "sweep.py"
    sweep.write_text(
        "import sys\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write(' '.join(sys.argv[2:]) + '\\n')\n"
        f"sys.exit({resume_code} if '--dry-run' in sys.argv else 7)\n"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(CLUSTER / "start_or_resume.sh"), str(sweep), "x=1"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == code
    assert (tmp_path / "log").read_text().split("\n")[:-1] == runs


@pytest.fixture
def local() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_local", CLUSTER / "local.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_local_nodes_share_nothing_but_loopback(local: ModuleType, tmp_path: Path) -> None:
    first = set(local.start_command("node-1", tmp_path / "a", 2))
    second = set(local.start_command("node-2", tmp_path / "b", 2))
    assert "--node-ip-address=127.0.0.1" in first & second
    assert {word.partition("=")[0] for word in first ^ second} == {"--temp-dir", "--node-name"}
    # Fixed ports would collide: what is given is 0, "any".
    assert {word.partition("=")[2] for word in first if "port" in word} == {"0"}
    environment = local.environment(tmp_path / "token")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_ADDRESS" not in environment
    launch = load_config("demo", []).launch
    assert launch.workers * launch.cpus_per_worker <= 2 * 2  # the defaults of --nodes and --cpus


def test_local_stops_a_node_by_its_own_process_and_no_other(
    local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local.main(["up", "--nodes", "0"]) == 2
    assert local.main(["env"]) == 2
    assert local.main(["kill", "node-1"]) == 2
    assert "nothing" in capsys.readouterr().err
    nodes = local.LocalNodes(tmp_path)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    started: Services = nodes.services
    for name in ("node-1", "node-2"):
        started.start(name, sleep, address="", log=nodes.home / f"{name}.log", environment=os.environ, folder=tmp_path)
    assert local.main(["kill", "node-1"]) == 0
    assert started.get("node-1") is None
    assert started.get("node-2") is not None
    assert local.main(["down"]) == 0
    assert started.get("node-2") is None
