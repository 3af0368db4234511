// Plots as plain SVG: a line for a tile, bars for a histogram, bars for a vector.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function titled(element, text) {
  const title = svg("title", {});
  title.textContent = text;
  element.append(title);
  return element;
}

/** A line over time; `values` may have gaps (null). */
function sparkline(values) {
  const shown = values.slice(-90).map((value) => value ?? 0);
  const plot = svg("svg", { viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" });
  if (shown.length < 2) return plot;
  const top = Math.max(...shown, 1e-12);
  const at = shown.map((value, i) => `${(100 * i / (shown.length - 1)).toFixed(2)},${(26 - 23 * value / top).toFixed(2)}`);
  plot.append(svg("path", { class: "spark-area", d: `M0,28 L${at.join(" L")} L100,28 Z` }));
  plot.append(svg("path", { class: "spark-line", d: `M${at.join(" L")}` }));
  return plot;
}

/** Bars of a histogram `width` pixels wide, one per bin and equally wide, with the edges' texts below some of them. */
function histogram(data, text, label, width) {
  const height = 150, low = 20, high = 14;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const bins = data.counts.length;
  const top = Math.max(...data.counts, 1);
  const step = width / bins;
  data.counts.forEach((count, i) => {
    const size = count ? Math.max((height - low - high) * count / top, 1.5) : 0;
    const bar = svg("rect", { x: i * step + 0.75, y: height - low - size, width: Math.max(step - 1.5, 1), height: size, rx: 1.5 });
    plot.append(titled(bar, `${text(data.edges[i])} to ${text(data.edges[i + 1])}: ${count.toLocaleString("en")} rows`));
  });
  plot.append(svg("line", { x1: 0, x2: width, y1: height - low + 0.5, y2: height - low + 0.5, class: "axis" }));
  const marks = bins < 4 ? [0, bins] : [0, Math.round(bins / 4), Math.round(bins / 2), Math.round(3 * bins / 4), bins];
  for (const mark of marks) {
    const anchor = mark === 0 ? "start" : mark === bins ? "end" : "middle";
    const note = svg("text", { x: mark * step, y: height - 5, "text-anchor": anchor });
    note.textContent = text(data.edges[mark]);
    plot.append(note);
  }
  const most = svg("text", { x: 0, y: 10 });
  most.textContent = `most: ${top.toLocaleString("en")}`;
  plot.append(most);
  return plot;
}

/** Bars up and down from zero. */
function vectorPlot(values, label) {
  const plot = svg("svg", { viewBox: `0 0 ${Math.max(values.length, 1)} 64`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  const finite = values.map((value) => (typeof value === "number" ? value : 0));
  const top = Math.max(...finite, 0), bottom = Math.min(...finite, 0);
  const span = Math.max(top - bottom, 1e-30);
  const zero = 2 + 60 * top / span;
  finite.forEach((value, i) => {
    const size = Math.max(60 * Math.abs(value) / span, value ? 0.6 : 0);
    plot.append(titled(svg("rect", {
      x: i + 0.08, y: value >= 0 ? zero - size : zero, width: 0.84, height: size, class: value >= 0 ? "bar-up" : "bar-down",
    }), `${i}: ${values[i]}`));
  });
  plot.append(svg("line", { x1: 0, x2: Math.max(values.length, 1), y1: zero, y2: zero, class: "axis" }));
  return plot;
}
