#!/bin/sh
# Installs the Autobahn test suite, which runs on Python 2.7 only, if it is not there yet, and prints
# where its command wstest is.
#
#   install.sh           into ~/.cache/domi_fast/autobahn
#   install.sh FOLDER    into that folder, which is replaced when it holds other versions
#   install.sh --where   installs nothing; fails when it is not there
set -eu
wanted=$(cd "$(dirname "$0")" && pwd)/requirements.txt
target=${XDG_CACHE_HOME:-$HOME/.cache}/domi_fast/autobahn
case ${1-} in
'' | --where) ;;
*) target=$1 ;;
esac

if cmp -s "$wanted" "$target/requirements.txt" && "$target/wstest" --help >/dev/null 2>&1; then
    echo "$target/wstest"
    exit 0
fi
if [ "${1-}" = --where ]; then
    echo "domi_fast: no Autobahn test suite in $target; sh tests/autobahn/install.sh installs it" >&2
    exit 1
fi

# A shim may be on PATH for a Python that is not there, so the candidates are tried.
python=
for each in python2.7 \
    "$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-$HOME/.pyenv}")"/versions/2.7.*/bin/python2.7; do
    python=$("$each" -c 'import pip, sys; print(sys.executable)' 2>/dev/null) && break
    python=
done
if [ -z "$python" ]; then
    echo "domi_fast: the Autobahn test suite needs Python 2.7 with pip, which is neither on PATH nor" \
        "under pyenv; pyenv install 2.7.18 provides it" >&2
    exit 1
fi
if [ -e "$target" ] && [ ! -e "$target/requirements.txt" ]; then
    echo "domi_fast: $target is there and is no Autobahn test suite; name another folder" >&2
    exit 1
fi

echo "domi_fast: installing the Autobahn test suite into $target" >&2
mkdir -p "$(dirname "$target")"
made=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$made"' EXIT
# It is no virtual environment: this Python may have no module for one.
unset PIP_REQUIRE_VIRTUALENV PYTHONPATH PYTHONHOME
"$python" -m pip install -q --no-deps --target "$made/lib" -r "$wanted" >"$made/log" 2>&1 || {
    cat "$made/log" >&2
    exit 1
}
# addsitedir, as zope is a namespace that only its .pth file makes importable.
cat >"$made/wstest" <<END
#!/bin/sh
exec "$python" -E -s -S -W ignore -c 'import site, sys
site.addsitedir(sys.argv.pop(1))
from autobahntestsuite.wstest import run
run()' "\$(dirname "\$0")/lib" "\$@"
END
chmod +x "$made/wstest"
"$made/wstest" --help >/dev/null
cp "$wanted" "$made/requirements.txt"
rm -rf "$target"
mv "$made" "$target"
echo "$target/wstest"
