# SPDX-License-Identifier: Apache-2.0
"""The look of every page, and the parts that pages share. No script, no font, no network."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from dit_sparse.reading import visible

if TYPE_CHECKING:
    from jinja2 import Environment

CSS = """
:root { --ink:#17202b; --soft:#5b6876; --line:#dfe4ea; --page:#f4f6f8; --card:#fff;
  --good:#14804a; --good-bg:#e3f4ea; --bad:#b3261e; --bad-bg:#fbe6e4; --warn:#8a5300;
  --warn-bg:#fdf1dc; --accent:#2457c5; --accent-bg:#2457c51c; --worst:#d1371f; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaf0; --soft:#9aa7b5; --line:#2e3945;
  --page:#11161c; --card:#1a212a; --good:#5fd198; --good-bg:#143524; --bad:#ff9086;
  --bad-bg:#451c1a; --warn:#f0bd6a; --warn-bg:#3d2d10; --accent:#8ab0ff; --accent-bg:#8ab0ff26;
  --worst:#ff7a66; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif }
main { max-width:1080px; margin:0 auto; padding:28px 20px 60px }
h1 { font-size:25px; line-height:1.25; margin:2px 0 4px; overflow-wrap:anywhere }
h2 { font-size:17px; margin:0 0 12px }
.kicker { color:var(--soft); font-size:12.5px; letter-spacing:.06em; text-transform:uppercase }
.sub { color:var(--soft); overflow-wrap:anywhere }
.card { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:18px 20px; margin-top:18px }
.verdict { display:flex; gap:18px; align-items:center; padding:14px 20px; border-radius:12px;
  margin-top:18px; background:var(--card); border:1px solid var(--line) }
.verdict b { font-size:21px; white-space:nowrap }
.verdict ul { margin:0; padding:0; list-style:none }
.verdict.pass { background:var(--good-bg); border-color:var(--good) }
.verdict.pass b, .yes { color:var(--good) }
.verdict.fail { background:var(--bad-bg); border-color:var(--bad) }
.verdict.fail b, .no { color:var(--bad) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(220px,1fr)); gap:12px;
  margin-top:18px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:12px 16px }
.tile .name { color:var(--soft); font-size:12.5px }
.tile .value { font-size:25px; font-weight:650; font-variant-numeric:tabular-nums;
  line-height:1.3 }
.tile .value small { font-size:14px; font-weight:500; color:var(--soft) }
.tile .more { color:var(--soft); font-size:12.5px; font-variant-numeric:tabular-nums }
.note { background:var(--warn-bg); border-left:4px solid var(--warn); border-radius:6px;
  padding:9px 14px; margin-top:12px; overflow-wrap:anywhere }
video, .still { display:block; width:100%; height:auto; border-radius:8px; background:#000 }
.heads { display:grid; grid-template-columns:1fr 1fr; text-align:center; color:var(--soft);
  font-size:13px; margin-bottom:5px }
.pixel { image-rendering:pixelated }
details { margin-top:12px } summary { cursor:pointer; color:var(--accent) }
.small-video { max-width:540px; margin-top:10px }
svg { display:block; width:100%; height:auto; font:12px system-ui,"DejaVu Sans",sans-serif }
svg .grid { stroke:var(--line) } svg .axis { fill:var(--soft) }
svg .line { fill:none; stroke:var(--accent); stroke-width:2; stroke-linejoin:round }
svg .area { fill:var(--accent-bg) }
svg .median, svg .floor { stroke:var(--soft); stroke-dasharray:4 4 }
svg .worst { fill:var(--worst); stroke:var(--card); stroke-width:2 }
svg .mark { fill:var(--ink); paint-order:stroke; stroke:var(--card); stroke-width:4px }
svg .soft { fill:var(--soft) }
svg .front { fill:none; stroke:var(--accent); stroke-width:1.5; stroke-dasharray:1 4;
  stroke-linecap:round }
svg .bar { stroke:var(--accent); stroke-width:2; opacity:.5 }
svg .dot { fill:var(--accent); stroke:var(--card); stroke-width:2 }
svg .label { fill:var(--ink); font-weight:600; paint-order:stroke; stroke:var(--card);
  stroke-width:4px }
.curves { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
  gap:8px 26px } .curve h3 { font-size:14px; margin:0 0 2px; font-weight:600 }
.strip { display:grid; gap:6px; overflow-x:auto; align-items:center; font-size:12.5px }
.strip img { width:100%; display:block; border-radius:4px }
.strip .row { color:var(--soft) } .strip .top { color:var(--soft); align-self:end }
.scale { display:flex; align-items:center; gap:8px; color:var(--soft); font-size:12.5px;
  margin-top:10px; flex-wrap:wrap }
.scale i { display:inline-block; width:160px; height:11px; border-radius:3px;
  background:linear-gradient(90deg,#000004,#51127c,#b73779,#fc8961,#fcfdbf) }
.wide { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:14px }
th { text-align:left; color:var(--soft); font-weight:500; font-size:12.5px;
  border-bottom:1px solid var(--line); padding:5px 10px 5px 0; vertical-align:bottom }
td { border-bottom:1px solid var(--line); padding:7px 10px 7px 0; vertical-align:top }
tr:last-child td { border-bottom:0 }
.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.def { color:var(--soft); font-size:12.5px; min-width:260px } .off td { color:var(--soft) }
code, .mono { font:12.5px ui-monospace,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere }
dl { display:grid; grid-template-columns:minmax(120px,210px) 1fr; gap:5px 16px; margin:0 }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
.name-cell { white-space:nowrap; overflow-wrap:normal }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr)); gap:18px }
a { color:var(--accent) }
footer { color:var(--soft); font-size:12.5px; margin-top:24px }
@media print { .card { break-inside:avoid } }
"""

BASE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dit_sparse {{ version }}">
<title>{{ title }}</title><style>{{ css }}</style></head><body><main>
<header><div class="kicker">dit_sparse · {{ kind }}</div><h1>{{ title }}</h1>
{% for line in subtitle %}<div class="sub">{{ line }}</div>{% endfor %}</header>
{% if verdicts is not none %}
<div class="verdict {{ 'pass' if passed else ('fail' if passed is false else '') }}">
<b>{{ 'PASS' if passed else ('FAIL' if passed is false else 'No gates') }}</b>
<ul>{% for text, ok in verdicts %}<li><span class="{{ 'yes' if ok else 'no' }}">{{ '✓' if ok
  else '✗' }}</span> {{ text }}</li>
{% else %}<li class="sub">Nothing was asked of the numbers; a gate such as <code>psnr&gt;=25</code>
makes this page say pass or fail.</li>{% endfor %}</ul></div>{% endif %}
{% for note in notes %}<div class="note">{{ note }}</div>{% endfor %}
{% if tiles %}<div class="tiles">{% for tile in tiles %}<div class="tile">
<div class="name">{{ tile.name }}</div><div class="value">{{ tile.value }}
{% if tile.unit %}<small>{{ tile.unit }}</small>{% endif %}</div>
<div class="more">{{ tile.more }}</div></div>{% endfor %}</div>{% endif %}
{% block body %}{% endblock %}
<footer>Made by dit_sparse {{ version }}. Numbers of other papers follow other definitions:
compare only what the table defines alike.</footer>
</main></body></html>
"""

MACROS = """
{% macro facts(pairs) %}<dl>{% for name, value in pairs %}<dt>{{ name }}</dt>
<dd>{{ value }}</dd>{% endfor %}</dl>{% endmacro %}
{% macro player(video, pixelated) %}<video controls loop muted playsinline preload="auto"
 {% if pixelated %}class="pixel"{% endif %} width="{{ video.width }}"
 height="{{ video.height }}" src="{{ video.address }}"></video>{% endmacro %}
{% macro metrics(rows) %}<div class="wide"><table><thead><tr><th>metric</th>
<th class="n">value</th><th class="n">median</th><th class="n">worst frame</th>
<th class="n">spread</th><th>better</th><th>definition</th></tr></thead><tbody>
{% for row in rows %}<tr{% if row.reason %} class="off"{% endif %}>
<td class="mono name-cell">{{ row.name }}</td>
{% if row.reason %}<td colspan="5">{{ row.status }}: {{ row.reason }}</td>{% else %}
<td class="n"><b>{{ row.value }}</b>{% if row.unit %} {{ row.unit }}{% endif %}</td>
<td class="n">{{ row.median }}</td><td class="n">{{ row.worst }}</td>
<td class="n">{{ row.spread }}</td><td>{{ row.better }}</td>{% endif %}
<td class="def">{{ row.definition }}{% if row.source %}. <i>{{ row.source }}</i>{% endif %}
{% if row.own %}<br>{{ row.own }}{% endif %}</td></tr>{% endfor %}</tbody></table></div>
<p class="sub">Spread: the 90th percentile over frames less the 10th.</p>{% endmacro %}
"""


@cache
def environment() -> Environment:
    """Make the template engine: everything is escaped, an unknown name is an error."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    from dit_sparse.quality.report import comparison, evaluation

    pages = {
        "base.html": BASE,
        "macros.html": MACROS,
        "comparison.html": comparison.PAGE,
        "evaluation.html": evaluation.PAGE,
    }
    return Environment(
        loader=DictLoader(pages),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
