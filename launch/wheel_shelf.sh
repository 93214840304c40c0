# Where built wheels are kept; sourced by setup.sh and build_engines.sh. The next set-up installs, that is runs, what lies
# here: the folder is the user's alone, and a wheel is taken only with the digest it had when it was built.
# shellcheck shell=bash

# is_own PATH ...: whether all are the user's, and nobody else may write to them.
is_own() {
    local path
    for path; do
        [ -O "$path" ] && [ $((0$(stat -Lc %a -- "$path") & 022)) = 0 ] || return 1
    done
}

# make_shelves FOLDER: creates it; if it cannot be used, says so in one line and fails.
make_shelves() {
    # shellcheck disable=SC2174  # only the folder itself is to be private
    if ! { mkdir -p -m 700 -- "$1" && [ -w "$1" ]; } 2>/dev/null; then
        echo "cannot write to $1; set ARSG_CACHE_DIR to a directory of yours"
    elif ! is_own "$1"; then
        echo "$1 keeps wheels that are installed later, but others may write to it: chmod go-w it if it is yours, or set ARSG_CACHE_DIR to a directory of yours"
    else
        return 0
    fi
    return 1
}

# take_from_shelf SHELF OUTPUT: copies its wheel, if there is one that can be trusted.
take_from_shelf() {
    [ ! -L "$1" ] && [ -s "$1/SHA256SUMS" ] && is_own "$1" "$1"/* &&
        [ "$(cd "$1" && sha256sum -- *.whl)" = "$(cat "$1/SHA256SUMS")" ] &&
        cp -- "$1"/*.whl "$2/"
}

# put_on_shelf SHELF BUILT MADE_OF: keeps the wheel in BUILT, in place of what is there.
put_on_shelf() {
    local partial
    partial=$(mktemp -d "$1.XXXXXX")
    cp -- "$2"/*.whl "$partial/"
    printf '%s\n' "$3" > "$partial/built-against.txt"
    (cd "$partial" && sha256sum -- *.whl > SHA256SUMS && chmod go-w -- *)
    rm -rf -- "$1"
    mv -T -- "$partial" "$1" 2>/dev/null || rm -rf -- "$partial"  # another set-up was first
}
