#!/usr/bin/env bash
# Builds tests/fuzz.c and the library with sanitizers, and runs it: ./fuzz.sh [SECONDS] [SEED]. Needs gcc or clang.
# For another processor, CC is a compiler and RUN what runs its programs, as in aarch64.sh.
set -euo pipefail
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cc=${CC:-cc}
flags="-std=c11 -O1 -g1 -Isrc -fsanitize=address,undefined -fno-sanitize-recover=all"
avx2="-mavx2 -mfma -mbmi2 -mf16c"
for file in src/*.c tests/fuzz.c; do
    extra=
    case $("$cc" -dumpmachine) in
    x86_64*)
        case $file in
        *avx2.c) extra=$avx2 ;;
        *avx512.c) extra="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni" ;;
        esac
        ;;
    esac
    "$cc" $flags $extra -c "$file" -o "$build/$(basename "$file").o"
done
"$cc" $flags "$build"/*.o -lm -o "$build/fuzz"
${RUN:-} "$build/fuzz" "${1:-20}" "${2:-1}"
