"""Builds the C library: one shared object with no Python in it, so that a wheel serves every Python of a platform."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c11", "-O3", "-g0", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One file for each form, so that no instruction of a form stands in code that runs before the processor is asked.
FORMS = {"form_portable.c": [], "form_avx2.c": AVX2, "form_avx512.c": AVX512, "form_neon.c": []}


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        def compile_one(source: str) -> list[str]:
            flags = FORMS.get(source.rpartition("/")[2], []) if X86 else []
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=FLAGS + flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name))

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # dlopen asks for no suffix of Python's or the platform's

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[Any, ...]:
        return "py3", "none", super().get_tag()[2]


sources = ["src/stage.c", *(f"src/{name}" for name in FORMS)]
headers = ["src/tqformat_kernels.h", "src/internal.h", "src/kernels.h", "src/search.h"]
setup(
    ext_modules=[Extension("tqformat_kernels._library", sources, depends=headers)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
