"""Builds the one extension module, ``domi_fast._core``; everything else is in pyproject.toml.

Environment:

``DOMI_DEBUG=1``
    bounds, initialisation and None checks, line tracing, asserts in Cython and C (a release has
    none), and the C macro ``DOMI_DEBUG``, under which the core counts its live objects.
``DOMI_SANITIZE=1``
    AddressSanitizer and UndefinedBehaviorSanitizer.
``DOMI_FUZZ=1``
    the same, and what libFuzzer sees of the paths that are taken; clang (``CC``) alone can do it.

Each combination of variant, interpreter and Cython has a build directory of its own, so one
checkout never links what was generated for another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import Cython
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

if sys.maxsize < 2**32:
    sys.exit("domi_fast needs a 64-bit Python: its counters and ids are 64 bits wide.")


def switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        sys.exit(f"{name} is {value!r}: set it to 1, or to 0.")
    return value == "1"


DEBUG = switch("DOMI_DEBUG")
FUZZ = switch("DOMI_FUZZ")
SANITIZE = switch("DOMI_SANITIZE") or FUZZ
VARIANT = "-".join(["debug"] * DEBUG + ["sanitize"] * SANITIZE + ["fuzz"] * FUZZ) or "release"
BUILD = Path("build", f"{VARIANT}-{sys.implementation.cache_tag}-cython-{Cython.__version__}")

PACKAGE = Path("src", "domi_fast")
SOURCE = PACKAGE / "_core.pyx"
FUZZING = Path("tests", "fuzz")
PARTS = sorted(
    path
    for pattern in ("*.pxd", "*.h", "_core_parts/*.pxi", "_core_parts/*.pxd", "_core_parts/*.h")
    for path in PACKAGE.glob(pattern)
)

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    # The same in every variant: a negative index that works in a debug build and reads outside of
    # the object in a release is worse than one that is wrong in both.
    "wraparound": False,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "cdivision": True,
    # Plain method descriptors are called some 5 ns faster than Cython's own function type;
    # signatures in Argument Clinic's form keep them open to inspect.signature, and so to stubtest.
    "binding": False,
    "embedsignature": True,
    "embedsignature.format": "clinic",
    "linetrace": DEBUG,
    "autotestdict": False,
}

compile_args = ["-fvisibility=hidden", "-Wall", "-Wno-unused-function"]
link_args: list[str] = []
lists: list[Path] = []
macros: list[tuple[str, str]] = []
if DEBUG:
    macros += [("DOMI_DEBUG", "1"), ("CYTHON_TRACE", "1")]
if DEBUG or SANITIZE:
    compile_args += ["-O1", "-g", "-fno-omit-frame-pointer"]
else:
    compile_args += ["-O3"]
    macros += [("CYTHON_WITHOUT_ASSERTIONS", "1")]
if SANITIZE:
    compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    # Python's own flags make signed overflow wrap, and nothing would be reported.
    compile_args += ["-fno-wrapv"]
    link_args += ["-fsanitize=address,undefined"]
if FUZZ:
    lists = [FUZZING / "unsanitized.txt", FUZZING / "covered.txt"]
    compile_args += ["-fsanitize=fuzzer-no-link"]
    compile_args += [f"-fsanitize-ignorelist={lists[0]}"]
    compile_args += [f"-fsanitize-coverage-allowlist={lists[1]}"]

# What makes a release faster and not every compiler knows: calls into libpython without a stub in
# between; functions and branches that begin where a decoder likes them, so that the speed of one
# does not change with what stands before it; (gcc) a frame's path from the socket to its handler in
# few functions rather than many, a tenth of its time; and (gcc on x86-64) no `rep stos`, slow for
# objects of a hundred bytes.
FASTER = [
    "--param=max-inline-insns-auto=80",
    "--param=max-inline-insns-single=600",
    "--param=inline-unit-growth=200",
    "-falign-functions=64",
    "-Wa,-mbranches-within-32B-boundaries",
    "-fno-plt",
    "-fno-semantic-interposition",
    "-mmemset-strategy=unrolled_loop:256:noalign,libcall:-1:noalign",
]


class build_ext(_build_ext):
    """Runs Cython when the extension is compiled, and not for an sdist or for metadata."""

    def build_extension(self, ext: Extension) -> None:
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError

        # Cython looks at the sources alone: new directives in this file would change nothing.
        generated = BUILD / SOURCE.with_suffix(".c")
        script = Path(__file__)
        stale = generated.exists() and generated.stat().st_mtime < script.stat().st_mtime
        try:
            [generated_ext] = cythonize(
                [ext],
                build_dir=str(BUILD),
                compiler_directives=DIRECTIVES,
                force=bool(self.force or stale),
                quiet=True,
            )
        except CompileError:
            # Cython has said what is wrong and where; a traceback would only bury it.
            sys.exit(f"{SOURCE} does not compile (see above).")
        ext.sources = generated_ext.sources
        if VARIANT == "release":
            ext.extra_compile_args += [flag for flag in FASTER if self.compiler_takes(flag)]
        super().build_extension(ext)

    def compiler_takes(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.c")
            source.write_text("int domi_empty;\n")
            # By itself, since compile() would print what the compiler says of an unknown flag.
            command = [*self.compiler.compiler_so, "-Werror", flag, "-c", str(source)]
            command += ["-o", str(source.with_suffix(".o"))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0


setup(
    ext_modules=[
        Extension(
            "domi_fast._core",
            sources=[str(SOURCE)],
            depends=[str(path) for path in [*PARTS, *lists, Path("setup.py")]],
            include_dirs=[str(PACKAGE), str(PACKAGE / "_core_parts")],
            define_macros=macros,
            undef_macros=["NDEBUG"] if DEBUG or SANITIZE else [],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            libraries=["m"],
        )
    ],
    cmdclass={"build_ext": build_ext},
    options={"build": {"build_base": str(BUILD)}},
)
