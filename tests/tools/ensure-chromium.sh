#!/usr/bin/env bash
# Makes `chromium` available to the tests: from PATH, else Debian's package, which needs root, since a browser's libraries are many.
# Where neither works it says so and succeeds: the tests then skip, naming this script.
set -euo pipefail

command -v chromium >/dev/null && exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no chromium on PATH, and no right to install it: tests of the page in a browser will be skipped" >&2
    exit 0
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >"$log" 2>&1; }
# Lists of packages may be missing or old.
if ! install && ! { apt-get -qq update >"$log" 2>&1 && install; }; then
    echo "chromium cannot be installed: tests of the page in a browser will be skipped: $(tail -n 1 "$log")" >&2
fi
