#!/usr/bin/env python3
"""Compiles the copy kernel to the PTX text that is shipped. No GPU is needed.

.ci/ptx.py          writes crates/kvortex-mem/src/cuda/kernel.ptx
.ci/ptx.py --check  fails if that file is not what its source gives

Needs nvidia-cuda-nvrtc-cu12==12.0.140 in the environment that runs it: the oldest driver that we support reads what it
writes.
"""

import ctypes
import importlib.metadata
import sys
from pathlib import Path

PACKAGE, VERSION = "nvidia-cuda-nvrtc-cu12", "12.0.140"
FOLDER = Path(__file__).parent.parent / "crates/kvortex-mem/src/cuda"
OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++17"]


def compiler():
    try:
        found = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"ptx: run `pip install {PACKAGE}=={VERSION}` first")
    if found.version != VERSION:
        sys.exit(f"ptx: {PACKAGE} is {found.version}, not {VERSION}: another version writes other text")
    library = next(path for path in found.files if path.name == "libnvrtc.so.12")
    return ctypes.CDLL(str(library.locate()))


def compile_kernel(nvrtc, source):
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        sys.exit(f"ptx: {log.value.decode()}")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    return text.value.decode()


def main():
    text = compile_kernel(compiler(), (FOLDER / "kernel.cu").read_bytes())
    target = FOLDER / "kernel.ptx"
    if "--check" not in sys.argv[1:]:
        target.write_text(text, encoding="utf-8")
    elif target.read_text(encoding="utf-8") != text:
        sys.exit("ptx: kernel.ptx is not what kernel.cu gives: run .ci/ptx.py and commit the result")


if __name__ == "__main__":
    main()
