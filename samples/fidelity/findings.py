# SPDX-License-Identifier: Apache-2.0
"""What a person made of the tables, by model; Markdown."""

FINDINGS: dict[str, str] = {
    "cogvideox-tiny": """
What the prompt leaves open is decided by little: the strip's dense background is blue, and gray in
most sparse clips, whose circle is right. Such a pair has a low PSNR all over; medians of ten move
by several dB with one pair more or less.

- *mixed* and *centroid* were measured later at 0.25 and 0.125, with a profiler that has clusters
  and means among its candidates. The mix is 10.0 dB (standard error 1.4) above the best row of
  before at 0.25, the earlier mix, and 9.7 dB (1.6) at 0.125, svg2; and 1.4 dB (0.4) and 1.3 dB
  (1.0) above *centroid* alone. All four have 7 clips right, as dense has.
- At 0.5 the mix is the earlier one; *svg2* has the better median and worst pair there, and pair
  by pair the two are level (the mix is nearer in 5 of 10).
- *blade* and *xattention* choose anew at every call and come next at 0.5 and 0.25; blade has 8
  clips right at 0.25, where dense has 7.
- *sparse_vdit* is fifth at 0.5; at 0.125 bands and skipped heads are left, and nothing is seen.
- *sparsed* and *adaspa*: the search is one dense step of ten; at 0.125 one block a row is left to
  the others, both choose the same, and bands of the picture part, as for wan-tiny.
- *pooled* loses the object first (1 of 10 right at 0.25), as block means hide it.
- *svg*, *gna* and *radial* fix by geometry what heads may see; svg falls to 8.7 dB at 0.125, gna's
  window fills the background with the object's red.
- *rettention*: its refreshes are dense, so that 0.5 leaves little for the other steps; it tints
  the background.
""",
    "flux-tiny": """
One picture, one seed can decide a pair: the dense picture of the strip has no stripes, which its
prompt asks for, and many sparse ones paint some; that is a low PSNR, and no fault. So *right*
beside it: 6 of 10 dense, 3 to 8 at half of the pairs, with no order in ten.

- *mixed* and *centroid* were measured later at 0.25 and 0.125, with a profiler that has clusters
  and means among its candidates. The mix is 88 to 92 % *centroid*. It is 10.0 dB (standard error
  2.3) and 7.0 dB (2.2) above the best row of before, the earlier mix, and 2.1 dB (0.8) and 1.4
  dB (0.3) above *centroid* alone. It has 4 pictures right at both, fewer than *blade* at 0.25:
  near to one dense picture is not the same as good. At 0.5 the mix is the earlier one, and has
  the best median.
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
    "hunyuan-video-tiny": """
The model started from wan-tiny's weights: this is no evidence independent of wan-tiny's part.

- *mixed* and *centroid* were measured later at 0.25 and 0.125, with a profiler that has clusters
  and means among its candidates. The mix is 7.5 dB (standard error 1.9) above the best row of
  before at 0.25, the earlier mix, and 6.6 dB (0.7) at 0.125, svg2; and 1.6 dB (0.4) and 1.8 dB
  (0.8) above *centroid* alone. At 0.5 the mix is the earlier one, and has the best median, by
  more than 3 dB.
- *svg2*, *blade* and *xattention* choose anew at every call by content and lead the single methods
  at 0.25. Top-p rules are set on other prompts and come out within 0.02 here.
- *rettention* is third at 0.5, where its refreshes are 0.2 of all steps; it cannot go below 0.505.
- *sparse_vdit* is fifth at 0.5; at 0.125 it skips 36 % of the heads and leaves a red mist.
- *sparsed* and *adaspa*: the search is one dense step of ten; at 0.125 both choose the same one
  block a row, and bands of the clip part, as for wan-tiny.
- *pooled* is halfway; its circle has holes at 0.25.
- *radial*, *svg* and *gna* fix by geometry what heads may see and are last at 0.5; gna paints two
  objects at 0.25 and up to four at 0.125.

The strip's dense background is blue, which its prompt leaves open; most sparse ones are black.
Where that happens PSNR is low all over and the circle is as good: 4 of 10 right for most methods
at 0.5, 5 for dense.
""",
    "pixart-tiny": """
As for flux-tiny, one picture and one seed can decide a pair: the strip's dense picture lacks the
stripes that its prompt asks for, and most sparse ones paint some: a low PSNR, and no fault.
*right* has no order in ten pairs: gna is last by PSNR at 0.5 and has most pictures right, 8 where
dense has 5.

- *mixed* and *centroid* were measured later at 0.25 and 0.125, with a profiler that has clusters
  and means among its candidates. The mix is 88 to 93 % *centroid*. It is 13.7 dB (standard error
  1.8) and 14.1 dB (1.2) above the best row of before. **At 0.25 it is below *centroid* alone by
  1.7 dB (0.8)**; at 0.125 the two are level. At 0.5 the mix is the earlier one, and has the best
  median.
- *sparse_vdit* and *svg*, bands of neighbouring rows and columns, come second and third at 0.25,
  third and first at 0.125: a third to a half of this model's heads are skippable by the
  [atlas](../atlas.md), and what the others look for is near. (flux-tiny's heads are sharp, and
  the same patterns lose the picture there.) At 0.125 sparse_vdit skips 35 % and has 7 pictures
  right; it loses the stripes, not the object.
- *svg2* and *xattention* keep less than they were set to on other prompts (0.197 and 0.182 for
  0.25, xattention 0.085 for 0.125): top-p and thresholds follow the content. Their rows are not
  at equal density.
- *adaspa* and *sparsed* search on a dense step, one of ten: at 0.25 the others have 0.167, and
  rows of blocks part; at 0.125 one block a row, both choose the same, and nothing is seen.
- *blade* paints a second object from 0.25 on, white, then red: 1 of 10 right.
- *pooled* is halfway at all three; it shrinks the circle and draws stripes along rows of blocks.
- *gna* keeps the object, whose surroundings its window holds, and paints the background anew.
- *radial* and *rettention* cannot go below 0.444 and 0.556 on one frame: a band is a power of two,
  and refreshes are dense.
""",
    "wan-tiny": """
At 0.25 and 0.125 *mixed* and *centroid* were measured later than the other rows. The profiler
now screens its candidates, which include clusters and means, and a budget with means goes to the
clusters that their means would represent worst. The mix is 79 to 85 % *centroid*. At 0.25 it is
8.4 dB (standard error 1.0) above the mix that the profiler found before, which was the best row
by mean PSNR, and at 0.125 8.1 dB (0.8). It is above *centroid* alone, which needs no search, by
1.6 dB (0.6) and 1.2 dB (0.8). Both have 9 clips right at 0.25, where dense has 8. At 0.5 the mix
is still the one from before; it has the higher PSNR in at least 8 of 10 pairs against each
single method.

All of this is at equal density, **not at equal time**: clustering costs more on this CPU than it
saves at 2304 tokens. A search for time (`--target`, `--budget`) takes other methods
([profiler](../profiler.md)).

In the strip (of the earlier mix) the circle has a bite on the first frame at 0.25 and is no longer
round at 0.125; gna paints up to five objects, pooled fades, blade's circle breaks up. Why, as far
as the [atlas](../atlas.md) lets one guess:

- *svg2* and *blade* choose anew at every call by content, and come next at 0.5. svg2 has
  9 clips right at 0.25, where dense has 8; below 0.151 it cannot go (a cluster reads one cluster
  at least).
- *sparsed* and *adaspa* search exactly, but once, at the first step, where all is noise and heads
  look near; and the search is a dense step, one of ten. At 0.125 the nine others are left with
  0.028, one block a row: both then choose the same, and four bands of the picture, a row of blocks
  each, go their own ways. Of 50 steps a search would be a fiftieth.
- *rettention* is near by PSNR; its SSIM of 0.16 and 0.25 are of the clips over black, where a
  shift of the dark background counts in full.
- *xattention* has one threshold for all heads: sharp ones keep little, flat ones nearly all.
- *pooled* scores by block means, which blur the few tokens that sharp heads look for.
- *sparse_vdit* has one fixed pattern a head, which is enough at 0.5; at 0.125 it skips a third of
  the heads.
- *gna*, *svg* and *radial* fix by geometry what heads may see, and half of the heads look
  across the whole clip. With 4 blocks to a frame radial's bands have few widths to choose from.
""",
}
