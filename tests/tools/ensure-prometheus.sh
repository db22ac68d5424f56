#!/usr/bin/env bash
# Makes `prometheus` and `promtool` available to the tests: from PATH, else unpacked from Debian's package into .cache/,
# without installing anything. Where neither works it says so and succeeds: the tests then skip, naming this script.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=$root/.cache/prometheus

has() { for program in "$@"; do command -v "$program" >/dev/null || return 1; done; }

if has prometheus promtool || [[ -x $target/promtool ]]; then
    exit 0
fi
if ! has apt-get dpkg; then
    echo "no prometheus on PATH and no apt-get to fetch it: tests against a real Prometheus will be skipped" >&2
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
fetch() { apt-get -qq download prometheus >log 2>&1; }
# Lists of packages may be missing or old; only root can renew them.
if ! fetch && ! { [[ $EUID -eq 0 ]] && apt-get -qq update >log 2>&1 && fetch; }; then
    echo "prometheus cannot be fetched: tests against a real Prometheus will be skipped: $(tail -n 1 log)" >&2
    exit 0
fi
dpkg --extract prometheus_*.deb unpacked
mkdir -p "$target"
mv unpacked/usr/bin/prometheus "$target/"
mv unpacked/usr/bin/promtool "$target/" # last: its presence says that both are there
