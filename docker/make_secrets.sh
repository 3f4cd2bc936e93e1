#!/usr/bin/env bash
# Make the secrets that docker/compose.yaml mounts, in docker/secrets (ignored by git and by the image). What exists stays.
# The containers' user has the id 1000; as another user, start with sudo, and the files are given to it.
set -euo pipefail
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
for name in ray-token postgres-password mlflow-admin-password mlflow-flask-secret s3-access-key s3-secret-key; do
  [[ -s secrets/$name ]] || random >"secrets/$name"
done
cat >secrets/s3.json <<JSON
{"identities": [{"name": "zsr", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$(<secrets/s3-access-key)", "secretKey": "$(<secrets/s3-secret-key)"}]}]}
JSON
if [[ $(id -u) -eq 0 ]]; then
  chown -R 1000:1000 secrets
elif [[ $(id -u) -ne 1000 ]]; then
  echo "make_secrets: your id is $(id -u), the containers' is 1000: run this with sudo" >&2
  exit 1
fi
