"""Mistakes in what is looked at before a run: disks, checkpoints, FP8 flags."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

EXAMINED = "tests/doctor/test_environments.py::test_what_is_wrong_is_told_and_nothing_else"
FP8 = "tests/precision/test_support.py"

EXAMINATION = (
    Mutation(
        "one-checkpoint-is-enough-room",
        "megatron_ogpsa/doctor/disk.py",
        "    if free < total:\n",
        "    if free < largest:\n",
        (f"{EXAMINED}[nearly full disk]",),
        "a disk that has room for one of several checkpoints is called large enough",
    ),
    Mutation(
        "doctor-does-not-hash",
        "megatron_ogpsa/doctor/checkpoints.py",
        "        return examined\n    return examine(folder, step)\n",
        "        return examined\n    return examined\n",
        (f"{EXAMINED}[torn checkpoint]",),
        "a torn checkpoint passes, since its files are there",
    ),
    Mutation(
        "folder-made-by-looking",
        "megatron_ogpsa/system/disk.py",
        '    file = nearest_folder(folder) / f".{uuid',
        '    folder.mkdir(parents=True, exist_ok=True)\n    file = nearest_folder(folder) / f".{uuid',
        ("tests/integration/test_disk.py::test_folders_are_looked_at_and_not_made",),
        "looking whether a folder can be written makes it",
    ),
    Mutation(
        "fp8-tokens-of-all-ranks",
        "megatron_ogpsa/precision/fp8_support.py",
        "args.seq_length * args.micro_batch_size // ranks, get",
        "args.seq_length * args.micro_batch_size, get",
        (f"{FP8}::test_flags_are_refused_by_name_in_fp8_only",),
        "the tokens of all sequence-parallel ranks are taken for those of one",
    ),
    Mutation(
        "mxfp8-asked-as-plain-fp8",
        "megatron_ogpsa/precision/fp8_support.py",
        '"mxfp8": "is_mxfp8_available"',
        '"mxfp8": "is_fp8_available"',
        (f"{FP8}::test_the_gpu_is_asked_in_transformer_engines_words",),
        "a GPU that has FP8, but not MXFP8, passes",
    ),
)
