"""The one place that imports DeepSpeed: late, because it takes seconds, and without its chatter."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from types import ModuleType
from typing import Any


def import_deepspeed() -> ModuleType:
    """Return the `deepspeed` package with its logger at WARNING, and with nothing left to compile at its start.

    DeepSpeed chooses its accelerator at import: where torch has no CUDA it is told so, since its own search
    prints warnings about every other kind.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    # A shared-memory all-reduce for inference, which nothing here calls. DeepSpeed would compile it at the first start
    # on a machine; a kill meanwhile leaves torch's lock file behind, and every later start would wait for it forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return deepspeed


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
