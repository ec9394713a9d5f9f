# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse`` as a script, for ``tests.parallel.launch``."""

from dit_sparse.cli import main

if __name__ == "__main__":
    main()
