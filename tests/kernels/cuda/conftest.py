"""The kernels as g++ builds them for this CPU; skipped, with the reason, where there is no g++."""

from __future__ import annotations

import platform
import shutil
import sys
import zlib

import pytest

GXX_MISSING = (
    None
    if shutil.which("g++") and sys.platform == "linux"
    else f"the emulation needs g++ on Linux; this is {platform.system()}, g++: {shutil.which('g++')}"
)


@pytest.fixture(autouse=True)
def emulation(request: pytest.FixtureRequest):
    """The emulated library, fibers seeded by the test's name; `HEDGEHOG_EMULATION_SEED` adds to it."""
    if GXX_MISSING:
        pytest.skip(GXX_MISSING)
    import os

    from hedgehog.kernels.cuda.library import emulated_library

    library = emulated_library()
    seed = zlib.crc32(request.node.name.encode()) + int(os.environ.get("HEDGEHOG_EMULATION_SEED", "0"))
    print(f"emulation seed {seed}")  # pytest shows it with a failure
    library.seed_emulation(seed)
    return library
