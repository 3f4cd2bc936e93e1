#!/usr/bin/env bash
# The install steps of docker/Dockerfile, one function a layer, so that they can be run on a bare Debian root where there is
# no container engine (docker/check_install.sh does).
#
#   docker/install.sh system | dependencies cpu|cuda | servers | s3 | zsr | user
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
venv=/opt/venv

# ca-certificates: object storage. rsync and openssh-client: `ray up` copies files into the container and, on the head, reaches
# new nodes. wget: KubeRay's probes. procps: zsr.launch.services and `ray stop` ask ps. libgomp1: torch.
system() {
  apt-get update
  apt-get install --yes --no-install-recommends \
    ca-certificates libgomp1 openssh-client procps python3 python3-venv rsync wget
  rm -rf /var/lib/apt/lists/*
  python3 -m venv "$venv"
  # `ray up` enters containers through login shells, which set PATH anew.
  echo "export PATH=$venv/bin:\$PATH" >/etc/profile.d/zsr.sh
}

# Everything but zsr itself, at the versions that were tested together. CUDA's libraries come as wheels that torch's own
# metadata pin, so the base image needs none and a machine needs the driver alone.
dependencies() {
  local index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
  if [[ $1 == cpu ]]; then
    pip ${index:+--extra-index-url "$index"} torch torchvision
    "$venv/bin/python" -c 'import torch; assert torch.version.cuda is None, "this is the CUDA build"'
  fi
  requirements >/tmp/requirements.txt
  pip --requirement /tmp/requirements.txt --requirement "$here/requirements-cloud.txt"
  rm /tmp/requirements.txt
}

# MLflow as a server: no torch, no Ray.
servers() {
  pip mlflow boto3 --requirement "$here/requirements-servers.txt"
}

s3() {
  "$venv/bin/pip" install --only-binary :all: --requirement "$here/requirements-s3.txt"
}

zsr() {
  pip --no-deps "$root"
}

# The same id as the first user of Ubuntu and Debian machines: files that `ray up` mounts keep their owner.
user() {
  useradd --create-home --uid 1000 --shell /bin/bash zsr
  install -d -o zsr -g zsr /var/lib/zsr /data
}

pip() {
  "$venv/bin/pip" install --constraint "$root/constraints.txt" "$@"
}

# The requirements of zsr[all] from pyproject.toml, without building zsr, whose sources are not in this layer.
requirements() {
  "$venv/bin/python" - "$root/pyproject.toml" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *extras["ray"], *extras["mlflow"], *extras["s3"], *extras["postgres"]]))
PYTHON
}

case ${1:-} in
  dependencies) case ${2:-} in cpu | cuda) ;; *) echo "install.sh dependencies: cpu or cuda" >&2; exit 2 ;; esac ;;
  system | servers | s3 | zsr | user) ;;
  *) echo "install.sh: system, dependencies cpu|cuda, servers, s3, zsr or user" >&2; exit 2 ;;
esac
"$@"
