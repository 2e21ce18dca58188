"""Python, torch, Megatron and the libraries beside them: versions, and whether they can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from megatron_ogpsa.doctor.findings import Finding, described, fail, ok, warn
from megatron_ogpsa.system.megatron import MEGATRON_REMEDY, megatron_version, require_supported_megatron

MINIMUM_PYTHON = (3, 12)
MINIMUM_TORCH = (2, 6)

LIBRARIES = {
    "datasets": ">=4",
    "sentencepiece": "",
    "transformers": "",
    "safetensors": "",
    "jinja2": "",
    "pyyaml": "",
    "einops": "",
    "psutil": "",
    "numba": ">=0.61,<0.69",
    "filelock": "",
    "matplotlib": "",
    "tqdm": "",
}
"""What setup.cfg requires beside torch and Megatron, and of which versions."""


def check_python(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter's version."""
    shown = ".".join(map(str, found))
    if found[:2] < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return fail(
            "Python", f"{shown}, older than {wanted}", f"install Python {wanted} or later and start again with it"
        )
    return ok("Python", f"{shown} ({sys.executable})")


def check_torch() -> Finding:
    """Whether torch is recent enough and can be imported."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    installed = installed_version("torch")
    if installed is None:
        return fail("torch", "not installed", f"pip install 'torch>={wanted}'")
    if _numbers(installed) < MINIMUM_TORCH:
        return fail("torch", f"{installed}, older than {wanted}", f"pip install 'torch>={wanted}'")
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a missing shared library is an OSError, another one an ImportError
        return fail("torch", f"{installed}, which cannot be imported: {described(error)}", "install torch again")
    cuda = getattr(torch.version, "cuda", None)
    return ok("torch", f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}")


def check_megatron() -> Finding:
    """Whether Megatron is of the series that this project knows, and can be imported; from where, and what pip has beside it.

    Raises:
        UserError: it is absent, or of another series.
    """
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    require_supported_megatron()
    install_if_no_gpu()
    found = megatron_version()
    try:
        core = importlib.import_module("megatron.core")
        importlib.import_module("megatron.training")
    except Exception as error:  # its optional libraries raise anything when they are broken
        return fail("megatron-core", f"{found}, which cannot be imported: {described(error)}", MEGATRON_REMEDY)
    folder, installed = _folder(core), installed_version("megatron-core")
    beside = "" if installed in (None, found) else f", where pip has installed {installed}"
    return ok("megatron-core", f"{found}, from {folder.parent.parent}{beside}")


def check_transformer_engine(*, has_gpu: bool) -> Finding:
    """Whether Transformer Engine is there and can be imported; without a GPU nothing uses it."""
    name = "Transformer Engine"
    installed = installed_version("transformer-engine")
    if installed is None and not has_gpu:
        return ok(name, "not installed; not used without a GPU")
    if installed is None:
        return warn(
            name,
            "not installed: layers are Megatron's own, without FP8, context parallelism and packed rows of one kernel",
            "pip install 'transformer-engine[pytorch]'",
        )
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        # Megatron does without it after an ImportError, and ends with any other exception.
        text, remedy = f"{installed}, which cannot be imported: {described(error)}", "install a build for this torch"
        is_survived = isinstance(error, ImportError) and not has_gpu
        return warn(name, text, remedy) if is_survived else fail(name, text, remedy)
    return ok(name, installed)


def check_apex() -> Finding:
    """Whether what is called ``apex`` is NVIDIA's, whose name an unrelated project has on PyPI.

    Looks for a package that only NVIDIA's has, and imports nothing.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ok("Apex", "not installed: gradients of weights are added up after each product, not within it")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    shown = installed_version("apex") or "of unknown version"
    place = folders[0] if folders else spec.origin
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return fail(
            "Apex",
            f"apex {shown} ({place}) is not NVIDIA Apex, which Megatron would take it for",
            "pip uninstall apex: the project of that name on PyPI is another one",
        )
    if importlib.util.find_spec("amp_C") is None:
        return fail(
            "Apex",
            f"NVIDIA Apex {shown} without its CUDA kernels (amp_C), whose optimizer Megatron would take",
            "build it with its C++ and CUDA extensions, or uninstall it",
        )
    return ok("Apex", f"NVIDIA Apex {shown}")


def check_libraries() -> Finding:
    """The other libraries that are required, with their versions."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        return fail("libraries", f"not installed: {', '.join(missing)}", _installing(missing))
    from packaging.specifiers import SpecifierSet  # comes with some of them

    other = [
        name
        for name, found in versions.items()
        if found and found not in SpecifierSet(LIBRARIES[name], prereleases=True)
    ]
    if other:
        told = ", ".join(f"{name} {versions[name]} is not {LIBRARIES[name]}" for name in other)
        return fail("libraries", told, _installing(other))
    return ok("libraries", ", ".join(f"{name} {found}" for name, found in versions.items()))


def _installing(names: Sequence[str]) -> str:
    return f"pip install {' '.join(shlex.quote(name + LIBRARIES[name]) for name in names)}"


def installed_version(distribution: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _folder(module: ModuleType) -> Path:
    return Path(str(module.__file__)).parent
