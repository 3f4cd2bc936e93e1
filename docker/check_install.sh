#!/usr/bin/env bash
# Run the Dockerfile's install steps on a bare Debian root, where there is no container engine. As root, with debootstrap:
#
#   docker/check_install.sh cpu /tmp/zsr-root      # or mlflow, s3, cuda; the folder is new and can be deleted afterwards
#
# BINDS="/a /b" makes folders of this machine visible inside, such as local package mirrors that pip's settings name.
set -euo pipefail
target=${1:?cpu, cuda, mlflow or s3}
root=${2:?a folder to make the root in}
source=$(cd "$(dirname "$0")/.." && pwd)
[[ $(id -u) -eq 0 ]] || { echo "check_install: needs root, for chroot" >&2; exit 2; }

# Mounts of a namespace of its own disappear with it, whatever happens.
[[ ${ZSR_UNSHARED:-} ]] || ZSR_UNSHARED=1 exec unshare --mount --propagation private "$0" "$@"

[[ -x $root/bin/bash ]] || debootstrap --variant=minbase bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for folder in ${BINDS:-}; do
  mkdir -p "$root$folder"
  mount --bind -o ro "$folder" "$root$folder"
done
for file in /etc/resolv.conf /etc/pip.conf; do [[ ! -e $file ]] || cp "$file" "$root$file"; done

# What the Dockerfile copies, by its own list of what may enter.
rm -rf "$root/build"
mkdir -p "$root/build"
cp -r "$source"/{constraints.txt,pyproject.toml,README.md,LICENSE,zsr,docker} "$root/build/"

inside() { chroot "$root" /usr/bin/env PATH=/opt/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/home/zsr "$@"; }
step() { echo "==> $*" && inside /build/docker/install.sh "$@"; }
step system
# Whom this machine trusts, its own package mirror for one.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
id=$(inside id -u zsr 2>/dev/null || true)
[[ $id ]] || step user
case $target in
  cpu | cuda)
    step dependencies "$target"
    step zsr
    check='zsr version && ray --version && python -c "import ray, mlflow, boto3, optuna, zsr.engine.loop"'
    ;;
  mlflow) step servers && check='mlflow --version && python -c "import psycopg, flask_wtf, boto3"' ;;
  s3) step s3 && check='weed version' ;;
  *) echo "check_install: cpu, cuda, mlflow or s3" >&2 && exit 2 ;;
esac
# As the image's user, through a login shell as `ray up` enters.
chroot --userspec=1000:1000 "$root" /usr/bin/env -i HOME=/home/zsr bash --login -euc "$check"
echo "check_install: $target works for user 1000; $(du -sh --one-file-system "$root" | cut -f1)"
