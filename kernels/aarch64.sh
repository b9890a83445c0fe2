#!/usr/bin/env bash
# Runs kernels/tests and the fuzzer on an emulated 64-bit ARM processor: ./aarch64.sh [DIRECTORY] [arguments of pytest].
# The directory (default: .work/aarch64 of the checkout; 800 MB) keeps Debian's Python and the wheels for the next time.
# On Debian 12, this is what it needs, and without which it says so and does nothing:
#   apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static mmdebstrap python3-pip
# Some minutes on an idle machine, most of them for starting torch and for compiling. What it tells is whether results are
# right: its time says nothing, and an emulator takes unaligned addresses, which is why UndefinedBehaviorSanitizer looks
# for these.
set -euo pipefail
cd "$(dirname "$0")"
for tool in aarch64-linux-gnu-gcc qemu-aarch64-static mmdebstrap python3; do
    command -v "$tool" > /dev/null || { echo "skipped: $tool is not installed (see the head of aarch64.sh)"; exit 0; }
done
mkdir -p "${1:-../.work/aarch64}"
work=$(cd "${1:-../.work/aarch64}" && pwd)
shift || true

if [ ! -e "$work/root/usr/bin/python3.11" ]; then # packages are unpacked, and nothing of them is run
    rm -rf "$work/root"
    mmdebstrap --variant=extract --skip=check/qemu --architectures=arm64 --include=python3,libstdc++6,libgomp1 \
        bookworm "$work/root"
fi
if [ ! -e "$work/site/.installed" ]; then # the aarch64 wheels of later torches bring CUDA
    rm -rf "$work/site"
    python3 -m pip install --quiet --no-deps --target "$work/site" --only-binary=:all: --python-version 3.11 \
        --implementation cp --abi cp311 --abi none --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 --platform any numpy==2.4.6 pytest==9.2.0 pluggy iniconfig packaging pygments \
        torch==2.8.0 typing_extensions filelock sympy mpmath networkx jinja2 markupsafe fsspec
    touch "$work/site/.installed"
fi
rm -rf "$work/package"
mkdir -p "$work/package/tqformat_kernels"
cp tqformat_kernels/*.py "$work/package/tqformat_kernels"
aarch64-linux-gnu-gcc -std=c11 -O3 -fvisibility=hidden -Wall -Wextra -Werror -fPIC -shared src/*.c \
    -o "$work/package/tqformat_kernels/_library.so"
cat > "$work/python" << END
#!/bin/sh
exec qemu-aarch64-static -L "$work/root" -0 "$work/python" -E PYTHONSAFEPATH=1 -E PYTHONHOME="$work/root/usr" \\
    -E PYTHONPATH="$work/package:$work/site" "$work/root/usr/bin/python3.11" "\$@"
END
chmod +x "$work/python"

"$work/python" -c "import tqformat_kernels; assert list(tqformat_kernels.forms()) == ['portable', 'neon']"
OMP_WAIT_POLICY=passive "$work/python" -m pytest -q -p no:cacheprovider tests "$@"
export CC=aarch64-linux-gnu-gcc RUN="qemu-aarch64-static -L /usr/aarch64-linux-gnu" ASAN_OPTIONS=detect_leaks=0
./fuzz.sh 60
