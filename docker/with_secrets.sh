#!/usr/bin/env bash
# Run a command with variables read from files: NAME_FILE=/run/secrets/x becomes NAME. Secrets then are in no image, no
# compose file and no `docker inspect`.
set -euo pipefail
for variable in $(compgen -e); do
  if [[ $variable == *_FILE && ${!variable} == "${SECRETS:-/run/secrets}"/* ]]; then
    export "${variable%_FILE}=$(<"${!variable}")"
    unset "$variable"
  fi
done
exec "$@"
