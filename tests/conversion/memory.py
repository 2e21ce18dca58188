"""What conversions take of memory beyond what their process has before, of two models that differ in the number of layers.

``python -m tests.conversion.memory`` prints a line of JSON for each; sizes are in bytes. Models and what is made of them take
0.7 GB of the temporary folder.

The figure is the peak of the resident set since the conversion began (``VmHWM``, set back before each):

* The system's other peak, ``ru_maxrss``, survives ``exec``: a command that pytest starts has pytest's own. And either peak of
  a whole command may be that of its imports, which hides tens of megabytes.
* Pages of mapped files count. The system can take them back, so that anonymous memory alone would be fairer; but a conversion
  that maps all files at once would then seem to take nothing, and one at a time is what is meant.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_ogpsa.benchmarks.memory import peak_bytes
from tests.conversion.models import SHAPE
from tests.planning.several import outcome

WIDE = {"hidden_size": 1024, "intermediate_size": 2048}
LAYERS = (2, 18)
TO_MEGATRON, TO_HUGGING_FACE, FROM_A_RUN = "to Megatron", "to Hugging Face", "to Hugging Face, all tensors in one file"
"""The last is how a rank of a run saves; a converted checkpoint has a file for each layer."""

_CPU = torch.device("cpu")
_M_MMAP_THRESHOLD = -3  # malloc.h


def build(folder: Path, config: LlamaConfig) -> list[int]:
    """A model in bf16 with a file for what is outside of the layers and one for each of them; the files' sizes."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    layer_of = {name: int(name.split(".")[2]) + 1 if ".layers." in name else 0 for name in shapes}
    random = {shape: torch.empty(shape, dtype=torch.bfloat16).uniform_() for shape in {*shapes.values()}}
    files = [f"model-{number:05d}.safetensors" for number in range(config.num_hidden_layers + 1)]
    for number, file in enumerate(files):
        inside = [name for name in shapes if layer_of[name] == number]
        save_file({name: random[shapes[name]].clone() for name in inside}, folder / file)
    weight_map = {name: files[number] for name, number in layer_of.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return [(folder / file).stat().st_size for file in files]


def peak_of_conversion(*words: str | Path) -> int:
    """Bytes above what the process has before."""
    gc.collect()
    before, children = peak_bytes(_CPU, lambda: None), _faults_of_children()
    peak = peak_bytes(_CPU, lambda: _convert(*words)) - before
    assert children == _faults_of_children(), "it has started processes, whose memory does not count here"
    return peak


def _convert(*words: str | Path) -> None:
    code, output, errors = outcome(["convert", *map(str, words)])
    assert code == 0, output + errors


def _faults_of_children() -> int:
    """Pages that ended children have touched: it grows with each of them."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def there_and_back(folder: Path, config: LlamaConfig) -> tuple[list[int], int, int]:
    """Sizes of the model's files, and the peaks of both directions; nothing is left on the disk.

    ``folder`` is a new one: Megatron knows the contents of a checkpoint by its path, for as long as a process lives.
    """
    source, checkpoint, back = (folder / name for name in ("source", "checkpoint", "back"))
    sizes = build(source, config)
    there = peak_of_conversion(source, checkpoint)
    shutil.rmtree(source)
    returned = peak_of_conversion(checkpoint, back, "--max-shard-size", str(max(sizes) / 1e9))
    shutil.rmtree(folder)
    return sizes, there, returned


@contextmanager
def _in_one_file() -> Iterator[None]:
    """torch's writer as it is."""
    from megatron_ogpsa.conversion.checkpoint_writer import _FileForEachLayer

    with patch.object(_FileForEachLayer, "write_data", FileSystemWriter.write_data):
        yield


def main() -> None:
    """Measure."""
    # Tensors that are freed go back to the system: the allocator would keep some, and the next conversion seem to take less.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 10**6)
    with tempfile.TemporaryDirectory(prefix="conversion-memory-") as temporary:
        folder = Path(temporary)
        build(folder / "tiny", LlamaConfig(**SHAPE))
        _convert(folder / "tiny", folder / "tiny-megatron")  # imports what there is to import
        _convert(folder / "tiny-megatron", folder / "tiny-back")
        for layers in LAYERS:
            config = LlamaConfig(**SHAPE | WIDE | {"num_hidden_layers": layers})
            sizes, there, returned = there_and_back(folder / f"{layers}", config)
            with _in_one_file():
                *_, of_one_file = there_and_back(folder / f"{layers}-in-one-file", config)
            row = {"layers": layers, "weights": sum(sizes), "largest file": max(sizes)}
            row |= {TO_MEGATRON: there, TO_HUGGING_FACE: returned, FROM_A_RUN: of_one_file}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
