"""Makes `import hedgehog` mean the checkout that this folder lies in: import it before anything of `hedgehog`.

So a benchmark measures the files beside it and runs where nothing of the project is installed.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

# or else torch's profiler, which counts a CPU's memory, writes lines of its own between ours
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if "hedgehog" not in sys.modules:  # tests have theirs already
    _spec = ModuleSpec("hedgehog", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parents[1])]
    sys.modules["hedgehog"] = module_from_spec(_spec)
