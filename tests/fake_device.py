# SPDX-License-Identifier: Apache-2.0
"""A device that is not there: tensors say that they are on it, and compute on the CPU.

``with FakeDevice("mps") as device`` counts what would make a real host wait: ``copies`` to the
device (a list as an index is one), ``reads`` from it (``item``, ``tolist``, a mask as an index).
What the device does not have raises: ``forbidden`` dtypes, and tensors of two devices in one
operation. Kernels that read memory by its address do not run in it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A build without the device raises wherever C++ reads its name, so to C++ the tensors are on
# "meta", which nobody else uses in here.
META = torch.device("meta")
MOVES = {"_to_copy", "copy_"}
MAKES = {torch.tensor, torch.as_tensor}  # from numbers on the host
# Results whose size depends on values: the host has to wait for it.
SIZED = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_local_scalar_dense",
}


def tree_map(change, x):
    """Change what is in nested tuples, lists and dicts; torch's own is several times slower."""
    if isinstance(x, tuple | list):
        return type(x)([tree_map(change, each) for each in x])
    if isinstance(x, dict):
        return {key: tree_map(change, each) for key, each in x.items()}
    return change(x)


class FakeTensor(torch.Tensor):
    """A tensor of the device; ``elem`` holds its numbers."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device):
        """Wrap ``elem``."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=META,
        )

    def __init__(self, elem: torch.Tensor, device: torch.device) -> None:
        """Keep ``elem``."""
        self.elem, self.where = elem, device

    @property
    def device(self):
        """Name the device."""
        return self.where

    @property
    def is_cuda(self):
        """Tell whether that is CUDA."""
        return self.where.type == "cuda"

    def data_ptr(self):
        """Return the address of the numbers."""
        return self.elem.data_ptr()

    def tolist(self):
        """Read all of it."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute only within the mode."""
        raise AssertionError(f"{func} outside of FakeDevice")


class _Names(TorchFunctionMode):
    """Takes the device's name out of Python calls."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.renamed, (args, dict(kwargs or {})))
        if func in MAKES and kwargs.get("device") == META:
            kwargs.pop("device")
            return func(*args, **kwargs).to(META)
        if func is torch.Tensor.new_tensor and isinstance(args[0], FakeTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(META)
        if func in {torch.Tensor.__getitem__, torch.Tensor.__setitem__}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(self.listed(part) for part in index)
            args = (args[0], index, *args[2:])
        if func is torch.where and any(isinstance(x, FakeTensor) for x in args):
            args = self.with_tensors(*args)
        return func(*args, **kwargs)

    @staticmethod
    def with_tensors(condition, *given):
        """Make tensors of numbers: C++ would make them on "meta", where they have no value."""
        dtype = torch.result_type(*given)
        return condition, *(
            x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=dtype) for x in given
        )

    def listed(self, part):
        return torch.tensor(part) if isinstance(part, list) else part  # counted as it is used

    def renamed(self, x):
        if isinstance(x, torch.device | str) and not isinstance(x, torch.Tensor):
            here = str(x).split(":")[0] == self.owner.device.type
            return META if here else x
        return x


class FakeDevice(TorchDispatchMode):
    """The mode; see the file's text."""

    def __init__(self, name: str, forbidden: tuple[torch.dtype, ...] = (torch.float64,)) -> None:
        """Make the device ``name``, without the dtypes that it does not have."""
        super().__init__()
        self.device, self.forbidden = torch.device(name), forbidden
        self.copies: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.names = _Names(self)

    def __enter__(self):
        """Enter both modes."""
        super().__enter__()
        self.names.__enter__()
        return self

    def __exit__(self, *error):
        """Leave both modes."""
        self.names.__exit__(*error)
        super().__exit__(*error)

    def count(self, what: str, func) -> None:
        """Count one."""
        getattr(self, what)[getattr(func, "__name__", str(func))] += 1

    def clear(self) -> None:
        """Count from 0 again."""
        self.copies.clear()
        self.reads.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run on the CPU, and say where the result is."""
        kwargs = dict(kwargs or {})
        leaves: list[torch.Tensor] = []
        tree_map(
            lambda x: leaves.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs)
        )
        there = [x for x in leaves if isinstance(x, FakeTensor)]
        name = func._schema.name.removeprefix("aten::")
        for x in leaves:
            assert isinstance(x, FakeTensor) or x.device != META, f"{func}: no value"
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        onto = bool(there) if wanted is None else torch.device(wanted) == META
        if name == "copy_":
            onto = isinstance(args[0], FakeTensor)
        # Small tensors that are sent with ``non_blocking=True`` are staged; nobody waits.
        wait = not kwargs.get("non_blocking", name == "copy_" and args[2:] == (True,))
        self._watch(func, name, leaves, there, onto=onto, wait=wait)
        plain = tree_map(lambda x: x.elem if isinstance(x, FakeTensor) else x, (args, kwargs))
        result = func(*plain[0], **plain[1])
        if not onto:
            return result
        if func._schema.is_mutable and isinstance(args[0], FakeTensor):
            return args[0]  # changed in place: the same object comes back
        return tree_map(self._wrapped, result)

    def _watch(self, func, name, leaves, there, *, onto, wait):
        if name in MOVES:
            if onto and len(there) < len(leaves):
                if not wait:
                    return
                self.count("copies", func)
            elif there and not onto:
                self.count("reads", func)
        elif there and (name in SIZED):
            self.count("reads", func)
        elif there and name in {"index", "index_put", "index_put_", "_unsafe_index"}:
            index = [x for x in leaves[1:] if x.dtype in {torch.bool, torch.int64}]
            for x in index[: len(index) - (x_is_value(func, leaves))]:
                if x.dtype == torch.bool:
                    self.count("reads", func)
                elif not isinstance(x, FakeTensor):
                    self.count("copies", func)
        elif there and len(there) < len(leaves):
            rest = [x for x in leaves if not isinstance(x, FakeTensor)]
            # A number wrapped by Python or C++ is passed on as an argument of the launch.
            assert all(x.ndim == 0 for x in rest), f"{func}: tensors of two devices"

    def _wrapped(self, x):
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        if x.dtype in self.forbidden:
            raise TypeError(f"{self.device} has no {x.dtype}")
        return FakeTensor(x, self.device)


def x_is_value(func, leaves) -> bool:
    """Tell whether the last tensor of an indexing call is what is written."""
    return "index_put" in func._schema.name and leaves[-1].dtype in {torch.bool, torch.int64}
