#!/bin/sh
# Takes out of an image's environment what the service never reads: slim.sh ENVIRONMENT MODULE...
# Tests, type stubs, sources of compiled modules and numpy's tools for building such go, symbols of libraries are stripped,
# and of Python's own compiled files those are kept that importing the MODULEs writes: the images' file systems cannot be
# written later.
set -eu
environment=$1
shift
packages=$(echo "$environment"/lib/python3.*/site-packages)

find "$packages" -depth -type d \( -name __pycache__ -o -name tests \) -exec rm -rf {} +
rm -rf "$packages"/numpy/f2py "$packages"/numpy/distutils "$packages"/numpy/_core/_simd.*.so # for numpy's own tests
find "$packages" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) -delete
# Not what auditwheel has put beside a package: its libraries' segments are moved, and strip would break them.
find "$packages" -type f -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} +
for module in "$@"; do
    "$environment/bin/python" -c "import $module"
done
