# SPDX-License-Identifier: Apache-2.0
"""What a person made of the figures, by model; Markdown."""

FINDINGS: dict[str, str] = {
    "cogvideox-tiny": """
Layers 1 to 4 each have a head that looks at its own place in all frames and finds 0.8 to 0.9 of
its mass in a quarter of the blocks, on all steps. Layer 0's heads 2 and 3 are as sharp early and
look elsewhere. What is sharp without being local wears off: layer 4's head 0 falls from 0.73 to
0.54, layer 3's heads 2 and 3 from 0.58 and 0.65 to 0.48 and 0.53. The last layer is flat
throughout. A choice made at the first step is too optimistic for such heads at the last one.
""",
    "flux-tiny": """
The sharpest of the five: heads find two thirds of their mass in a quarter of the blocks, and
hardly any is diffuse. Queries of the picture give the text little (0.96 to 0.98 of the mass is on
the picture, 0.82 would be even). The maps of a sharp and of a skippable head are bands of the rows
around the query's own, narrow and wide: 48 tokens a row are less than a block. Ten of 24 heads are
skippable, most of them sharp as well: what they gather is near the mean value all the same.
""",
    "hunyuan-video-tiny": """
It started from wan-tiny's weights, and its sharpest heads stand where wan-tiny's do: layer 1's
heads 0 and 1, layer 2's 1 and 2, layer 4's 2. The others became sharper than wan-tiny's beside
text (the least of all heads has 0.38 to 0.42, wan-tiny's 0.28 to 0.33). Heads hardly move over
the steps; layer 5, skippable at the first step, is not at the last.
""",
    "pixart-tiny": """
Layers 1 and 2 hold the structure: four heads find 0.8 to 0.99 of their mass in a quarter of the
blocks on every step. Layers 4 and 5 are nearly flat, and half of all heads are skippable at the
first step, a third at the last: their mean value does half of the work. It is sharpest in the
middle of the run. With random weights every head is uniform, and so "skippable".
""",
    "wan-tiny": """
Layers 1 and 2 hold most of the structure: four of their eight heads look at their own place in
all frames and find over 0.9 of their mass in a quarter of the blocks, as do layer 0's head 0 and
layer 4's head 2, which is as sharp but looks elsewhere. These six can drop three blocks in four
at little cost; about half of all heads stay below 0.45 and cannot. No head is a vertical stripe.
Layer 3 has structure early (0.55 to 0.69 at step 0) and loses it in three of its four heads by
the last step, so a choice made at the first step is too optimistic later for some heads and too
careful for others. With random weights every head is flat (0.26 to 0.28): any choice of blocks is
as good as any other there, and nothing about quality can be learnt from it.
""",
}
