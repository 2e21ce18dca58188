"""How far FP8 turns the reference subspace of a real model: measured over the emulated kernels.

    python -m tests.transformer_engine.real_model MODEL_FOLDER --general CONVERSATIONS.jsonl --json docs/fp8/real_model.json

Two references of a few conversations each; their gradients at the model's own weights in fp32, in bf16 and in each recipe.
Prints, for each against fp32, the cosines of the two gradients, the lowest of a parameter's own, and the cosine of the
larger angle between the two subspaces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES
from tests.harness.preloaded import PreloadedCommand
from tests.transformer_engine.wheel import VERSION

CONVERSATIONS = 4
"""Of each reference."""

LENGTH = 512
SECONDS = 1800.0

RUNS: dict[str, tuple[str, list[str]]] = {
    "fp32": ("be_hopper", []),
    "bf16": ("be_hopper", ["--bf16"]),
    **{
        f"{recipe} {form}": (on, ["--bf16", "--fp8-format", form, "--fp8-recipe", recipe])
        for recipe, form, on in (
            ("delayed", "hybrid", "be_hopper"),
            ("delayed", "e4m3", "be_hopper"),
            ("tensorwise", "hybrid", "be_hopper"),
            ("blockwise", "hybrid", "be_hopper"),
            ("blockwise", "e4m3", "be_hopper"),
            ("mxfp8", "hybrid", "be_blackwell"),
            ("mxfp8", "e4m3", "be_blackwell"),
        )
    },
}
"""Precision → the GPU that is emulated for it, and flags."""

Gradients = dict[str, dict[str, Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(args.model.resolve(), args.general.resolve(), Path(scratch))
    if args.json:
        versions = {"torch": torch.__version__, "transformer engine": f"{VERSION}, kernels emulated"}
        account = {"date": date.today().isoformat(), "model": args.model.name, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(model: Path, general: Path, folder: Path) -> list[dict[str, Any]]:
    """One row for each precision but fp32, which they are compared with."""
    commands = {on: PreloadedCommand(prepare=f"tests.transformer_engine.importing:{on}") for on, _ in RUNS.values()}
    try:
        _write_inputs(model, general, folder)
        convert = [sys.executable, "-m", "megatron_ogpsa.cli.main", "convert", str(model), str(folder / "weights")]
        subprocess.run(convert, check=True)
        exact: Gradients | None = None
        rows = []
        for name, (on, flags) in RUNS.items():
            started = time.monotonic()
            _run(commands[on], folder, name, ["train", "run.yaml", *flags], "tests.gpu.keeping_gradients")
            found: Gradients = torch.load(folder / "gradients.pt", weights_only=True)
            if exact is None:
                exact = found
                continue
            rows.append({"precision": name, **compared(exact, found)})
            print(json.dumps(rows[-1]), f"{time.monotonic() - started:.0f} s", flush=True)
        return rows
    finally:
        for command in commands.values():
            command.close()


def compared(exact: Gradients, found: Gradients) -> dict[str, Any]:
    """Cosines of two references' gradients with those of another precision, and of the subspaces that they span."""
    names = list(exact)
    of_parameters = {
        (reference, name): float(cosine_similarity(one.flatten(), found[reference][name].flatten(), dim=0))
        for reference in names
        for name, one in exact[reference].items()
        if one.any()
    }
    worst = min(of_parameters, key=lambda key: of_parameters[key])
    gram = torch.zeros(2 * len(names), 2 * len(names), dtype=torch.float64)
    for parameter in exact[names[0]]:
        vectors = [gradients[name][parameter].flatten() for gradients in (exact, found) for name in names]
        rows = torch.stack(vectors).double()
        gram += rows @ rows.T
    lengths = gram.diagonal().sqrt()
    cosines = gram / torch.outer(lengths, lengths)
    return {
        "cosines": [float(cosines[index, index + len(names)]) for index in range(len(names))],
        "lengths": [float(lengths[index + len(names)] / lengths[index]) for index in range(len(names))],
        "subspace": float(_principal_cosines(gram, len(names)).min()),
        "lowest of a parameter": of_parameters[worst],
        "which": worst[1],
    }


def _principal_cosines(gram: Tensor, number: int) -> Tensor:
    """Of the angles between span(A) and span(B), from the Gram matrix of [A, B]: singular values of Q_Aᵀ Q_B."""
    factors = [torch.linalg.cholesky(part) for part in (gram[:number, :number], gram[number:, number:])]
    left = torch.linalg.solve_triangular(factors[0], gram[:number, number:], upper=False)
    overlap = torch.linalg.solve_triangular(factors[1], left.T, upper=False)
    return torch.linalg.svdvals(overlap)


def _write_inputs(model: Path, general: Path, folder: Path) -> None:
    rows = general.read_text(encoding="utf-8").splitlines(keepends=True)
    for index, name in enumerate(("first", "second")):
        part = rows[index * CONVERSATIONS : (index + 1) * CONVERSATIONS]
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    settings = {
        "launch": {"nproc-per-node": 1},
        "model": "weights",
        "seed": 1,
        "use-distributed-optimizer": True,
        "seq-length": LENGTH,
        "max-position-embeddings": LENGTH,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "micro-batch-size": 1,
        "global-batch-size": 1,
        "train-iters": 1,
        "lr": 1e-6,
        "ogpsa-train-data": "first.jsonl",
        "ogpsa-packing": True,
        "ogpsa-reference": {name: f"{name}.jsonl" for name in ("first", "second")},
        "ogpsa-reference-samples": CONVERSATIONS,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _run(
    command: PreloadedCommand, folder: Path, name: str, arguments: list[str], module: str = "megatron_ogpsa.cli.main"
) -> None:
    log = folder / f"{name}.log"
    running = command.start(module, arguments, folder=folder, output=log, environment={ALLOW_PICKLES: "1"})
    if running.wait(SECONDS) != 0:
        sys.exit(f"{name}: {running.output[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
