#!/bin/sh
# Builds the Consul agent that the tests start, once, outside of the tree: no package has it.
#
#   build.sh           builds it, in some five minutes, if it is not there
#   build.sh --cheap   does not on CI, where time is short, nor without Go
#   build.sh --where   says where it is, or would be
set -eu
cd "$(dirname "$0")"

version=$(sed -n 's|^require github.com/hashicorp/consul v||p' go.mod)
target=${XDG_CACHE_HOME:-$HOME/.cache}/domi_fast/consul-$version

if [ "${1-}" = --where ]; then
    echo "$target"
    exit 0
fi
[ ! -x "$target" ] || exit 0
if [ "${1-}" = --cheap ] && { [ -n "${CI-}" ] || ! command -v go >/dev/null; }; then
    echo "domi_fast: no Consul agent, and its tests are skipped; make consul-agent builds it" >&2
    exit 0
fi
command -v go >/dev/null || {
    echo "domi_fast: the Consul agent is built with Go 1.20 or later, which is not here" >&2
    exit 1
}
echo "domi_fast: building Consul $version, which takes some minutes" >&2
mkdir -p "${target%/*}"
trap 'rm -f "$target.$$"' EXIT
CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$target.$$" github.com/hashicorp/consul
mv "$target.$$" "$target"
