"""Runs examples/deepspeed_zero3.py without the C++ that DeepSpeed would compile first on a CPU; gloo serves as well."""

import importlib
import os
import runpy
import sys
from pathlib import Path

sys.path.append(os.environ["LIGER_TEST_ENGINES"])
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
runpy.run_path(str(EXAMPLES / "deepspeed_zero3.py"), run_name="__main__")
