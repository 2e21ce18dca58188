"""Tokens per second of TRL's trainers on one device, plain and with the authors' rule, to compare with Megatron's.

```
python -m megatron_ogpsa.benchmarks.trl_training MODEL_FOLDER --stage sft --data S.jsonl --reference R.jsonl --json FILE
```

One process, as people run TRL on one GPU: samples padded to the longest of their micro-batch, reference log-probabilities
of DPO computed first, no recomputation of activations. A micro-batch has as many samples as a packed row of Megatron's holds
on average, and a step as many whole micro-batches as fill ``--tokens-per-step``. With ``--rule authors`` the gradient of the
references' next-token loss is computed like any batch's, copied to host memory (in bf16 under ``--bf16``), and removed from
every micro-batch's gradient, tensor by tensor (:mod:`megatron_ogpsa.benchmarks.authors_hooks`).

:mod:`megatron_ogpsa.benchmarks.training` starts it, in turn with Megatron. It needs ``trl`` (setup.cfg, extra ``test``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa.benchmarks.authors_hooks import AuthorsHooks
from megatron_ogpsa.benchmarks.timing import wait
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError

RULES = ("plain", "authors")

Batch = Mapping[str, Tensor]


@dataclass
class StepTimes:
    """Of one optimizer step.

    Attributes:
        tokens: of the data, padding not counted; prompts of pairs count with each answer.
        positions: what the model computed, padding too.
        seconds: without a refresh.
        refresh_seconds: before it; 0 where the step had none.
    """

    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    refresh_seconds: float = 0.0


class Clock:
    """Times the steps of a trainer, and has references refreshed before some of them.

    Args:
        reference_batches: micro-batches with ``input_ids``, ``attention_mask`` and ``labels``; none leaves steps plain.
        interval: steps from one refresh to the next.
        dtype: of the references in host memory.
    """

    def __init__(
        self,
        device: torch.device,
        reference_batches: Sequence[Batch],
        interval: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.steps: list[StepTimes] = []
        self._device = device
        self._batches = reference_batches
        self._interval = interval
        self._dtype = dtype
        self._hooks: AuthorsHooks | None = None
        self._started = 0.0

    def begin(self, model: torch.nn.Module) -> None:
        """A step begins; its gradients are none yet."""
        step = StepTimes()
        if self._batches and len(self.steps) % self._interval == 0:
            started = self._now()
            self._refresh(model)
            step.refresh_seconds = self._now() - started
        self.steps.append(step)
        self._started = self._now()

    def end(self) -> None:
        """The optimizer has stepped."""
        self.steps[-1].seconds = self._now() - self._started

    def count(self, attention_mask: Tensor) -> None:
        """A micro-batch of the step that is under way."""
        self.steps[-1].tokens += int(attention_mask.sum())
        self.steps[-1].positions += attention_mask.numel()

    def _refresh(self, model: torch.nn.Module) -> None:
        if self._hooks is not None:
            self._hooks.detach()
        for batch in self._batches:
            loss = model(**{name: tensor.to(self._device) for name, tensor in batch.items()}).loss
            (loss / len(self._batches)).backward()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad.detach() for parameter in trained if parameter.grad is not None]
        copies = [[gradient.to("cpu", self._dtype, copy=True)] for gradient in gradients]
        model.zero_grad()
        self._hooks = AuthorsHooks(trained, copies)
        self._hooks.attach()

    def _now(self) -> float:
        wait(self._device)
        return time.perf_counter()


def measure(args: argparse.Namespace) -> list[StepTimes]:
    """Train for ``args.steps`` steps.

    Raises:
        UserError: trl is not installed, the model or a source cannot be read.
    """
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: no config.json in it: name a Hugging Face folder of an instruct model")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}): pip install transformers") from None
    torch.set_num_threads(args.threads)
    rows = _rows(args.data, ["messages"] if args.stage == "sft" else ["prompt", "chosen", "rejected"])
    protected = _rows(args.reference, ["messages"])[: args.reference_samples] if args.rule == "authors" else []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    samples, micro_batch = _sizes(args, rows, tokenizer)
    batches = _reference_batches(protected, tokenizer, micro_batch, args.seq_length)
    clock = Clock(device, batches, args.refresh_interval, torch.bfloat16 if args.bf16 else torch.float32)

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: object, **of_trainer: Any) -> None:
            clock.begin(of_trainer["model"])

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.end()

    trainer = _trainer(args, rows, model, tokenizer, clock, samples=samples, micro_batch=micro_batch)
    trainer.add_callback(Timed())
    trainer.train()
    return clock.steps


def _trainer(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    model: Any,
    tokenizer: Any,
    clock: Clock,
    *,
    samples: int,
    micro_batch: int,
) -> Any:
    try:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise UserError(f"trl cannot be imported ({error}): pip install 'megatron-ogpsa[test]'") from None
    settings = {
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": -(-samples // micro_batch),
        "max_length": args.seq_length,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 1,
    }
    kind, config = (
        (SFTTrainer, SFTConfig(**settings))
        if args.stage == "sft"
        else (DPOTrainer, DPOConfig(precompute_ref_log_probs=True, beta=0.2, **settings))
    )

    class Counted(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            clock.count(inputs["attention_mask"])
            return super().compute_loss(model, inputs, *rest, **named)

    return Counted(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def _rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """With lists of messages in each of ``fields``."""
    found: list[dict[str, Any]] = []
    for place, row in open_source(str(path)).rows():
        if not isinstance(row, dict) or any(not isinstance(row.get(field), list) for field in fields):
            raise UserError(f"{place}: TRL is given lists of messages in {', '.join(fields)}")
        found.append(row)
    return found


def _sizes(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[int, int]:
    """Samples that fill ``args.tokens_per_step`` on average, and how many of them a micro-batch takes."""
    lengths = []
    for row in rows:
        texts = (
            [row["messages"]]
            if args.stage == "sft"
            else [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
        )
        lengths.append(sum(min(len(_token_ids(tokenizer, text)), args.seq_length) for text in texts))
    mean = sum(lengths) / len(lengths)
    samples = max(1, round(args.tokens_per_step / mean))
    return samples, min(samples, args.micro_batch_size or max(1, round(args.seq_length / mean)))


def _token_ids(tokenizer: Any, messages: object) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def _reference_batches(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, micro_batch: int, seq_length: int
) -> list[dict[str, Tensor]]:
    """Padded micro-batches; the loss is of every token but padding."""
    found = [torch.tensor(_token_ids(tokenizer, row["messages"])[:seq_length]) for row in rows]
    return [_padded(found[i : i + micro_batch]) for i in range(0, len(found), micro_batch)]


def _padded(samples: Iterable[Tensor]) -> dict[str, Tensor]:
    labels = torch.nn.utils.rnn.pad_sequence([*samples], batch_first=True, padding_value=-100)
    mask = labels.ne(-100)
    return {"input_ids": labels.where(mask, 0), "attention_mask": mask.long(), "labels": labels}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and write each step's times as JSON."""
    args = parser().parse_args(argv)
    _see_one_gpu()
    try:
        steps = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    account = {"threads": torch.get_num_threads(), "steps": [asdict(step) for step in steps]}
    args.json.write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    return 0


def _see_one_gpu() -> None:
    """TRL refuses to run one process on several."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.trl_training")
    made.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a Hugging Face folder of an instruct model")
    made.add_argument("--stage", choices=("sft", "dpo"), required=True)
    made.add_argument("--data", type=Path, required=True, metavar="FILE", help="conversations, or preference pairs")
    made.add_argument("--reference", type=Path, required=True, metavar="FILE", help="conversations to protect")
    made.add_argument("--rule", choices=RULES, default="plain", help="(plain)")
    for name, default in (
        ("reference-samples", 32),
        ("refresh-interval", 4),
        ("steps", 8),
        ("tokens-per-step", 2048),
        ("seq-length", 512),
        ("threads", os.cpu_count() or 1),
    ):
        made.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    made.add_argument("--micro-batch-size", type=int, metavar="N", help="samples (as many as fill --seq-length)")
    made.add_argument("--bf16", action="store_true", help="autocast, with weights in fp32")
    made.add_argument("--out", type=Path, default=Path("runs/trl"), help="(runs/trl)")
    made.add_argument("--json", type=Path, required=True, metavar="FILE", help="where each step's times go")
    return made


if __name__ == "__main__":
    sys.exit(main())
