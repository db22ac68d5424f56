#!/usr/bin/env bash
# Makes the JSON-Schema-Test-Suite available to the tests: unpacked into .cache/ from the source distribution of jsonschema,
# which carries it. Where that cannot be fetched it says so and succeeds: the test then skips, or fails where CI is set.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
version=4.26.0
sha256=0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326
target=$root/.cache/json-schema-suite/$version

[[ -d $target ]] && exit 0
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
if ! "$python" -m pip download -q --no-deps --no-binary :all: "jsonschema==$version" >log 2>&1; then
    echo "the JSON-Schema-Test-Suite cannot be fetched: $(tail -n 1 log)" >&2
    exit 0
fi
echo "$sha256  jsonschema-$version.tar.gz" | sha256sum --check --quiet
tar xf "jsonschema-$version.tar.gz" "jsonschema-$version/json/tests" "jsonschema-$version/json/LICENSE"
mkdir -p "$(dirname "$target")"
mv "jsonschema-$version/json" "$target.$$"
mv -T "$target.$$" "$target" 2>/dev/null || [[ -d $target ]] # another run was faster
