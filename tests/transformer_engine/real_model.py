"""How far FP8 turns the reference subspace of a real model, and what that lets through: measured over the emulated kernels.

    python -m tests.transformer_engine.real_model MODEL_FOLDER --general CONVERSATIONS.jsonl --json docs/fp8/real_model.json

Two references of a few conversations each, and requests that the model is to refuse, at its own weights in fp32, in bf16
and in each recipe. Prints, for each beside fp32: the cosines of the references' gradients, the lowest of a parameter's own,
the cosine of the larger angle between the two subspaces, and what is left of a training gradient's first-order effect on
the references' losses once its part in the subspace is removed.
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

from megatron_ogpsa.laptop.safety_data import training_examples
from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES
from tests.harness.preloaded import PreloadedCommand
from tests.transformer_engine.wheel import VERSION

CONVERSATIONS = 4
"""Of each reference."""

TRAINING_SAMPLES = 8
REFERENCES = ("first", "second")
TRAINING = "training"
"""Kept as a third reference's gradient, since it is taken in the same precision."""

LENGTH = 512
SECONDS = 1800.0
FP8 = (
    ("delayed", "hybrid", ""),
    ("delayed", "e4m3", ""),
    ("tensorwise", "hybrid", ""),
    ("tensorwise", "hybrid", "FP8 weights"),
    ("blockwise", "hybrid", ""),
    ("blockwise", "e4m3", ""),
    ("blockwise", "e4m3", "FP8 weights"),
    ("mxfp8", "hybrid", ""),
    ("mxfp8", "e4m3", ""),
)
"""Recipe, format, and how weights are held."""

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
    commands = {
        machine: PreloadedCommand(prepare=f"tests.transformer_engine.importing:{machine}")
        for machine in ("be_hopper", "be_blackwell")
    }

    def gradients(*flags: str, machine: str = "be_hopper") -> Gradients:
        _run(commands[machine], folder, ["train", "run.yaml", *flags], "tests.gpu.keeping_gradients")
        found: Gradients = torch.load(folder / "gradients.pt", weights_only=True)
        return found

    try:
        _write_inputs(model, general, folder)
        convert = [sys.executable, "-m", "megatron_ogpsa.cli.main", "convert", str(model), str(folder / "weights")]
        subprocess.run(convert, check=True)
        exact, in_bf16 = gradients(), gradients("--bf16")
        rows = [_row("bf16", exact, in_bf16, in_bf16)]
        for recipe, form, weights in FP8:
            started = time.monotonic()
            flags = [
                "--bf16",
                "--fp8-format",
                form,
                "--fp8-recipe",
                recipe,
                *(["--fp8-param-gather"] if weights else []),
            ]
            machine = "be_blackwell" if recipe == "mxfp8" else "be_hopper"
            found = gradients(*flags, machine=machine)
            rows.append(_row(f"{recipe} {form} {weights}".strip(), exact, found, found))
            # With weights in bf16 these are bitwise the gradients of the run in bf16 (test_fp8_state.py).
            without = gradients(*flags, "--ogpsa-references-in-bf16", machine=machine) if weights else in_bf16
            rows.append(_row(f"{recipe} {form} {weights}".strip() + ", references in bf16", exact, found, without))
            print(f"{time.monotonic() - started:.0f} s", flush=True)
        return rows
    finally:
        for command in commands.values():
            command.close()


def _row(name: str, exact: Gradients, training: Gradients, references: Gradients) -> dict[str, Any]:
    left = left_of_effects(exact, training, references)
    row = {"precision": name, **compared(exact, references), "left of effects": left}
    print(json.dumps(row), flush=True)
    return row


def compared(exact: Gradients, found: Gradients) -> dict[str, Any]:
    """Cosines of two references' gradients with those of another precision, and of the subspaces that they span."""
    of_parameters = {
        (reference, name): float(cosine_similarity(one.flatten(), found[reference][name].flatten(), dim=0))
        for reference in REFERENCES
        for name, one in exact[reference].items()
        if one.any()
    }
    worst = min(of_parameters, key=lambda key: of_parameters[key])
    number = len(REFERENCES)
    gram = torch.zeros(2 * number, 2 * number, dtype=torch.float64)
    for parameter in exact[REFERENCES[0]]:
        vectors = [gradients[name][parameter].flatten() for gradients in (exact, found) for name in REFERENCES]
        rows = torch.stack(vectors).double()
        gram += rows @ rows.T
    lengths = gram.diagonal().sqrt()
    cosines = gram / torch.outer(lengths, lengths)
    return {
        "cosines": [float(cosines[index, index + number]) for index in range(number)],
        "lengths": [float(lengths[index + number] / lengths[index]) for index in range(number)],
        "subspace": float(_principal_cosines(gram, number).min()),
        "lowest of a parameter": of_parameters[worst],
        "which": worst[1],
    }


def left_of_effects(exact: Gradients, training: Gradients, references: Gradients) -> float:
    """What is left of a step's first-order effect on the references' losses, when each tensor's training gradient h is
    projected to the complement of the references' gradients.

        Σ |⟨g, (I − P) h⟩| / Σ |⟨g, h⟩|

    over references and tensors, with g in fp32, h from ``training`` and P from ``references``.
    """
    left = before = 0.0
    for parameter, gradient in training[TRAINING].items():
        h = gradient.flatten().double()
        spanning, true = (
            torch.stack([gradients[name][parameter].flatten() for name in REFERENCES]).double()
            for gradients in (references, exact)
        )
        along = torch.linalg.pinv(spanning @ spanning.T, hermitian=True) @ (spanning @ h)
        before += float((true @ h).abs().sum())
        left += float((true @ h - true @ spanning.T @ along).abs().sum())
    return left / before


def _principal_cosines(gram: Tensor, number: int) -> Tensor:
    """Of the angles between span(A) and span(B), from the Gram matrix of [A, B]: singular values of Q_Aᵀ Q_B."""
    factors = [torch.linalg.cholesky(part) for part in (gram[:number, :number], gram[number:, number:])]
    left = torch.linalg.solve_triangular(factors[0], gram[:number, number:], upper=False)
    overlap = torch.linalg.solve_triangular(factors[1], left.T, upper=False)
    return torch.linalg.svdvals(overlap)


def _write_inputs(model: Path, general: Path, folder: Path) -> None:
    rows = general.read_text(encoding="utf-8").splitlines(keepends=True)
    for index, name in enumerate(REFERENCES):
        part = rows[index * CONVERSATIONS : (index + 1) * CONVERSATIONS]
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    refusals = [example for example in training_examples(seed=1) if example.is_unsafe][:TRAINING_SAMPLES]
    lines = [json.dumps({"prompt": example.prompt, "response": example.chosen}) + "\n" for example in refusals]
    (folder / f"{TRAINING}.jsonl").write_text("".join(lines), encoding="utf-8")
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
        "ogpsa-train-data": f"{TRAINING}.jsonl",
        "ogpsa-packing": True,
        "ogpsa-reference": {name: f"{name}.jsonl" for name in (*REFERENCES, TRAINING)},
        "ogpsa-reference-samples": TRAINING_SAMPLES,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _run(command: PreloadedCommand, folder: Path, arguments: list[str], module: str) -> None:
    output = folder / "run.log"
    running = command.start(module, arguments, folder=folder, output=output, environment={ALLOW_PICKLES: "1"})
    if running.wait(SECONDS) != 0:
        sys.exit(f"{' '.join(arguments)}: {running.output[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
