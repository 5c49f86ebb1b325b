#!/bin/sh
# Compiles csrc/*.c for platforms that cannot be run here, with every warning an error: `make cross`.
# gcc and mingw also link them to a library; zig would first have to build the C library of each platform.
# Results are thrown away. The extension itself is not built: that needs the Python headers of each platform.
#
#     tools/cross_compile.sh INCLUDE     INCLUDE has ggml.h (bindings/build_core.py include)
#
# Compilers, each skipped when it is missing: cc (once as strict ISO C11 without vector types, as MSVC sees the code),
# x86_64-w64-mingw32-gcc (Debian: gcc-mingw-w64-x86-64), and `zig cc`, from $ZIG, PATH or PyPI's ziglang for $PYTHON.
set -u
include=${1:?usage: tools/cross_compile.sh INCLUDE}
cd "$(dirname "$0")/.." || exit 2
test -f "$include/ggml-backend.h" || { echo "$include has no ggml-backend.h" >&2; exit 2; }
python=${PYTHON:-python3}
objects=$(mktemp -d) || exit 2
trap 'rm -rf "$objects"' EXIT
failed=0 compiled=0

compile() { # NAME COMPILER... : all files
    name=$1
    shift
    if ! (cd "$objects" && "$@" --version > version 2>&1); then
        echo "skipped   $name: no $1"
        return
    fi
    log=$objects/log
    : > "$log"
    files=0 bad=0
    for file in csrc/*.c; do
        files=$((files + 1))
        "$@" -O2 -Wall -Wextra -Werror -Wno-psabi -fPIC -Icsrc -isystem "$include" \
            -DSTAR_EDGE_LLAMA_CPP_PYTHON='"cross"' -DSTAR_EDGE_LLAMA='""' \
            -c "$file" -o "$objects/$(basename "$file" .c).o" >> "$log" 2>&1 || bad=$((bad + 1))
    done
    linked=yes
    if [ "$bad" -gt 0 ]; then
        linked=
    elif [ "$name" = "${name%,zig}" ]; then # nothing of ggml may be missing: the core binds its functions at run time
        "$@" -shared -Wl,--no-undefined "$objects"/*.o -o "$objects/core" -lm >> "$log" 2>&1 || linked=
    fi
    if [ -z "$linked" ]; then
        cat "$log" >&2
        echo "FAILED    $name: $bad of $files files, or the library that they make (above)"
        failed=1
    else
        echo "compiled  $name: $files files ($(head -n 1 "$objects/version"))"
        compiled=$((compiled + 1))
    fi
}

compile "host, ISO C11" cc -std=c11 -pedantic-errors -DSE_PORTABLE
compile "host, C11 with vector types" cc -std=c11
compile x86_64-windows-gnu,mingw x86_64-w64-mingw32-gcc -std=c11
compile x86_64-windows-gnu,mingw,portable x86_64-w64-mingw32-gcc -std=c11 -DSE_PORTABLE

if [ -z "${ZIG:-}" ]; then
    if command -v zig > /dev/null 2>&1; then ZIG=zig; else ZIG="$python -m ziglang"; fi
fi
for target in x86_64-windows-gnu aarch64-windows-gnu x86_64-macos aarch64-macos x86_64-linux-musl aarch64-linux-gnu; do
    # $ZIG may be a command with arguments
    compile "$target,zig" $ZIG cc -target "$target" -std=c11
done

test "$failed" -eq 0 && test "$compiled" -gt 0
