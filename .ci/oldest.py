# SPDX-License-Identifier: Apache-2.0
"""Print the oldest versions that pyproject.toml allows, as constraints for pip.

Reads the requirements of the installed dit-sparse, extras included: `name>=1.2` gives `name==1.2`,
and `name==1.2` gives itself.
A torch that is installed already stays: its oldest CPU build is not available everywhere.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

oldest = {}
for line in requires("dit-sparse") or ():
    requirement = line.split(";")[0]
    name = re.match(r"[\w.-]+", requirement).group()
    bound = re.search(r"[>=]=([\w.]+)", requirement)
    if bound is None:
        sys.exit(f"pyproject.toml: {line!r} has no lower bound; write {name}>=VERSION")
    if oldest.setdefault(name, bound.group(1)) != bound.group(1):
        sys.exit(f"pyproject.toml: {name} has two lower bounds; write one")

try:
    present = version("torch")
except PackageNotFoundError:  # pip installs the oldest, with CUDA
    present = oldest["torch"]
if not f"{present}.".startswith(f"{oldest['torch']}."):
    sys.stderr.write(f"torch {present} instead of {oldest['torch']}: it is tested with that\n")
oldest["torch"] = present

sys.stdout.writelines(f"{name}=={bound}\n" for name, bound in sorted(oldest.items()))
