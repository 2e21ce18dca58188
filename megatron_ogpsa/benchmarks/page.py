"""What the page of a CPU says, with places for the figures that :mod:`megatron_ogpsa.benchmarks.report` reads."""

PAGE = """# What projection costs

Every figure here is a ratio, or stands beside one: medians over rounds in which the things that are compared take turns, so
that a machine that is shared or changes its speed is fair to all of them. Made by
`python -m megatron_ogpsa.benchmarks.report docs/performance` from the data in [performance](performance). Those of a GPU have
[a page of their own](gpu.md).

## The two passes

`{projection_command}`, and of the longest vectors `{large_command}` ({projection_date}; {device};
{threads} thread{threads_plural}; {versions}).

A projected step reads the gradient and the basis twice and writes the gradient once: dots c = Qᵀg with ‖g‖², in fp64; then
g ← g − Q·r. Given as a share of the bandwidth of a triad (a = b + s·c, fp32) of the same size in the same round. Above 100 %
are passes that write less than a triad, whose written memory the processor first reads.

{projection}

One block is granularity *model*; {num_blocks} are *tensor*, and a third of them have a hundredth of the others'
elements. A basis in bf16 halves the bytes and not the arithmetic: to widen an element to fp64 in registers takes about as
long as to read it, and the processor does only part of the one during the other.

The bar is 80 % in one block and 60 % in {num_blocks}. Of {num_measured} passes, those of the plot below too, {num_missed} are
below it: {missed}.

![Milliseconds against the number of basis vectors, and against the number of blocks](performance/growth.png)

`{growth_command}`: time grows with the bytes, which are linear in k; with thousands of blocks
a block adds {per_block_least:.1f} to {per_block_most:.1f} µs, by k. Tile by tile in PyTorch, as they were before they were
compiled, the two passes take {in_pytorch_least:.1f} to {in_pytorch_most:.1f} times as long.

By the default rule the weights' changes are projected, and each weight is a vector of its own. `{apart_command}`: over
{apart_vectors} vectors a pass takes {apart_least:.2f} to {apart_most:.2f} of what it takes over one, as long as all together.

## A training step

A GPT of {parameters:.0f}M parameters, sequences of {seq_length}, micro-batches of {micro_batch_size}, {accumulate}
accumulated, two references, per tensor: plain, projected, and with the hooks of the authors' released code (whole copies
of the references on each rank, brought to the gradient's device and orthonormalised anew in each tensor's hook on each
micro-batch), in turn in one process group ({steps_dates}; {steps_cores} cores, a thread a rank):

```bash
{steps_commands}
```

{steps}

The default rule adds one collective to a step, and the paper's none: its sums ride in the all-reduce of the norm. On CPU
the authors' copies lie beside the gradient, so that bringing them there, which on a GPU crosses the bus on every micro-batch,
costs nothing here. *Beside passes* is what a refresh takes beside its reference passes:
capturing, one all-reduce, orthonormalising.

Memory, of the rank that prints, as bytes for an element of its shard: what is held from one step to the next, and by how
much the highest resident set of a step, or of a refresh, is above a plain step's. That also counts what the allocator did not
give back in between. In a refresh the new references stand beside the basis in use.

{memory}

## Growth

What projection adds to `optimizer.step()`, against the number of ranks, each with a shard of about the same size, and against
the number of basis vectors, with the whole model as one block and with one for each of {tensors} tensors.

![Milliseconds added to a step, against ranks and against basis vectors](performance/overhead.png)

```bash
{growth_commands}
```

{ranks}

Each rank has as much to read, and all read through one memory bus: alone on it a rank has the whole. On {ranks_cores} cores
more ranks than that take turns besides, so that what is to be compared is the share of the step. Against basis vectors:

{vectors}

Medians over rounds of the difference within a round, with quartiles, and the machine's load average, which the measured
ranks are part of; of the paper's rule. *OGPSA / plain* is of whole steps, which differ by more than what is added from one
to the next on a machine as busy as that, and so do the lines of one column: they say no more than what is near what. The
passes by themselves (above) are linear in k. With one micro-batch in a step, as here, a refresh passes over one for each
reference, a quarter of what it does in the table of steps above, so that what is *beside passes* weighs more.

## Whole runs

`{training_command}` ({training_date}, {training_cores} cores): SFT and DPO of a real model of 135M parameters on packed
rows of real data, with `megatron-ogpsa train`. Tokens of the data in a second, padding not counted; *with refreshes* spreads
one of {reference_samples} conversations over the paper's {sft_interval} steps in SFT and {dpo_interval} in DPO.

{training}

With a batch as small as here a refresh weighs much: it passes over {reference_samples} conversations, a step over
{tokens_of_a_step} tokens. [plan](planning.md) tells the share for a run on a cluster. *TRL* is its trainers in one process
on all cores, as they run on one GPU: the same model and conversations, micro-batches of up to four samples padded to their
longest, in autocast to bf16 where Megatron has bf16 weights; *authors* adds the rule of their released code, by hooks on each
parameter with a copy of the reference in host memory. It packs nothing: in SFT half of its positions are padding. In the few
steps of DPO that count, of two pairs each, lengths happened to be alike.

Two runs may differ by more than the projection takes. With every second step of one process projected by the default rule, a
plain step took {in_turn_sft:.3f} of a projected one in SFT and {in_turn_dpo:.3f} in DPO, the median over pairs of neighbours,
where runs of the same command had {runs_sft:.3f} and {runs_dpo:.3f} of plain ({in_turn_date}, {in_turn_cores} cores):

```bash
{in_turn_command}
```

A refresh finds its reference data ready: they are tokenized once, when the run starts, cut into each rank's micro-batches
and kept in host memory, page-locked where there is a GPU. Nothing is read from disk or tokenized during a refresh.

## Elsewhere

On a GPU: [gpu.md](gpu.md). What cheaper refreshes (fewer samples, longer intervals, references in turn) leave of the
protection is measured in the [study](study/README.md).
"""
