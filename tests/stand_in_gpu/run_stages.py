"""Runs stages in this process: `run_stages.py '[[config, stage], …]'`, configs as RunConfig takes them."""

import json
import sys

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.runner import run_stage

for values, stage in json.loads(sys.argv[1]):
    run_stage(RunConfig.model_validate(values), stage)
