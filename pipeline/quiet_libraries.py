"""What other packages would say on the terminal, and nobody can use."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Leave the terminal to our own progress: no bar per weight file, no deprecation notes between libraries."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read at import, by transformers too
    if "transformers" in sys.modules:  # not imported for this: a stage that reads no model need not wait for it
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # on a CPU with AVX512-BF16 it asks at import for an operator that `load_base` keeps NF4 weights from
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # int8 weights: for every layer and token, that its input goes through float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
