# SPDX-License-Identifier: Apache-2.0
"""``python -m dit_sparse`` is ``dit-sparse``."""

from dit_sparse.cli import main

if __name__ == "__main__":
    main()
