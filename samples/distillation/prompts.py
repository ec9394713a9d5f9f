# SPDX-License-Identifier: Apache-2.0
"""Write the prompts to distil on: captions of combinations that the small model was trained on.

python samples/distillation/prompts.py > samples/distillation/prompts.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from data import full_caption, sample, short_caption

SEED = 600  # another than those that trained and tested the model (see samples/train/README.md)
COUNT = 240


def main() -> None:
    """Write one prompt a line, long and short forms by turns, none twice."""
    seen: set[str] = set()
    number = 0
    while len(seen) < COUNT:
        write = full_caption if number % 2 else short_caption
        caption = write(sample(number, held_out=False, seed=SEED))
        number += 1
        if caption not in seen:
            seen.add(caption)
            print(caption)


if __name__ == "__main__":
    main()
