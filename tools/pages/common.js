"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// Makes an element. Strings become text: nothing that a model wrote is ever read as HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") element.addEventListener("click", value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// A number that is not finite comes as null.
const number = (value) =>
  value === null ? "unknown" : value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
    : Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));

function ticksOf(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((n) => n * power).find((step) => step >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) ticks.push(i * size);
  return ticks;
}

// Draws lines over steps. series: [{name, color, points: [[step, value, low, high]]}], where the
// last two are an interval. marks: steps with a dot below the axis, and their colours.
function chart(title, series, { floor = 0, ceiling, marks = [] } = {}) {
  const width = 380, height = 190, left = 44, right = 8, top = 8, bottom = 22;
  series = series.filter((s) => s.points.length);
  const points = series.flatMap((s) => s.points);
  const legend = make("div", { class: "legend" });
  const box = make("div", { class: "chart" }, make("div", { class: "title" }, title), legend);
  if (!points.length) {
    legend.append("nothing was logged");
    return box;
  }
  const steps = points.map((p) => p[0]).concat(marks.map((m) => m[0]));
  const values = points.flatMap((p) => p.slice(1).filter((v) => typeof v === "number"));
  const first = steps.reduce((a, b) => Math.min(a, b)), last = steps.reduce((a, b) => Math.max(a, b));
  const low = values.reduce((a, b) => Math.min(a, b), floor);
  const largest = values.reduce((a, b) => Math.max(a, b), ceiling ?? low);
  const high = largest > low ? largest : low + 1;
  const x = (step) => left + (width - left - right) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => height - bottom - (height - top - bottom) * (value - low) / (high - low);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const tick of ticksOf(low, high, 4)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of last > first ? ticksOf(first, last, 5) : [first]) {
    if (Number.isInteger(tick)) svg.append(draw("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, tick));
  }
  for (const { color, points } of series) {
    const band = points.filter((p) => p.length > 3);
    if (band.length > 1) {
      const edge = [...band.map((p) => [p[0], p[2]]), ...band.reverse().map((p) => [p[0], p[3]])];
      const path = edge.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
      svg.append(draw("polygon", { points: path, fill: `var(--${color})`, opacity: 0.16 }));
    }
    const path = points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
    svg.append(draw("polyline", { points: path, fill: "none", stroke: `var(--${color})`, "stroke-width": 1.8 }));
    if (points.length < 40) {
      for (const [step, value] of points) {
        svg.append(draw("circle", { cx: x(step), cy: y(value), r: 2.4, fill: `var(--${color})` }));
      }
    }
  }
  for (const [step, color] of marks) {
    svg.append(draw("circle", { cx: x(step), cy: height - bottom + 4, r: 2.5, fill: `var(--${color})` }));
  }
  const cursor = draw("line", { class: "grid", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  const say = (step) => {
    const known = series.map((s) => s.points.findLast((p) => p[0] <= step)).filter(Boolean);
    const parts = [make("span", {}, `step ${Math.max(...known.map((p) => p[0]))}  `)];
    for (const s of series) {
      const found = s.points.findLast((p) => p[0] <= step);
      if (!found) continue;
      const interval = found.length > 3 ? ` [${number(found[2])}, ${number(found[3])}]` : "";
      parts.push(make("span", { style: `color: var(--${s.color})` }, `${s.name} ${number(found[1])}${interval}  `));
    }
    legend.replaceChildren(...parts);
  };
  svg.addEventListener("mousemove", (event) => {
    const place = svg.getBoundingClientRect();
    const part = ((event.clientX - place.left) / place.width * width - left) / (width - left - right);
    const step = Math.round(first + Math.min(1, Math.max(0, part)) * (last - first));
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    say(step);
  });
  svg.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); say(last); });
  say(last);
  box.append(svg);
  return box;
}

// Shows a sample: what student and teacher read, and each token as dark as the pull on it.
function showSample(sample) {
  const verdict = make("span", { class: sample.reward > 0.5 ? "good" : "bad" }, sample.reward > 0.5 ? "right" : "wrong");
  const box = make("div", {}, make("h3", {}, `Step ${sample.step}, a completion that is `, verdict));
  const pulls = sample.divergence ?? (Array.isArray(sample.advantage) ? sample.advantage : null);
  const tokens = sample.tokens ?? [];
  if (!pulls) {
    const why = sample.tokens === undefined ? "The run is of older code, which logged no tokens."
      : sample.advantage === null ? "This completion was not trained on."
        : `Reinforced with an advantage of ${number(sample.advantage)} at every token. No teacher re-scored it.`;
    box.append(make("p", { class: "faint small" }, why), make("div", { class: "box text mono" }, sample.completion));
  } else {
    const largest = Math.max(1e-9, ...pulls.map(Math.abs));
    const sum = pulls.reduce((a, b) => a + b, 0);
    const order = pulls.map((pull, i) => i).sort((a, b) => Math.abs(pulls[b]) - Math.abs(pulls[a]));
    const line = make("div", { class: "box tokens mono" });
    tokens.forEach((text, i) => {
      const hue = sample.divergence ? "--heat" : pulls[i] > 0 ? "--up" : "--down";
      const strength = Math.sqrt(Math.abs(pulls[i]) / largest) * 0.85;
      const style = `background: rgba(var(${hue}), ${strength.toFixed(3)})`;
      line.append(make("span", { style, title: `${pulls[i]} nats` }, text));
    });
    const what = sample.divergence ? "The teacher pulled" : "The advantages sum to";
    const half = Math.max(1, Math.ceil(pulls.length / 10));
    const share = order.slice(0, half).reduce((a, i) => a + Math.abs(pulls[i]), 0)
      / Math.max(1e-12, pulls.reduce((a, b) => a + Math.abs(b), 0));
    box.append(
      make("p", { class: "small faint" }, `${what} ${number(sum)} nats over ${pulls.length} tokens. `
        + `${half} of them carry ${Math.round(share * 100)}%. `,
      "0", make("span", { class: "scale", style: "background: linear-gradient(90deg, transparent, rgba(var(--heat), .85))" }),
      `${number(largest)} nats a token (colour: its square root)`),
      line);
    const strongest = order.slice(0, 6).map((i) => `${JSON.stringify(tokens[i])} ${number(pulls[i])}`);
    box.append(make("p", { class: "small" }, make("span", { class: "faint" }, "Strongest: "), strongest.join("   ")));
  }
  const told = new Set(sample.student_prompt.split("\n"));
  const reading = make("pre", {});
  for (const text of sample.teacher_prompt.split("\n")) {
    reading.append(make("span", { class: told.has(text) ? "faint" : "" }, text + "\n"));
  }
  if (!sample.teacher_prompt) {
    box.append(make("h3", {}, "What both had read"), make("pre", {}, sample.student_prompt));
  } else {
    box.append(make("h3", {}, "What the teacher had read (the student: the grey lines alone)"), reading);
  }
  for (const text of sample.further_prompts ?? []) {
    box.append(make("h3", {}, "What a further teacher had read"), make("pre", {}, text));
  }
  return box;
}
