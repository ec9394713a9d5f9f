(function () {
const D = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg", $ = id => document.getElementById(id);
const heads = D.heads, layers = D.layers, bands = D.bands.length, perBand = heads * layers;
let quantity = D.choices.length ? -1 : 0, chosen = 0;
const rects = [];
const make = (tag, attrs, parent, text) => {
  const e = document.createElement(tag);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.appendChild(e);
  return e;
};
const svg = (tag, attrs, parent) => {
  const e = document.createElementNS(NS, tag);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  if (parent) parent.appendChild(e);
  return e;
};
const number = (v, share) => v === null || v === undefined ? "not known"
  : share ? (100 * v).toFixed(1) + " %" : v.toPrecision(3);
const place = i => {
  const head = i % heads, layer = Math.floor(i / heads) % layers;
  const band = Math.floor(i / perBand) % bands, stage = Math.floor(i / perBand / bands);
  return {head, layer, band, stage};
};
const said = i => {
  const p = place(i);
  return (D.stages.length > 1 ? D.stages[p.stage] + ", " : "") + "layer " + p.layer + ", head "
    + p.head + ", " + D.bands[p.band];
};
const mix = (stops, t) => {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2), f = at - i;
  return "rgb(" + stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * f)).join() + ")";
};
const ramp = q => D.ramps[q.good || "none"];
const colour = i => {
  if (quantity < 0) return D.colours[D.choices[D.choice_of[i]].method];
  const q = D.quantities[quantity], v = q.values[i];
  return v === null ? "url(#unknown)" : mix(ramp(q), v / q.top);
};
function legend() {
  const box = $("legend");
  box.textContent = "";
  if (quantity < 0) {
    const count = {};
    D.choice_of.forEach((c, i) => {
      const m = D.choices[c].method;
      count[m] = (count[m] || 0) + D.lengths[place(i).band];
    });
    const all = Object.values(count).reduce((a, b) => a + b, 0);
    Object.keys(count).sort((a, b) => count[b] - count[a]).forEach(m => {
      const s = make("span", {}, box);
      make("i", {style: "background:" + D.colours[m]}, s);
      s.append(m + " " + (100 * count[m] / all).toFixed(1) + " % of head-steps");
    });
    return;
  }
  const q = D.quantities[quantity], stops = ramp(q);
  const s = make("span", {}, box, "0 ");
  make("i", {class: "ramp", style: "margin:0 6px;background:linear-gradient(90deg,"
    + stops.map(c => "rgb(" + c.join() + ")").join() + ")"}, s);
  s.append(number(q.top, q.share));
  const missing = q.values.filter(v => v === null).length;
  if (missing) {
    const u = make("span", {}, box);
    make("i", {class: "unknown"}, u);
    u.append("not known (" + missing + " of " + q.values.length + ")");
  }
  make("span", {}, box, q.note);
}
function paint() {
  rects.forEach((r, i) => r.setAttribute("fill", colour(i)));
  document.querySelectorAll("#pick button").forEach((b, i) =>
    b.setAttribute("aria-pressed", String(i + (D.choices.length ? -1 : 0) === quantity)));
  legend();
}
function image(box, pic, caption, width) {
  if (pic === null || pic === undefined) return;
  const f = make("figure", {}, box);
  const im = make("img", {src: D.pictures[pic], alt: caption}, f);
  im.addEventListener("load", () => {
    const scale = Math.max(1, Math.floor(width / im.naturalWidth));
    im.style.width = im.naturalWidth * scale + "px";
  });
  make("figcaption", {}, f, caption);
}
function show(i) {
  if (rects[chosen]) rects[chosen].classList.remove("on");
  chosen = i;
  rects[i].classList.add("on");
  const box = $("spot");
  box.textContent = "";
  make("h2", {}, box, said(i));
  const c = D.choices.length ? D.choices[D.choice_of[i]] : null;
  if (c) make("p", {class: "mono"}, box, c.text);
  const list = make("dl", {}, box);
  D.quantities.forEach(q => {
    make("dt", {}, list, q.name);
    make("dd", {}, list, number(q.values[i], q.share));
  });
  const shots = make("div", {class: "shots"}, box);
  const ran = i in D.kept;
  image(shots, D.attention[i], "attention map: softmax mass, rows are queries, columns are keys, "
    + "in the model's order; dense calibration run, middle of the band", 288);
  if (c) {
    const what = ran ? "as it ran, middle of the band" : c.why;
    image(shots, ran ? D.kept[i] : c.kept, "kept pairs, rows are queries, columns are keys; "
      + what, 288);
    image(shots, ran ? D.seen[i] : c.seen, "keys that the middle token attends to, by frame", 640);
    if (!ran && c.kept === null) make("p", {class: "sub"}, shots, "Kept blocks: " + c.why + ".");
  }
  if (!(i in D.attention)) make("p", {class: "sub"}, shots, D.no_attention);
  table(box, i, c);
}
function table(box, i, c) {
  const t = D.candidates;
  if (!t || !t.columns.error[i].length) {
    if (c) make("p", {class: "sub"}, box, "Other candidates: there are no measurements next to "
      + "the file, so their results for this head are unknown.");
    return;
  }
  make("h2", {style: "margin-top:14px"}, box, "Candidates measured here");
  const wide = make("div", {class: "wide"}, box), tab = make("table", {}, wide);
  const head = make("tr", {}, make("thead", {}, tab));
  ["candidate", "error", "density", "recall", "time / dense"].forEach((h, k) =>
    make("th", k ? {class: "n"} : {}, head, h));
  const body = make("tbody", {}, tab);
  t.names.map((n, k) => k).sort((a, b) => t.columns.time[i][a] - t.columns.time[i][b])
    .forEach(k => {
      const row = make("tr", c && c.name === t.names[k] ? {class: "chosen"} : {}, body);
      make("td", {class: "mono"}, row, t.names[k]);
      ["error", "density", "recall", "time"].forEach(f => {
        const v = t.columns[f][i][k];
        make("td", {class: "n"}, row, v === null ? "not known" : v > 1e5 ? "not seen"
          : v.toFixed(3));
      });
    });
}
function build() {
  const pick = $("pick");
  const names = D.quantities.map(q => q.name);
  if (D.choices.length) names.unshift("method");
  names.forEach((n, k) => make("button", {type: "button"}, pick, n).addEventListener("click",
    () => { quantity = k - (D.choices.length ? 1 : 0); paint(); }));
  const size = Math.max(7, Math.min(26, Math.floor(300 / Math.max(heads, layers * 0.6))));
  const left = 26, top = 16, maps = $("maps");
  D.stages.forEach((stage, s) => D.bands.forEach((band, b) => {
    const box = make("div", {class: "map"}, maps);
    make("h3", {}, box, (D.stages.length > 1 ? stage + ", " : "") + band);
    const w = left + heads * size + 4, h = top + layers * size + 4;
    const el = svg("svg", {width: w, height: h, viewBox: "0 0 " + w + " " + h, role: "img",
      "aria-label": "layers down, heads across", tabindex: "0"}, box);
    if (!s && !b) {
      const p = svg("pattern", {id: "unknown", width: 5, height: 5,
        patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"}, svg("defs", {}, el));
      svg("rect", {width: 5, height: 5, fill: "#fff"}, p);
      svg("rect", {width: 2, height: 5, fill: "#c9ced6"}, p);
    }
    for (let x = 0; x < heads; x++)
      if (size >= 16 || x % (size >= 12 ? 2 : 8) === 0)
        svg("text", {x: left + (x + 0.5) * size, y: top - 4, class: "axis",
          "text-anchor": "middle"}, el).textContent = x;
    for (let y = 0; y < layers; y++) {
      if (size >= 12 || y % 5 === 0) svg("text", {x: left - 5, y: top + (y + 0.5) * size + 4,
        class: "axis", "text-anchor": "end"}, el).textContent = y;
      for (let x = 0; x < heads; x++) {
        const i = ((s * bands + b) * layers + y) * heads + x;
        rects[i] = svg("rect", {x: left + x * size, y: top + y * size, width: size - 1,
          height: size - 1, rx: 1.5, "data-i": i}, el);
      }
    }
  }));
  maps.addEventListener("click", e => {
    if (e.target.dataset && e.target.dataset.i !== undefined) show(+e.target.dataset.i);
  });
  maps.addEventListener("mouseover", e => {
    const i = e.target.dataset && e.target.dataset.i;
    if (i === undefined || e.target.firstChild) return;
    const c = D.choices.length ? ": " + D.choices[D.choice_of[i]].name : "";
    svg("title", {}, e.target).textContent = said(+i) + c;
  });
  maps.addEventListener("keydown", e => {
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads}[e.key];
    if (!step || !rects[chosen + step]) return;
    e.preventDefault();
    show(chosen + step);
  });
}
build();
const named = D.quantities.findIndex(q => q.name === decodeURIComponent(location.hash.slice(1)));
if (named >= 0) quantity = named;
paint();
show(Math.max(0, D.choice_of.findIndex(c => D.choices[c].method !== "dense")));
})();
