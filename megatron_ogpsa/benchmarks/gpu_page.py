"""What the page of a GPU says, with places for the figures that :mod:`megatron_ogpsa.benchmarks.gpu_report` reads."""

PAGE = """# On a GPU

One {device}, {date}; {versions}.
Made by `python -m megatron_ogpsa.benchmarks.gpu_report docs/gpu` from the data in [gpu](gpu).

On a GPU of your own, in the folder of these sources with the extra `test` and Transformer Engine installed
([fp8.md](fp8.md)), everything on this page and the tests that want a GPU, in the time that you give it:

```bash
python -m megatron_ogpsa.benchmarks.on_gpu measured --minutes 20 --model smollm2 \\
    --sft sft.jsonl --dpo pairs.jsonl --reference general.jsonl
python -m megatron_ogpsa.benchmarks.gpu_report measured
```

Without `--model` no whole runs are measured. What there was no time for is left to the next call.

## The two passes

```bash
{projection_commands}
```

A projected step reads the gradient and the basis twice and writes the gradient once: dots c = Qᵀg with ‖g‖², in fp64; then
g ← g − Q·r. As a share of the bandwidth of a copy (a = b, fp32) of the same size in the same round; medians over rounds, of
twenty passes each. Adding up the sums of blocks, a launch of its own, counts into *dots*. More than a copy has is possible,
since dots write nothing.

{projection}

The slowest is {slowest:.0%} of a copy; the bar is {bar:.0%}. It has the fewest bytes to read, in {smallest:.2f} ms, so that
what two launches take weighs most.
{small}
Threads read eight elements at once here, since all lies at multiples of that, as shards of Megatron's distributed optimizer
do with up to 16 data-parallel ranks. With 32 it is four and with 64 two, compiled by the tests and not measured; with 128 or
more it is one unless `--ddp-pad-buckets-for-high-nccl-busbw` is given, which pads for any number.

## A training step

```bash
{step_commands}
```

A GPT of {parameters:.2f}B parameters in bf16 with {tensors} tensors, micro-batches of {micro_batch_size} sequences of
{seq_length}, {accumulate} accumulated; gradients, basis and Adam in fp32, {rank} references, a block for each tensor.
*Authors* are the hooks of the released code, with references in bf16 in host memory, which cross the bus on every
micro-batch.

{steps}

{default_rule}

By the paper's rule the two passes read and write {pass_bytes:.1f} GB, for which a copy's bandwidth takes {pass_floor:.1f} ms.
They add {added:.1f} ms to `optimizer.step()`, which is timed until the GPU is done; that it is less is probably Megatron's
own pass for the norm, which falls away, and time in which the GPU would wait for the host. The whole step grew by
{grown:.1%}.

Memory: the highest that the allocator gave out, and by how many bytes for each element it is above a plain step. In a refresh
the new references stand beside the basis in use. The authors' copies, {copies:.1f} bytes an element, are in host memory.

{memory}

## Where the time goes

```bash
{profile_command}
```

PyTorch's profiler, {recorded} steps of each setting, milliseconds of one step. *Copies from the host* are of a basis in host
memory, {basis:.1f} GB in fp32, which each of the two passes brings to the GPU in tiles through two staging buffers.
{profile_note}

With the basis beside the gradient a step grew by {profile_grown:.0f} ms, {beside_ms:.0f} of them in the passes; the rest is
time in which the GPU was idle: a wait of the host uses up its lead, and with {kernels:.0f} launches in a step it takes a
while to be ahead again.

{profile}

![What the GPU does during the last step of each setting](gpu/profile.png)

* **Beside the gradient**, the two passes are {beside_kernels:.0f} launches and {beside_ms:.1f} ms.
* **In host memory**, a step grows by what the bus takes for two passes, at {host_gbs:.0f} GB/s. Of {copied:.0f} ms of copies
  {hidden:.0f} run beside kernels: those of the projection take a {bus_ratio:.0f}th of the time of the copies, and forward and
  backward passes hide the first two tiles of a step alone. A basis in bf16 takes half.

{copies_note}

{further}
"""


DEFAULT_RULE = (
    "The default rule, `--ogpsa-space update --ogpsa-mode conflict`, reads basis and main parameters three times a step and "
    "the gradient once, and writes the parameters once: for two references 1.6 times the bytes of the paper's."
)

TESTS = """## Tests

{outcomes}
"""

FP8 = """## FP8

Runs of a small model, 6 steps where bits are compared, 20 where losses are; reference gradients of the first refresh, per
parameter, beside those of a run in bf16 (`python -m pytest tests/gpu`, [fp8.md](fp8.md)).

{fp8}
"""

TRAINING = """## Whole runs

```bash
python -m megatron_ogpsa.benchmarks.random_model llama-1b --tokenizer smollm2
{commands}
```

SFT and DPO of one model, of 1.07B parameters, on the same data: as `megatron-ogpsa train` runs them on packed rows of 2,048
positions, four in a step, one at a time; and as TRL's trainers do, which pad, in as many whole micro-batches as have about
the same tokens, plain and with the authors' rule. Ours is in bf16 with fp32 main parameters, TRL's in fp32 with autocast.
Tokens are those of the data. *A step* is the median of one run's steps after the first two and without a refresh, {counted}
(for TRL the mean of five, since its steps differ in length), with the least and the most; *with refreshes* spreads one, of
32 conversations, over the paper's 30 steps in SFT and 5 in DPO.

{training}

The authors' rule brings all references over the bus on each micro-batch, tensor by tensor. What projection itself takes is
under [a training step](#a-training-step).

{note}
"""
