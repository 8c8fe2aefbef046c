#!/bin/sh
# Installs what the fuzz targets are compiled with, if it is not here yet: on Debian, as root.
# Elsewhere it says what is missing, and fails.
set -eu

for compiler in "${CC:-clang}" clang clang-14; do
    if command -v "$compiler" >/dev/null && echo 'int main(void) { return 0; }' |
        "$compiler" -x c -fsanitize=address,undefined,fuzzer-no-link - -o /dev/null 2>/dev/null; then
        echo "$compiler"
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "domi_fast: fuzzing needs clang and its sanitizers; name one: make CC=... fuzz" >&2
    exit 1
fi
echo "domi_fast: installing clang" >&2
export DEBIAN_FRONTEND=noninteractive
install="apt-get install -y -qq --no-install-recommends clang-14 libclang-rt-14-dev"
$install >/dev/null 2>&1 || {
    # The lists may be old or absent.
    apt-get update -qq >&2
    $install >/dev/null
}
echo clang-14
