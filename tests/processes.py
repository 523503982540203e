"""What a process that a test starts needs in order to find the helpers of these tests."""

import os
from pathlib import Path

TESTS = str(Path(__file__).parent)
PYTHONPATH = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), TESTS]))
