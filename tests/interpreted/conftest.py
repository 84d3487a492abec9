"""What needs Triton's interpreter, which a process has from its start or not at all: `tests/test_triton.py` runs it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
