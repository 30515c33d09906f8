#!/usr/bin/env python3
"""Packs vLLM for a GPU host that has torch 2.11 for CUDA 13 and Python 3.12 but no network: two parts of under 60 MiB.

    python3 pack_vllm.py FOLDER      # writes FOLDER/part1 and FOLDER/part2

Needs pip, uv, xz and 2 GB of disk. What is left out (FlashAttention 2, kernels for mixtures of experts, FlashInfer, the
Rust front end) is not needed to serve a dense Llama-shaped model on a Hopper GPU.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

VERSION = "0.25.1"

# On the GPU host already, in versions that serve.
PRESENT = """
accelerate aiofiles aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi charset-normalizer click
cloudpickle cuda-bindings cuda-core cuda-pathfinder cuda-toolkit einops filelock frozenlist fsspec grpcio h11 hf-xet
httpcore httpx huggingface-hub idna jinja2 llvmlite markdown-it-py markupsafe mdurl ml-dtypes mpmath multidict networkx
ninja numba numpy opencv-python-headless packaging pandas pillow prometheus-client propcache protobuf psutil py-cpuinfo
pydantic-settings pygments python-dateutil pyyaml regex requests rich safetensors scipy sentencepiece setuptools
shellingham six sympy tabulate tiktoken tokenizers torch torchaudio torchvision tqdm transformers triton typer
typing-extensions urllib3 uvloop wheel xxhash yarl
"""
NOT_NEEDED = """
torch flashinfer nvidia- quack tokenspeed humming tilelang pynvvideo fastsafetensors opencv mcp anthropic model-hosting
numba apache-tvm opentelemetry-exporter setuptools
"""
LEFT_OUT = (
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "vllm/vllm-rs",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/third_party/fmha_sm100",
    *(f"vllm/third_party/deep_gemm/_C.cpython-{minor}-x86_64-linux-gnu.so" for minor in (310, 311, 313, 314)),
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
DOWNLOAD = [
    *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"),
    *("--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"),
    *(word for platform in PLATFORMS for word in ("--platform", platform)),
]
RESOLVE = [
    *("uv", "pip", "compile", "-q", "--no-annotate", "--no-header"),
    *("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39"),
]


def name_of(requirement):
    for mark in ";=<>![":
        requirement = requirement.split(mark)[0]
    return requirement.strip().lower().replace("_", "-")


def unpack(wheel, tree):
    """The wheel without what is left out; returns its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree)
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    for gone in LEFT_OUT:
        path = tree / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return metadata


def needed(metadata, work):
    """What vLLM needs that the host lacks, pinned."""
    lines = [line.removeprefix("Requires-Dist:").strip() for line in metadata.splitlines() if "Requires-Dist:" in line]
    wanted = [line.replace("fastapi[standard]", "fastapi") for line in lines if "extra ==" not in line]
    wanted = [line for line in wanted if not line.lower().startswith(tuple(NOT_NEEDED.split()))]
    (work / "wanted.in").write_text("\n".join(wanted) + "\n")
    pinned = work / "pinned.txt"
    subprocess.run([*RESOLVE, str(work / "wanted.in"), "-o", str(pinned)], check=True, stdout=subprocess.DEVNULL)
    found = [line for line in pinned.read_text().splitlines() if line and not line.startswith("#")]
    present = set(PRESENT.split())
    return [line for line in found if name_of(line) not in present and not name_of(line).startswith("nvidia-")]


def main():
    parts = [pathlib.Path(sys.argv[1]).resolve() / part for part in ("part1", "part2")]
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        subprocess.run([*DOWNLOAD, "-d", folder, f"vllm=={VERSION}"], check=True)
        tree = work / "tree"
        metadata = unpack(next(work.glob("vllm-*.whl")), tree)
        largest = tree / "vllm/_C_stable_libtorch.abi3.so"
        with open(parts[0] / "C.so.xz", "wb") as file:
            subprocess.run(["xz", "-c6", "-T0", str(largest)], check=True, stdout=file)
        largest.unlink()
        subprocess.run(["tar", "cJf", str(parts[1] / "vllm.tar.xz"), "-C", str(tree), "."], check=True)
        (work / "needed.txt").write_text("\n".join(needed(metadata, work)) + "\n")
        subprocess.run([*DOWNLOAD, "-d", str(parts[1]), "-r", str(work / "needed.txt")], check=True)
    for part in parts:
        size = sum(file.stat().st_size for file in part.iterdir()) / 2**20
        print(f"{part.name}: {size:.1f} MiB" + ("  TOO LARGE" if size > 60 else ""))


if __name__ == "__main__":
    main()
