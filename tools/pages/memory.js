// Rows come as lists, in the order of show_memory.py: ITEM and PROBLEM.
const items = data.items.map(([id, kind, problem, title, text, feedback, sources, born, ended, policy, shortcuts]) =>
  ({ id, kind: data.kinds[kind], problem, title, text, feedback, sources, born, ended: ended ?? Infinity, policy, shortcuts }));
const problems = data.problems.map(([id, text, cluster]) => ({ id, text, cluster, items: [], visits: [] }));
const bank = [], itemOf = new Map(items.map((item) => [item.id, item])), problemOf = new Map(problems.map((p) => [p.id, p]));
for (const item of items) (item.problem < 0 ? bank : problems[item.problem].items).push(item);
for (const [problem, step, right, all, offered] of data.visits) problems[problem].visits.push({ step, right, all, offered });
for (const p of problems) p.samples = data.samples.filter((sample) => sample.problem === p.id);

let now = data.last, since = Math.max(0, data.last - Math.ceil(data.last / 8)), words = "", chosen = null, shownProblems = problems;
const BANK = "/bank";  // its place in the address: in that of a problem a / is written %2F
const ROW = 50;  // height of a row of the list, as in style.css
const lives = (item, step) => item.born <= step && step < item.ended;
const isNew = (item) => item.born > since && lives(item, now);
const isGone = (item) => lives(item, since) && item.ended <= now;
const isInsight = (item) => item.kind === "strategy" || item.kind === "lesson";
const holds = (item) => `${item.title ?? ""} ${item.text} ${item.feedback ?? ""}`.toLowerCase().includes(words);

// A text in which what is searched for is marked.
function marked(text) {
  const parts = make("span", {});
  let from = 0, place;
  while (words && (place = text.toLowerCase().indexOf(words, from)) >= 0) {
    parts.append(text.slice(from, place), make("mark", {}, text.slice(place, place + words.length)));
    from = place + words.length;
  }
  parts.append(text.slice(from));
  return parts;
}

function solvedOf(problem) {
  let right = 0, all = 0;
  for (const visit of problem.visits) if (visit.step <= now) { right += visit.right; all += visit.all; }
  return [right, all];
}

const ORDERS = {
  changed: (p) => -p.items.filter((item) => isNew(item) || isGone(item)).length,
  insight: (p) => -p.items.filter((item) => isInsight(item) && lives(item, now)).length,
  unsolved: (p) => { const [right, all] = solvedOf(p); return all ? right / all : 2; },
};

function list() {
  shownProblems = words
    ? problems.filter((p) => (p.id + " " + p.text).toLowerCase().includes(words) || p.items.some(holds)) : problems;
  const key = ORDERS[at("order").value];
  if (key) {
    const keys = new Map(shownProblems.map((p) => [p, key(p)]));
    shownProblems = [...shownProblems].sort((a, b) => keys.get(a) - keys.get(b));
  }
  at("spacer").style.height = `${shownProblems.length * ROW}px`;
  at("count").textContent = `${shownProblems.length} of ${problems.length} problems`
    + (words ? `, and ${bank.filter(holds).length} of ${bank.length} behaviors hold it` : "");
  paint();
}

// Makes only the rows of the list that can be seen.
function paint() {
  const box = at("list"), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 5);
  const rows = shownProblems.slice(first, first + Math.ceil(box.clientHeight / ROW) + 10).map((p, i) => {
    const [right, all] = solvedOf(p), living = p.items.filter((item) => lives(item, now) && isInsight(item)).length;
    const born = p.items.filter(isNew).length, ended = p.items.filter(isGone).length;
    return make("div", {
      class: "row" + (p === chosen ? " chosen" : ""), style: `position: absolute; left: 0; right: 0; top: ${(first + i) * ROW}px`,
      click: () => { location.hash = encodeURIComponent(p.id); },
    }, make("div", {}, p.id), make("div", { class: "faint" }, `${right}/${all} right, ${living} insights `,
      make("span", { class: "good" }, born ? `+${born} ` : ""), make("span", { class: "bad" }, ended ? `−${ended}` : "")));
  });
  box.replaceChildren(at("spacer"), ...rows);
}

const link = (problem) => make("a", { href: "#" + encodeURIComponent(problem.id) }, problem.id);

// Where an item came from: an attempt's rollout, an insight's attempts, a behavior's problems.
function origin(item) {
  if (item.kind === "success" || item.kind === "failure") return make("span", {}, `rollout ${item.sources.join(", ")}`);
  const box = make("span", {}, "from ");
  for (const source of item.sources) {
    const attempt = itemOf.get(source), problem = problemOf.get(source);
    if (problem) box.append(link(problem), " ");
    else if (attempt) box.append(make("span", { title: attempt.text }, `${attempt.kind} ${attempt.sources.join()} `));
  }
  return item.sources.length ? box : make("span", {}, "from nothing that is named");
}

// What was born, in the place of an item, in the step that ended it.
function successors(item, all) {
  const born = all.filter((other) => other.kind === item.kind && other.born === item.ended && other !== item);
  const same = born.filter((other) => item.kind === "behavior" && other.title === item.title);
  if (same.length) return ["rewritten as", same];
  return born.length && item.kind !== "behavior" ? ["as there came", born] : ["removed, refused by a later attempt, or forgotten", []];
}

function showItem(item, all) {
  const gone = item.ended <= now;
  const head = `step ${item.born}${gone ? ` to ${item.ended}` : ""}  ${item.kind}`;
  const box = make("div", { class: "item" + (isNew(item) ? " born" : gone ? " ended" : "") },
    make("div", { class: "faint small" }, head + "  ", origin(item), item.shortcuts ? `  shortcut: ${item.shortcuts}` : ""),
    make("div", { class: "what text" }, item.title ? make("b", {}, marked(item.title), ": ") : null, marked(item.text)));
  if (item.feedback) box.append(make("div", { class: "faint small text" }, "feedback: ", marked(item.feedback)));
  if (gone) {
    const [why, others] = successors(item, all);
    box.append(make("div", { class: "small" }, make("span", { class: "bad" }, `${why} `),
      others.map((other) => `${other.title ? other.title + ": " : ""}${other.text}`).join("   |   ").slice(0, 400)));
  }
  return box;
}

function section(title, all, empty) {
  const shown = all.filter((item) => lives(item, now) || isGone(item));
  const ended = all.filter((item) => item.ended <= since).length;
  const box = make("div", {}, make("h3", {}, `${title}: ${shown.filter((item) => lives(item, now)).length}`));
  box.append(...shown.slice(0, 300).map((item) => showItem(item, all)));
  if (shown.length > 300) box.append(make("p", { class: "faint small" }, `and ${shown.length - 300} more: search for them`));
  if (!shown.length) box.append(make("p", { class: "faint small" }, empty));
  if (ended) box.append(make("p", { class: "faint small" }, `${ended} more ended by step ${since}: move the second slider to see them.`));
  return box;
}

function story(p) {
  const [right, all] = solvedOf(p);
  const visits = p.visits.map(({ step, right, all }) => [step, right / all]);
  const living = (kind) => [...new Set([...p.visits.map((v) => v.step), ...p.items.map((i) => i.born), data.last])].sort((a, b) => a - b)
    .flatMap((step) => [step - 1, step])  // a count jumps within a step
    .map((step) => [step, p.items.filter((item) => item.kind === kind && lives(item, step)).length]);
  const box = make("div", {}, make("h2", { style: "margin-top: 0" }, p.id), make("pre", {}, marked(p.text)),
    make("p", { class: "small faint" }, `${right} of ${all} attempts right by step ${now}; cluster ${p.cluster}`),
    make("div", { class: "charts" },
      chart("Its attempts that are right", [{ name: "share", color: "blue", points: visits }], { ceiling: 1 }),
      chart("Its insights", [{ name: "strategies", color: "green", points: living("strategy") },
        { name: "lessons", color: "red", points: living("lesson") }])));
  box.append(
    section("Insights", p.items.filter(isInsight), "none yet"),
    section("Attempts that are kept", p.items.filter((item) => !isInsight(item)), "none yet"));
  const visit = p.visits.findLast((v) => v.step <= now);
  box.append(make("h3", {}, "Behaviors that its teacher was offered"
    + (visit ? ` at step ${visit.step}` : "")));
  const offered = (visit?.offered ?? []).map((id) => itemOf.get(id));
  box.append(...offered.map((item) => showItem(item, bank)));
  if (!offered.length) box.append(make("p", { class: "faint small" }, "none"));
  if (visit) {
    box.append(make("h3", {}, `What the teacher of a failed attempt was offered at step ${visit.step}, beside its feedback`),
      make("pre", {}, recomposed(p, visit)));
  }
  box.append(make("h3", {}, `What its teachers had read, in the samples that were kept: ${p.samples.length}`));
  if (!p.samples.length) box.append(make("p", { class: "faint small" }, "No sample of this problem was kept. A run with --log_every 1 keeps one of every step."));
  for (const sample of p.samples) box.append(showSample(sample));
  return box;
}

// The teacher's prompt as memory.compose writes it, from what lived at the end of a step.
function recomposed(p, visit) {
  const of = (kind) => p.items.filter((item) => item.kind === kind && lives(item, visit.step));
  const lines = (found) => found.map((item) => `- ${item.title}: ${item.text}`);
  const offered = visit.offered.map((id, i) => `${i + 1}. ${itemOf.get(id).title}: ${itemOf.get(id).text}`);
  const solution = of("success").slice(-1).map((item) => item.text);
  const blocks = [lines(of("strategy")), lines(of("lesson")), offered, solution];
  const parts = blocks.flatMap((block, i) => block.length ? [data.headings[i], ...block] : []);
  return [p.text, ...parts, ...(parts.length ? [data.closing] : [])].join("\n");
}

function growth() {
  const curve = (name, color, kinds) => ({
    name, color, points: data.growth.map((row, step) => [step, kinds.reduce((sum, kind) => sum + row[data.kinds.indexOf(kind)], 0)]),
  });
  return make("div", { class: "charts" },
    chart("Living insights", [curve("strategies", "green", ["strategy"]), curve("lessons", "red", ["lesson"])]),
    chart("Living behaviors", [curve("behaviors", "violet", ["behavior"])]),
    chart("Attempts that are kept", [curve("successes", "green", ["success"]), curve("failures", "red", ["failure"])]));
}

function show() {
  const place = location.hash.slice(1), name = decodeURIComponent(place);
  chosen = problemOf.get(name) ?? null;
  if (place === BANK) chosen = null;
  at("shown").replaceChildren(chosen ? story(chosen) : place === BANK || name === "bank"
    ? make("div", {}, make("h2", { style: "margin-top: 0" }, "The bank of behaviors"), section("Behaviors", words ? bank.filter(holds) : bank, "none yet"))
    : growth());
  paint();
}

function move() {
  now = Number(at("step").value);
  since = Math.min(now, Number(at("since").value));
  at("step-is").textContent = now;
  at("since-is").textContent = since;
  let born = 0, ended = 0;
  for (const item of items) { born += isNew(item); ended += isGone(item); }
  at("changes").textContent = `${born} of what lives were born, ${ended} ended.`;
  list();
  show();
}

for (const [name, value] of [["step", now], ["since", since]]) {
  Object.assign(at(name), { min: 0, max: data.last, value });
  at(name).addEventListener("input", move);
}
let waiting;
at("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { words = at("search").value.trim().toLowerCase(); at("list").scrollTop = 0; list(); show(); }, 120);
});
at("order").addEventListener("change", list);
at("list").addEventListener("scroll", paint);
at("bank").addEventListener("click", () => { location.hash = BANK; });
addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
at("about").textContent = `${problems.length} problems, ${items.length} items over ${data.last} steps. `
  + (data.cut ? `Longer texts are cut after ${data.cut} characters: show_memory.py show --problem prints them whole.` : "");
if (data.run) at("links").append(make("a", { href: "run.html" }, "the run"));
move();
