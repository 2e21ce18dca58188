"""A Hugging Face folder of a GGUF file: ``python -m megatron_ogpsa.laptop.gguf FILE.gguf FOLDER``.

transformers reads the quantised weights into fp32 (it needs the package ``gguf`` for that), but refuses to save such a model;
so they are put into a plain one of the same configuration.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from megatron_ogpsa.console.telling import print_error
from megatron_ogpsa.errors import UserError, one_line

_INSTEAD = "take the model's safetensors release"


def to_hugging_face(file: Path, folder: Path) -> None:
    """Write ``folder`` with configuration, weights in fp32, and tokenizer with its chat template.

    Raises:
        UserError: no such file, the folder is there already, ``gguf`` is not installed, or transformers cannot read the file,
            or would lose some of it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file: name a .gguf file")
    if folder.exists():
        raise UserError(f"{folder}: is there already: name another folder, or remove it")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("transformers reads GGUF files with the package gguf: pip install gguf")
    _require_plain_positions(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read, told = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:  # of architectures and types that it does not know
        raise UserError(f"{file}: transformers cannot read it ({one_line(error)}): {_INSTEAD}") from error
    for kind, names in told.items():
        if names:  # what is missing would be random, what is left over would be lost
            first = sorted(map(str, names))[0]
            raise UserError(f"{file}: transformers reads it with {kind.replace('_', ' ')} ({first}, …): {_INSTEAD}")
    fields = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    plain = type(read)(type(read.config).from_dict(fields))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _require_plain_positions(file: Path) -> None:
    """Llama 3.1 and 3.2 have their scaling in a tensor, others in fields; transformers reads neither."""
    try:
        reader = importlib.import_module("gguf").GGUFReader(file)
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not a GGUF file ({one_line(error)}): name one") from None
    scaling = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    kinds = [str(reader.fields[name].contents()) for name in scaling]
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors) or any(kind != "none" for kind in kinds):
        raise UserError(
            f"{file}: scales the positions of long texts, which transformers does not read from GGUF: {_INSTEAD}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ogpsa.laptop.gguf", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    try:
        to_hugging_face(given.file, given.folder)
    except UserError as problem:
        print_error(str(problem))
        sys.exit(problem.exit_code)
