"""A Hugging Face folder of a GGUF file: ``python -m megatron_ogpsa.laptop.gguf FILE.gguf FOLDER``.

transformers reads the quantised weights into fp32 (it needs the package ``gguf`` for that), but refuses to save such a model;
so they are put into a plain one of the same configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.telling import print_error


def to_hugging_face(file: Path, folder: Path) -> None:
    """Write ``folder`` with configuration, weights in fp32, and tokenizer with its chat template.

    Raises:
        UserError: no such file, the folder is there already, ``gguf`` is not installed, or transformers would lose how the
            model scales its positions.
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

    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    fields = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    plain = type(read)(type(read.config).from_dict(fields))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _require_plain_positions(file: Path) -> None:
    """Llama 3.1 and 3.2 have their scaling in a tensor, others in fields; transformers reads neither."""
    reader = importlib.import_module("gguf").GGUFReader(file)
    scaling = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    kinds = [str(reader.fields[name].contents()) for name in scaling]
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors) or any(kind != "none" for kind in kinds):
        raise UserError(
            f"{file}: scales the positions of long texts, which transformers does not read from GGUF: take the model's "
            "safetensors release"
        )


if __name__ == "__main__":
    try:
        to_hugging_face(*map(Path, sys.argv[1:3]))
    except UserError as problem:
        print_error(str(problem))
        sys.exit(problem.exit_code)
