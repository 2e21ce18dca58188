"""Mistakes in what a run goes on from."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

CHOICE = "tests/checkpoints/test_choice.py"
MANIFESTS = "tests/integration/test_manifests.py"
DAMAGED = f"{CHOICE}::test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken"

CHECKPOINTS = (
    Mutation(
        "torn-checkpoint-taken",
        "megatron_ogpsa/checkpoints/choice.py",
        "        if not bad:\n",
        "        if not bad or saved.name == found.tracked:\n",
        (DAMAGED,),
        "what the tracker names is taken although its files are torn",
    ),
    Mutation(
        "manifest-not-verified",
        "megatron_ogpsa/checkpoints/manifest.py",
        "return None if digest == manifest[name] else",
        "return None if len(digest) == len(manifest[name]) else",
        (DAMAGED,),
        "files are read, but their digests are not compared",
    ),
    Mutation(
        "oldest-checkpoint-first",
        "megatron_ogpsa/checkpoints/survey.py",
        "key=lambda checkpoint: checkpoint.iteration, reverse=True",
        "key=lambda checkpoint: checkpoint.iteration",
        (DAMAGED,),
        "the oldest whole checkpoint is taken in place of a torn one",
    ),
    Mutation(
        "cut-short-is-finished",
        "megatron_ogpsa/checkpoints/survey.py",
        "is_finished=has_marker and not is_cut_short",
        "is_finished=has_marker",
        (f"{CHOICE}::test_nothing_was_saved_yet",),
        "a save that was killed before its manifest counts as a finished one",
    ),
    Mutation(
        "manifest-reaches-outside",
        "megatron_ogpsa/checkpoints/manifest.py",
        "if Path(name).name != name]",
        "if not Path(name).name]",
        (f"{CHOICE}::test_a_manifest_that_is_none_is_damage",),
        "a manifest may name files outside of its checkpoint",
    ),
    Mutation(
        "iterations-counted-with-six-digits",
        "megatron_ogpsa/checkpoints/survey.py",
        'return folder / f"iter_{iteration:07d}"',
        'return folder / f"iter_{iteration:06d}"',
        (f"{CHOICE}::test_a_whole_checkpoint_is_taken_without_a_word",),
        "the folder that is looked for is not the one that Megatron writes",
    ),
    Mutation(
        "digests-of-a-save-cut-short",
        "megatron_ogpsa/integration/checkpoints/saving.py",
        "    drop_digests(folder, rank)\n    if rank == 0:\n",
        "    if rank == 0:\n",
        (f"{MANIFESTS}::test_each_rank_hashes_what_it_wrote",),
        "the manifest has the digests of files that were written before, in a save that was cut short",
    ),
    Mutation(
        "rank-0-hashes-all",
        "megatron_ogpsa/checkpoints/manifest.py",
        'numbered = (f"__{rank}_{number}.distcp"',
        'numbered = (f"__{rank}_{number + rank}.distcp"',
        (f"{MANIFESTS}::test_each_rank_hashes_what_it_wrote",),
        "rank 0 reads the files of the others while they wait",
    ),
    Mutation(
        "writer-hashes-nothing",
        "megatron_ogpsa/integration/checkpoints/saving.py",
        "        keep_digests(folder, rank)\n",
        "        pass\n",
        (f"{MANIFESTS}::test_each_rank_hashes_what_it_wrote",),
        "training waits until what was written beside it has been read again",
    ),
    Mutation(
        "non-persistent-not-verified",
        "megatron_ogpsa/integration/checkpoints/loading.py",
        "        (kind, is_saved), pretrained = _verified_kind(flags, load_arg), flags.pretrained_checkpoint\n",
        "        (kind, is_saved), pretrained = (flags.non_persistent_ckpt_type, False), flags.pretrained_checkpoint\n",
        ("tests/integration/test_torn_checkpoints.py::test_a_non_persistent_checkpoint_is_verified_too",),
        "a torn non-persistent checkpoint, which Megatron prefers to others, is loaded without a look",
    ),
    Mutation(
        "begun-anew-beside-a-non-persistent-checkpoint",
        "megatron_ogpsa/integration/checkpoints/loading.py",
        "            kind, pretrained = (kind, None) if is_saved else (None, pretrained)\n",
        "",
        ("tests/integration/test_torn_checkpoints.py::test_a_non_persistent_checkpoint_is_verified_too",),
        "a run that has saved non-persistent checkpoints only begins anew with the pretrained weights",
    ),
)
