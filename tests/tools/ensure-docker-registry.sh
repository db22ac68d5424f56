#!/usr/bin/env bash
# Makes `docker-registry` available to the tests: from PATH, else unpacked from Debian's package into .cache/, without
# installing anything. Where neither works it says so and succeeds: the tests then skip, naming this script.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=$root/.cache/docker-registry

has() { for program in "$@"; do command -v "$program" >/dev/null || return 1; done; }

if has docker-registry || [[ -x $target/docker-registry ]]; then
    exit 0
fi
if ! has apt-get dpkg; then
    echo "no docker-registry on PATH and no apt-get to fetch it: tests against a real registry will be skipped" >&2
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
fetch() { apt-get -qq download docker-registry >log 2>&1; }
# Lists of packages may be missing or old; only root can renew them.
if ! fetch && ! { [[ $EUID -eq 0 ]] && apt-get -qq update >log 2>&1 && fetch; }; then
    echo "docker-registry cannot be fetched: tests against a real registry will be skipped: $(tail -n 1 log)" >&2
    exit 0
fi
dpkg --extract docker-registry_*.deb unpacked
mkdir -p "$target"
mv unpacked/usr/bin/docker-registry "$target/"
