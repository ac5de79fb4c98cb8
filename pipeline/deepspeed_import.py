"""The one place that imports DeepSpeed: late, because it takes seconds, and without its chatter."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def import_deepspeed(device: torch.device | None = None) -> ModuleType:
    """Return the `deepspeed` package with its logger at WARNING, and with nothing left to compile at its start.

    DeepSpeed moves every module to its accelerator, and left to itself takes a GPU wherever there is one, with warnings
    about all other kinds. So it is told which `device` this process works on: `engine.device: cpu` holds on a machine
    with a GPU too. None: DeepSpeed has been started before, or does nothing on a device.
    """
    import torch

    if device is not None:
        os.environ["DS_ACCELERATOR"] = device.type
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    if device is not None:
        _choose_accelerator(device.type)
    # A shared-memory all-reduce for inference, which nothing here calls. DeepSpeed would compile it at the first start
    # on a machine; a kill meanwhile leaves torch's lock file behind, and every later start would wait for it forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return deepspeed


def _choose_accelerator(device_type: str) -> None:
    """Where another library imported DeepSpeed first, or this process has worked on another device before."""
    from deepspeed.accelerator import real_accelerator

    chosen: Any = real_accelerator.get_accelerator()
    if chosen.device_name() != device_type:
        real_accelerator.ds_accelerator = None
        real_accelerator.get_accelerator()  # chosen by DS_ACCELERATOR


def _import_uncompiled(name: str) -> None:
    """Import a module whose functions DeepSpeed decorates with torch.compile, and nothing here calls.

    The decorator brings the whole compiler, a second of every start, as soon as ZeRO asks whether the optimizer is that
    one. In another version of DeepSpeed this may find nothing to do.
    """
    with contextlib.suppress(ImportError, AttributeError):
        compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
        original, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
        try:
            importlib.import_module(name)
        finally:
            compiler.compile = original
