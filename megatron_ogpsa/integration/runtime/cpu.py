"""Megatron without a GPU: the whole stack on gloo, for laptops, tests and continuous integration.

Megatron 0.19 places tensors on ``"cuda"`` and reads CUDA streams, events and generators all over its code. Where no GPU
is found, :func:`install_if_no_gpu` makes those names mean the CPU. Nothing is installed where a GPU is found. Each
replacement stands in a table below with its reason; all were checked on the Megatron series of
:data:`~megatron_ogpsa.system.megatron.MEGATRON_SERIES`.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches
from megatron_ogpsa.system.megatron import require_supported_megatron

CPU = torch.device("cpu")
META = torch.device("meta")

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

_FACTORIES = (
    "arange empty empty_like full full_like ones ones_like rand randint randn randperm tensor zeros zeros_like"
).split()


class CpuStream:
    """A stream on a device that executes in program order: every wait is already over.

    A class, not a factory, because libraries annotate and subclass with ``torch.cuda.Stream``.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        return event or CpuEvent()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *exc: object) -> None: ...


class CpuEvent:
    """An event on a device that executes in program order: it is over as soon as it is recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0

    def synchronize(self) -> None: ...


_is_on_meta = False


def install_if_no_gpu() -> bool:
    """Let Megatron run on the CPU if no GPU is found; call it before ``megatron.core`` is used.

    Idempotent. Rank 0 announces it in one line on stderr. Returns whether the CPU runtime is in place.

    Raises:
        UserError: megatron-core is missing, or is of a series that was not checked.
    """
    if torch.cuda.is_available() or _is_on_meta:
        return False
    require_supported_megatron()
    first_time = not _is_installed()
    _install(CPU)
    if first_time and os.environ.get("RANK", "0") == "0":
        print("CPU runtime: no GPU found, Megatron runs on the CPU with gloo (for trials and tests)", file=sys.stderr)
    return True


def install_on_meta() -> None:
    """Let Megatron build models of any size in a process that only plans: its GPU becomes torch's meta device.

    Flags keep the defaults of a GPU, whether there is one or not: the plan is for another machine. Such a process cannot
    train. Idempotent.

    Raises:
        UserError: megatron-core is missing, or is of a series that was not checked.
        RuntimeError: the CPU runtime is in place already.
    """
    global _is_on_meta
    require_supported_megatron()
    if not _is_on_meta and _is_installed():
        raise RuntimeError("install_on_meta() after install_if_no_gpu(): plan in a process of its own")
    _is_on_meta = True
    _install(META)


def _install(device: torch.device) -> None:
    """Let ``device`` stand for the GPU."""
    _silence_expected_warnings()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # validate_args insists on it for tensor parallelism
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # jit_fuser would start a C++ compiler for each fused function
    _use_device_context()
    apply_patches(torch_patches(device))
    apply_patches(CORE_PATCHES)


def _use_device_context() -> None:
    """Use ``with torch.device(...)`` once, when torch notes the factories that it acts on: before they are replaced.

    Otherwise the context is without effect, and transformers, which builds its models within ``torch.device("meta")``,
    leaves rotary frequencies as memory held them.
    """
    with META:
        torch.empty(0)


def _silence_expected_warnings() -> None:
    """What torch and Megatron say of a missing GPU and its libraries, which the CPU runtime's own line says once."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "Only transformer-engine",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_no_runtime_warning)
    # The tracker warns at every dropout that device code drew from the CPU generator, as it must here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_no_generator_warning)


def install_in_training_loop() -> None:
    """Apply what only ``megatron.training`` needs, if the CPU runtime is in place. Imports ``megatron.training``."""
    if _is_installed():
        apply_patches(TRAINING_PATCHES)


def _is_installed() -> bool:
    stream: object = torch.cuda.Stream
    return stream is CpuStream


def _constant(value: object) -> Callable[[Any], Any]:
    """A replacement that takes any arguments and returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


def _instead(replacement: object) -> Callable[[Any], Any]:
    return lambda original: replacement


def _names_cuda(device: object) -> bool:
    return isinstance(device, int) or (device is not None and str(device).startswith("cuda"))


def _factory_on(device: torch.device) -> Callable[[Any], Any]:
    """Tensor factories whose ``device="cuda"`` means ``device``, where no memory is locked for copies to a GPU."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return original(*args, **kwargs)

        return factory

    return replace


def _type_with_cuda_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` that calls a float tensor by its CUDA name."""

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _CUDA_TYPE_NAMES.get(self.dtype) or original(self)
        return original(self, dtype, *args, **kwargs)

    return type_


def _get_core_rng_state(original: object) -> Callable[..., torch.Tensor]:
    return lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def _set_core_rng_state(original: object) -> Callable[..., None]:
    return lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _is_no_runtime_warning(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


def _is_no_generator_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _without_cuda_assertion(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(original, allow_no_cuda=True)


def _loader_with_own_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = original(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(consumed_samples)
            if loader.num_workers:  # they take a local function along
                loader.multiprocessing_context = "fork"
        return loader

    return build_pretraining_data_loader


def _forked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The writer of asynchronous saves as a fork of this process, which has the CPU runtime in place."""
    return lambda rank, mp_mode="fork": original(rank, "fork")


def _copying(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # it is sent to the writer by its name
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        return [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in original(write_buckets, non_blocking)
        ]

    return staticmethod(preload_tensors)


def _drawing_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def drawing_nothing(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        result = original(*args, **kwargs)
        torch.set_rng_state(state)
        return result

    return drawing_nothing


def _torch(name: str, reason: str, replace: Callable[[Any], Any]) -> Patch:
    module, _, attribute = name.rpartition("/")
    return Patch(target=f"{module or 'torch.cuda'}:{attribute}", reason=reason, replace=replace)


_PLACEMENT = "Megatron places tensors on the current CUDA device"
_GENERATION = "validate_args asks which generation the GPU is of to pick rules for overlap; Hopper has the fewest"
_ORDERING = "streams and events order CUDA work; on the CPU program order does"
_MEMORY = "the training log and the memory report read the CUDA allocator"
_RNG = "dropout under tensor parallelism draws from tracked CUDA generators; here the CPU generator is the device's"


def torch_patches(device: torch.device) -> tuple[Patch, ...]:
    """Names of torch that Megatron reads, standing for ``device``. ``torch.cuda.is_available`` keeps telling the truth."""
    return (
        _torch("current_device", _PLACEMENT, _constant(device)),
        _torch("device_count", "initialize.py builds the process groups only where it counts a device", _constant(1)),
        _torch("get_device_properties", _GENERATION, _constant(SimpleNamespace(major=9, minor=0, name="cpu"))),
        _torch("get_device_capability", _GENERATION, _constant((9, 0))),
        _torch("set_device", _PLACEMENT, _constant(None)),
        _torch("torch/Tensor.cuda", _PLACEMENT, _instead(lambda self, *args, **kwargs: self)),
        *(_torch(f"torch/{name}", _PLACEMENT, _factory_on(device)) for name in _FACTORIES),
        _torch(
            "torch/Tensor.type",
            "DDP and the optimizers sort parameters by the name of their CUDA type",
            _type_with_cuda_names,
        ),
        _torch("Stream", _ORDERING, _instead(CpuStream)),
        _torch("Event", _ORDERING, _instead(CpuEvent)),
        _torch("stream", _ORDERING, _instead(lambda stream: stream or CpuStream())),
        _torch("set_stream", _ORDERING, _constant(None)),
        _torch("current_stream", _ORDERING, _instead(lambda device=None: CpuStream())),
        _torch("default_stream", _ORDERING, _instead(lambda device=None: CpuStream())),
        _torch("synchronize", _ORDERING, _constant(None)),
        _torch("is_current_stream_capturing", "there are no CUDA graphs here", _constant(False)),
        _torch("torch.cuda.nvtx/range_push", "profiler ranges need the CUDA tools library", _constant(None)),
        _torch("torch.cuda.nvtx/range_pop", "profiler ranges need the CUDA tools library", _constant(None)),
        _torch("empty_cache", _MEMORY, _constant(None)),
        _torch("memory_allocated", _MEMORY, _constant(0)),
        _torch("max_memory_allocated", _MEMORY, _constant(0)),
        _torch("memory_reserved", _MEMORY, _constant(0)),
        _torch("max_memory_reserved", _MEMORY, _constant(0)),
        _torch("reset_peak_memory_stats", _MEMORY, _constant(None)),
        _torch("memory_stats", _MEMORY, _instead(lambda device=None: {})),
        _torch("get_rng_state", _RNG, _instead(lambda device="cuda": torch.get_rng_state())),
        _torch("set_rng_state", _RNG, _instead(lambda new_state, device="cuda": torch.set_rng_state(new_state))),
        _torch("torch.cuda.random/get_rng_state", _RNG, _instead(lambda device="cuda": torch.get_rng_state())),
        _torch("manual_seed", _RNG, _instead(lambda seed: torch.manual_seed(seed))),
    )


CORE_PATCHES: tuple[Patch, ...] = (
    Patch(target="megatron.core.tensor_parallel.random:_get_cuda_rng_state", reason=_RNG, replace=_get_core_rng_state),
    Patch(target="megatron.core.tensor_parallel.random:_set_cuda_rng_state", reason=_RNG, replace=_set_core_rng_state),
)

TRAINING_PATCHES: tuple[Patch, ...] = (
    Patch(
        target="megatron.training.training:initialize_megatron",
        reason="it asserts that there is a GPU unless told otherwise, and pretrain() does not tell",
        replace=_without_cuda_assertion,
    ),
    Patch(
        target="megatron.training.training:set_jit_fusion_options",
        reason=(
            "its warm-up draws inputs of the micro-batch's size from the device's generator, which initialises the "
            "weights here: they would depend on --micro-batch-size"
        ),
        replace=_drawing_nothing,
    ),
    Patch(
        target="megatron.training.training:build_pretraining_data_loader",
        reason=(
            "iterating a DataLoader draws a seed from the CPU generator, which is the device's generator here: a resumed "
            "run, which iterates anew, would drop out other units than the uninterrupted one"
        ),
        replace=_loader_with_own_generator,
    ),
    Patch(
        target="megatron.training.initialize:init_persistent_async_worker",
        reason="a writer of --async-save that does not inherit this runtime divides by the number of GPUs and dies unheard",
        replace=_forked,
    ),
    Patch(
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
        reason="the writer copies what it saves from the GPU before training goes on; from the CPU it would copy nothing",
        replace=_copying,
    ),
)
