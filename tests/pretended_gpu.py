"""A GPU that is none, for finding what was left on the CPU: its tensors are the CPU's, in boxes.

    python tests/pretended_gpu.py train.py -t pretrain        # a script, with such a GPU in the machine

An operation on a boxed tensor and one of the CPU is refused as CUDA refuses it; only single numbers and
indices may be of either. The box is torch's PrivateUse1 device; kernels, precision and memory are the CPU's.
"""

import dataclasses
import runpy
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "gpu"
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Box(torch.Tensor):
    @staticmethod
    def __new__(cls, content):
        self = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, device=f"{DEVICE}:0",
        )  # fmt: skip
        self.content = content
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class Gpu(TorchDispatchMode):
    """Within it, new tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Do an operation on the contents of its arguments, and put what comes out where it belongs."""
    name, device = function._schema.name, kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    boxes = {id(t.content): t for t in tensors if isinstance(t, Box)}
    on_device = bool(boxes)
    if device is not None:
        on_device, kwargs = torch.device(device).type == DEVICE, {**kwargs, "device": "cpu"}
    elif name == "aten::copy_":
        on_device = isinstance(args[0], Box)
    elif boxes:
        together = tensors[:1] if name in INDEXING else tensors
        if any(t.dim() and not isinstance(t, Box) for t in together):
            raise RuntimeError(f"{name}: found tensors on two devices, {DEVICE} and cpu")
    with _disable_current_modes():
        results = function(*tree_map(unboxed, args), **tree_map(unboxed, kwargs))

    def boxed(value):
        if not on_device or not isinstance(value, torch.Tensor):
            return value
        return boxes[id(value)] if id(value) in boxes else Box(value)  # changed in place, or new

    return tree_map(boxed, results)


def unboxed(value):
    return value.content if isinstance(value, Box) else value


def install(script):
    """Have the project's code find such a GPU, and no other, in this process."""
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.gpu.get_amp_supported_dtype = lambda: []  # what autocast asks for, even where it is to be off
    # What torch does in C++, where a Box is not taken for what it is.
    make, write = torch.tensor, torch.save
    torch.tensor = lambda *args, device=None, **kwargs: make(*args, **kwargs).to(device or "cpu")
    torch.save = lambda state, *args: write(tree_map(unboxed, state), *args)
    torch.inference_mode = torch.no_grad

    sys.path.insert(0, str(Path(script).parent))
    from common import hardware
    from model import GPT

    def to(model, *args):
        torch.nn.Module.to(model, *args)
        # A Box cannot be put into a parameter that is there, so tied ones have become two.
        if model.config.tie_embeddings and type(model.lm_head) is torch.nn.Linear:
            model.lm_head.weight = model.wte.weight
        return model

    def choose(*args, **kwargs):
        return dataclasses.replace(on_cpu(*args, **kwargs), device=DEVICE, sdp_kernel="math")

    GPT.to, on_cpu, detect = to, hardware.resolve_compute, hardware.detect_machine
    hardware.resolve_compute, hardware.detect_machine = choose, lambda device="auto": detect("cpu")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    install(sys.argv[0])
    with Gpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
