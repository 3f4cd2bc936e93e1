#!/usr/bin/env bash
# MLflow on a small machine of its own, beside a cluster of `ray up`: the first thing that a fresh Debian 12 runs (EC2's user
# data, GCE's startup script), as root. Passwords are made here and stay here; README says how to read the one you need.
# The lines with @...@ are filled in by the command in cluster/README.md.
set -euo pipefail
umask 077

ARTIFACTS='@ARTIFACTS@'  # s3://bucket/mlflow or gs://bucket/mlflow; the machine's role opens it

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends python3-venv postgresql
id mlflow >/dev/null 2>&1 || useradd --system --create-home --home-dir /var/lib/mlflow --shell /usr/sbin/nologin mlflow
install -d -m 0755 /opt/mlflow
install -d -m 0700 -o root /etc/mlflow

cat >/opt/mlflow/constraints.txt <<'CONSTRAINTS'
@CONSTRAINTS@
CONSTRAINTS
(
  umask 022
  test -x /opt/mlflow/venv/bin/python || python3 -m venv /opt/mlflow/venv
  /opt/mlflow/venv/bin/pip install --no-cache-dir --constraint /opt/mlflow/constraints.txt \
    'mlflow[auth]==3.17.2' boto3==1.44.5 'psycopg[binary]==3.3.9' google-cloud-storage==3.17.1
)

# No password between MLflow and its database: PostgreSQL listens on a socket, and asks the kernel who is at the other end.
as() { runuser -u "$1" -- "${@:2}"; }
cd /
as postgres psql -tAc "SELECT 1 FROM pg_roles WHERE rolname = 'mlflow'" | grep -q 1 || as postgres createuser mlflow
as postgres psql -tAc "SELECT 1 FROM pg_database WHERE datname = 'mlflow'" | grep -q 1 || as postgres createdb -O mlflow mlflow

cat >/etc/mlflow/basic_auth.ini <<'INI'
[mlflow]
default_permission = READ
database_uri = postgresql:///mlflow
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
if [[ ! -s /etc/mlflow/environment ]]; then
  secret() { python3 -c 'import secrets; print(secrets.token_urlsafe(24))'; }
  cat >/etc/mlflow/environment <<ENVIRONMENT
MLFLOW_AUTH_ADMIN_PASSWORD=$(secret)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret)
MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic_auth.ini
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
ENVIRONMENT
fi
chown -R root:mlflow /etc/mlflow
chmod 0750 /etc/mlflow
chmod 0640 /etc/mlflow/basic_auth.ini
chmod 0600 /etc/mlflow/environment  # systemd reads it as root

# Bound to the private address, and answering to it alone; the firewall lets in the cluster's nodes only.
address=$(hostname -I | awk '{print $1}')
cat >/etc/systemd/system/mlflow.service <<UNIT
[Unit]
After=network-online.target postgresql.service
Requires=postgresql.service

[Service]
User=mlflow
WorkingDirectory=/var/lib/mlflow
EnvironmentFile=/etc/mlflow/environment
ExecStart=/opt/mlflow/venv/bin/mlflow server --host $address --port 5000 --workers 2 --app-name basic-auth \\
  --backend-store-uri postgresql:///mlflow --artifacts-destination $ARTIFACTS --allowed-hosts $address:5000,localhost:*
Restart=on-failure
RestartSec=5
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=true
PrivateTmp=true
ReadWritePaths=/var/lib/mlflow

[Install]
WantedBy=multi-user.target
UNIT
chmod 0644 /etc/systemd/system/mlflow.service
systemctl daemon-reload
systemctl enable --now mlflow
