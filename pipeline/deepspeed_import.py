"""The one place that imports DeepSpeed: late, because it takes seconds, and without its chatter."""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType


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
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return deepspeed
