# SPDX-License-Identifier: Apache-2.0
"""What a person made of the tables, by model; Markdown."""

FINDINGS: dict[str, str] = {
    "flux-tiny": """
One picture, one seed can decide a pair: the dense picture of the strip has no stripes, which its
prompt asks for, and many sparse ones paint some; that is a low PSNR, and no fault. So *right*
beside it: 6 of 10 dense, 3 to 8 at half of the pairs, with no order in ten.

- *mixed* has the best median at all three densities. *blade* is nearer in 6 of 10 pairs at 0.25,
  and has more pictures right at all three: near to one dense picture is not the same as good.
- *sparsed* and *adaspa* come second and seventh at 0.5, last at 0.125: both search on a dense
  step, which is one of ten here. At 0.125 the nine others are left with 0.028, one block a row;
  both then choose the same blocks, and rows of blocks no longer see each other (the strip's torn
  lines). Of 50 steps a search would be a fiftieth.
- *svg2* and *xattention* keep less here than they were set to on other prompts (0.617 and 0.649
  for 0.665): top-p and thresholds follow the content. Their rows are not quite at equal density.
- *sparse_vdit* and *svg*: an image's rows stand for frames, so their bands are neighbouring rows
  and columns; a second object far off is not in them. At 0.125 sparse_vdit skips over a third
  of the heads and leaves the others such bands: no picture is right.
- *pooled* blurs what sharp heads look for, as for wan-tiny.
- *gna* and *radial* see a window around each token: objects are painted twice (the strip's gna).
  gna loses little from 0.5 to 0.125: it keeps the nearest, which count most, and at 0.5 it
  already lacks what it lacks at 0.125.
- *radial*, *rettention*, *svg2*: bands that are powers of two, dense refreshes, and one cluster a
  cluster at least; the lines under the tables say what they come to.
""",
    "wan-tiny": """
Pair by pair, the mix has a higher PSNR than each single method in at least 9 of the 10 pairs
(the difference's median is 4.0 dB against blade and 4.2 against svg2), and better SSIM and
LPIPS in at least 7 of 10 against blade, 8 of 10 against every other. Two pairs turn against it:
the red circle with seed 1001 has 21.8 dB, where svg2 has 25.1 and four others 22 to 25; the
blue square with seed 1000 has 29.9, where blade has 31.9. All of this is at equal density,
**not at equal time**: much of the mix is svg2, whose clustering costs more on this CPU than it
saves at 2304 tokens. A search for time (`--target`, `--budget`) takes other methods
([profiler](../profiler.md)).

Clips of one prompt (the blue square, seed 1000) were looked at side by side: the mix cannot be
told from dense at a glance, svg2's square loses corners, rettention's background turns from
dark gray to black, pooled loses the square by the end, radial shows two of them. Why, as far as
the [atlas](../atlas.md) lets one guess:

- *svg2* and *blade* choose anew at every call by content, and come next.
- *sparsed* and *adaspa* search exactly, but once, at the first step; some heads move later.
- *rettention* is near by PSNR; its SSIM of 0.16 and 0.25 are of the clips over black, where a
  shift of the dark background counts in full.
- *xattention* has one threshold for all heads: sharp ones keep little, flat ones nearly all.
- *pooled* scores by block means, which blur the few tokens that sharp heads look for.
- *sparse_vdit* (an older run: its lambda bisected with epsilon at 1, bands alone to choose from,
  as in the mix) has bands only; the diffuse heads, half of all, fit none of them.
- *gna*, *svg* and *radial* fix by geometry what heads may see, and half of the heads look
  across the whole clip. With 4 blocks to a frame radial's bands have few widths to choose from.
""",
}
