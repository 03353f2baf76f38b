"""A GPU that is not there: what runs on it says "cuda:0", computes on the CPU, and fails where a GPU would.

A tensor on it is a wrapper around a CPU tensor. To torch's C++ the wrapper is a CPU tensor without memory, so that
autograd and autocast need no driver; to Python it is on cuda:0, and beside tensors that are not it is refused. Not
seen: kernels a GPU lacks, its rounding, its memory, and mistakes inside `torch.compile`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
# Their tensor's own device decides, and they may read indices of the CPU.
_INDEXING = (_aten.index.Tensor, _aten._unsafe_index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_DEVICES = {Tensor.device: GPU, Tensor.is_cuda: True, Tensor.is_cpu: False}
# Operations that give the host a number or a shape that only the GPU knows.
_ASKS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave"),
    *("_linalg_eigh", "_linalg_svd", "linalg_pinv", "_linalg_check_errors"),  # whether it could be solved
)
# What reads memory.
_OF_MEMORY = (Tensor.tolist, Tensor.__reduce_ex__, Tensor.__format__)


class OnGpu(Tensor):
    """A tensor on the pretended GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        shape = held.size(), held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, shape[0], strides=shape[1], storage_offset=shape[2], dtype=held.dtype, device=CPU
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def as_subclass(self, kind: type[Tensor]) -> Tensor:
        return self.held.as_subclass(kind)  # no tensor is of two classes: MONAI's MetaTensor is on the CPU

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(function, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class OtherDeviceError(RuntimeError):
    """What CUDA says of tensors on two devices."""


class _Generator(torch.Generator):
    """A generator of the GPU; it draws on the CPU."""

    device = GPU


class _AnyGenerator(type):
    """In the place of `torch.Generator`, which a device makes one or the other."""

    made = torch.Generator

    def __call__(cls, device: Any = CPU) -> torch.Generator:
        return _Generator() if _is_gpu(device) else cls.made(device)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.made)


class _AnyMode(TorchFunctionMode):
    """Functions that have no tensor yet, or one that is to move."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(function, args, dict(kwargs or {}))


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: OnGpu) -> Tensor:
        return gradient.held


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: OnGpu) -> Tensor:
        return tensor.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient)


class _Passing(threading.local):
    backward = 0


_passing = _Passing()
_run_backward = torch.autograd._engine_run_backward
_autocast = torch.autocast.__init__
_run_thread = threading.Thread.run


_waits: list[Counter[str]] = []
_on_their_way: list[tuple[Tensor, Tensor]] = []


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what inside the block has the host wait for the GPU, as `torch.cuda.set_sync_debug_mode` tells it: by what
    asks and the place in medsd, "item training/optimise.py:132"."""
    _waits.append(Counter())
    try:
        yield _waits[-1]
    finally:
        _waits.pop()


def _waited(what: str) -> None:
    for there, held in _on_their_way:
        there.copy_(held)
    _on_their_way.clear()
    if not _waits:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and "/medsd/" not in frame.f_code.co_filename:
        frame = frame.f_back
    place = frame.f_code.co_filename.rpartition("/medsd/")[2]
    _waits[-1][f"{what} {place}:{frame.f_lineno}"] += 1


class _Stream:
    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        _waited("event")


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _moved(tensor: Tensor, device: Any) -> Tensor:
    if device is None or _is_gpu(device) == isinstance(tensor, OnGpu):
        return tensor
    moved: Tensor = (_ToGpu if _is_gpu(device) else _ToCpu).apply(tensor)
    return moved


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnGpu) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnGpu(leaf) if isinstance(leaf, Tensor) else leaf


def _plain(function: Any, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs))):
        return function(*args, **kwargs)  # what is of the CPU alone may be of another class
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _called(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of torch's Python, on whichever device."""
    first = args[0] if args else None
    if isinstance(first, OnGpu):
        if getattr(function, "__name__", "") == "__get__" and function.__self__ in _DEVICES:
            return _DEVICES[function.__self__]
        if function in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function in _OF_MEMORY:
            _waited("read")
            return _plain(function, first.held, *args[1:], **kwargs)
        if function is Tensor.get_device:
            return GPU.index
        if function is Tensor.new_tensor:
            made = torch.tensor(args[1], **{"dtype": first.dtype, **kwargs, "device": CPU})
            _waited("copied")
            return _moved(made, kwargs.get("device", GPU))
    if function in (torch.tensor, torch.as_tensor) and isinstance(first, list | tuple):
        args = (tree_map(lambda leaf: leaf.item() if isinstance(leaf, OnGpu) else leaf, first), *args[1:])
    if function in (Tensor.cpu, Tensor.cuda):
        if (function is Tensor.cpu) == isinstance(first, OnGpu):
            _waited("copied")
        return _moved(first, CPU if function is Tensor.cpu else GPU)
    if function is Tensor.pin_memory:
        return first
    if function is Tensor.to:
        return _to(*args, **kwargs)
    device, generator = kwargs.get("device"), kwargs.get("generator")
    computes = device if device is not None else GPU if isinstance(first, OnGpu) else CPU
    if generator is not None and _is_gpu(generator.device) != _is_gpu(computes):
        raise RuntimeError(f"Expected a '{computes}' device type for generator but found '{generator.device}'")
    if _is_gpu(device):
        if function in (torch.tensor, torch.as_tensor):
            _waited("copied")
        made = _plain(function, *tree_map(_held, args), **{**kwargs, "device": CPU})
        return _moved(made.detach(), GPU).requires_grad_(made.requires_grad)
    try:
        return _plain(function, *args, **kwargs)
    except OtherDeviceError:
        # One of a function's tensors may be made in C++, on the device of its input, which the wrapper hides from it.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors or any(not isinstance(leaf, OnGpu) or leaf.requires_grad for leaf in tensors):
            raise
        return tree_map(_wrapped, _plain(function, *tree_map(_held, args), **tree_map(_held, kwargs)))


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    device, dtype, meanwhile, layout = torch._C._nn._parse_to(*args, **kwargs)
    device = next((other.device for other in (*args, *kwargs.values()) if isinstance(other, Tensor)), device)
    moves = device is not None and _is_gpu(device) != isinstance(tensor, OnGpu)
    if moves and not meanwhile:
        _waited("copied")
    elif moves and isinstance(tensor, OnGpu):  # until somebody waits there is anything in the host's memory
        _on_their_way.append((torch.zeros_like(tensor.held, dtype=dtype), tensor.held))
        return _on_their_way[-1][0]
    tensor = _moved(tensor, device)
    options = {"memory_format": layout} if layout is not None else {}
    made: Tensor = _plain(Tensor.to, tensor, tensor.dtype if dtype is None else dtype, copy=copy, **options)
    return made


def _computed(function: Any, args: Any, kwargs: Any) -> Any:
    """An operation of which one tensor or more is on the GPU."""
    if function is _aten.copy_.default:  # the one between devices
        if not isinstance(args[0], OnGpu) or not isinstance(args[1], OnGpu):
            _waited("copied")
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if function in _INDEXING and isinstance(args[0], OnGpu):
        others = [value for value in args[2:3] if not isinstance(value, OnGpu)]
    if _passing.backward:  # a gradient that nobody gave is zeros that C++ makes
        others = [tensor for tensor in others if tensor.any()]
    writes = function._schema.name.endswith("_") and not isinstance(args[0], OnGpu)
    if any(tensor.ndim or writes for tensor in others):  # a single number may come from the CPU
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise OtherDeviceError(f"{function}: Expected all tensors to be on the same device, of shapes {shapes}")
    name, indices = function._schema.name.removeprefix("aten::"), args[1] if function in _INDEXING else ()
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if masks and not (name.startswith("index_put") and args[2].numel() == 1):  # which is a fill
        _waited("index by mask")
    elif any(index is not None and not isinstance(index, OnGpu) for index in indices):
        _waited("index of the CPU")
    elif name in _ASKS:
        _waited(name)
    found = tree_map(_wrapped, function(*tree_map(_held, args), **tree_map(_held, kwargs)))
    return return_and_correct_aliasing(function, args, kwargs, found)


def _backward(*args: Any, **kwargs: Any) -> Any:
    """Hooks and backward methods see devices as the code around the pass does."""
    _passing.backward += 1
    try:
        with torch._C._EnableTorchFunction(), _AnyMode():
            return _run_backward(*args, **kwargs)
    finally:
        _passing.backward -= 1


def _autocasting(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    _autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _thread(thread: threading.Thread) -> None:
    with _AnyMode():
        _run_thread(thread)


_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda *_: nullcontext(),
    "current_stream": lambda *_: _Stream(),
    "synchronize": lambda *_: _waited("synchronize"),
    "get_device_name": lambda *_: "pretended",
    "is_current_stream_capturing": lambda: False,
    "is_bf16_supported": lambda *_, **_named: True,
    "mem_get_info": lambda *_: (2**34, 2**34),
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), lambda *_: 0),
    **dict.fromkeys(
        ("set_rng_state", "manual_seed", "set_device", "empty_cache", "reset_peak_memory_stats"),
        lambda *_: None,
    ),
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside the block there is one GPU, in this process and all its threads."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class in place
    try:
        with (
            mock.patch.multiple("torch.cuda", **_CUDA),
            mock.patch.object(torch, "Generator", _AnyGenerator("Generator", (), {})),
            mock.patch.object(torch.autocast, "__init__", _autocasting),
            mock.patch.object(torch.autograd, "_engine_run_backward", _backward),
            mock.patch.object(threading.Thread, "run", _thread),
            _AnyMode(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
