"""Prints the requirements of an installed distribution but for those named: NAME [LEFT_OUT …]."""

import re
import sys
from importlib.metadata import requires

for line in requires(sys.argv[1]) or ():
    if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in sys.argv[2:]:
        print(line)
