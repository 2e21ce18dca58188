"""Which Megatron would be imported, seen without importing it, and the releases that this project was written for."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_ogpsa.errors import UnsupportedError, UserError

MEGATRON_SERIES = "0.19."
"""The megatron-core releases whose internals the hooks and patches of this package were checked on."""

MEGATRON_REMEDY = (
    f"pip install 'megatron-core=={MEGATRON_SERIES}*', or check out Megatron-LM at core_v{MEGATRON_SERIES}*"
)

_NUMBER = re.compile(r"^(MAJOR|MINOR|PATCH) = (\d+)$", re.MULTILINE)


def megatron_folder() -> Path | None:
    """Where ``megatron.core`` would be imported from: often a checkout of Megatron-LM, from which a script is started."""
    try:
        spec = importlib.util.find_spec("megatron.core")  # imports its parent, a namespace without code
    except ImportError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def megatron_version() -> str:
    """Of what would be imported, not of what pip has installed beside it.

    Raises:
        UserError: there is no Megatron.
    """
    folder = megatron_folder()
    if folder is not None and (folder / "package_info.py").is_file():
        numbers = dict(_NUMBER.findall((folder / "package_info.py").read_text(encoding="utf-8")))
        if len(numbers) == 3:
            return ".".join(numbers[name] for name in ("MAJOR", "MINOR", "PATCH"))
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not there: {MEGATRON_REMEDY}") from None


def require_supported_megatron() -> None:
    """Refuse a Megatron whose internals were never checked, rather than patch it half.

    Raises:
        UserError: there is none.
        UnsupportedError: it is of another series than :data:`MEGATRON_SERIES`.
    """
    require_series(megatron_version())


def require_series(found: str) -> None:
    """Refuse a version of another series.

    Raises:
        UnsupportedError: likewise.
    """
    if not found.startswith(MEGATRON_SERIES):
        raise UnsupportedError(
            f"megatron-core {found}, in {megatron_folder()}, is not what megatron-ogpsa hooks into, which is "
            f"{MEGATRON_SERIES}x: {MEGATRON_REMEDY}"
        )
