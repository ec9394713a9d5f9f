# SPDX-License-Identifier: Apache-2.0
"""What a person made of the figures, by model; Markdown."""

FINDINGS: dict[str, str] = {
    "cogvideox-tiny": """
Layers 1 to 4 each have a head that attends to its own position in all frames and has 0.8 to 0.9
of its mass in a quarter of the blocks, on all steps. Layer 0's heads 2 and 3 are as sharp early
and attend elsewhere. Heads that are sharp but not local become less sharp: layer 4's head 0
falls from 0.73 to 0.54, layer 3's heads 2 and 3 from 0.58 and 0.65 to 0.48 and 0.53. The last
layer is flat throughout. A choice made at the first step is too optimistic for such heads at the
last one.
""",
    "flux-tiny": """
This model is the sharpest of the five: heads have two thirds of their mass in a quarter of the
blocks, and hardly any head is diffuse. Image queries give little mass to the text (0.96 to 0.98
of the mass is on the image; 0.82 would be even). The maps of a sharp and of a skippable head are
a narrow and a wide band of the rows around the query's own: 48 tokens per row are less than a
block. Ten of 24 heads are skippable. Most of them are also sharp, but their output is still
close to the mean value.
""",
    "hunyuan-video-tiny": """
Training started from wan-tiny's weights, and the sharpest heads are the same as in wan-tiny:
layer 1's heads 0 and 1, layer 2's 1 and 2, layer 4's 2. With text in the sequence, the others
became sharper than in wan-tiny (the lowest head has 0.38 to 0.42, in wan-tiny 0.28 to 0.33).
Heads hardly change over the steps; layer 5 is skippable at the first step but not at the last.
""",
    "pixart-tiny": """
Layers 1 and 2 contain the structure: four heads have 0.8 to 0.99 of their mass in a quarter of
the blocks on every step. Layers 4 and 5 are nearly flat. Half of all heads are skippable at the
first step and a third at the last: their mean value does half of the work. Attention is sharpest
in the middle of the run. With random weights, every head is uniform and therefore "skippable".
""",
    "wan-tiny": """
Layers 1 and 2 contain most of the structure: four of their eight heads attend to their own
position in all frames and have over 0.9 of their mass in a quarter of the blocks, as do layer
0's head 0 and layer 4's head 2, which is as sharp but attends elsewhere. These six can drop
three blocks in four at little cost; about half of all heads stay below 0.45 and cannot. No head
is a vertical stripe. Layer 3 has structure early (0.55 to 0.69 at step 0) and loses it in three
of its four heads by the last step. A choice made at the first step is therefore too optimistic
later for some heads and too conservative for others. With random weights, every head is flat
(0.26 to 0.28): all choices of blocks are equally good there and show nothing about quality.
""",
}
