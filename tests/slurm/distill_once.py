"""`python distill_once.py FOLDER`: stage one of micro.yaml there, in a process whose imports have been made already."""

import os
import sys

from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.runner import run_stage

os.chdir(sys.argv[1])
run_stage(load_config("micro.yaml"), "distill")
