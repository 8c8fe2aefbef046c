#!/bin/sh
# Checks the types of the JavaScript client, which it has in its comments. The compiler is fetched
# once, to outside of the tree.
set -eu
cd "$(dirname "$0")/../.."

version=5.9.3
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    echo "domi_fast: skipped the types of client.js: no node and npm (Debian: nodejs, npm)"
    exit 0
fi
folder=${XDG_CACHE_HOME:-$HOME/.cache}/domi_fast/typescript-$version
compiler=$folder/node_modules/typescript/bin/tsc
[ -e "$compiler" ] || npm install --silent --no-audit --no-fund --prefix "$folder" \
    "typescript@$version"
node "$compiler" --noEmit --allowJs --checkJs --strict --noUncheckedIndexedAccess --target es2022 \
    --module nodenext --lib es2022,dom,dom.iterable \
    src/domi_fast/gateway/client.js
echo "client.js: no errors of type"
