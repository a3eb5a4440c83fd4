const steps = data.rows.filter((row) => !row.split);
const evaluations = (split) => data.rows.filter((row) => row.split === split && typeof row.avg_at_k === "number")
  .map((row) => [row.step, row.avg_at_k, ...(row.interval ?? [])]);
const column = (...keys) => steps
  .map((row) => [row.step, keys.reduce((value, key) => value?.[key], row)])
  .filter(([, value]) => typeof value === "number");
const fixed = (value) => typeof value === "number" ? value.toFixed(3) : "unknown";
const line = (name, color, points) => ({ name, color, points });

for (const alarm of data.alarms) {
  at("alarms").append(
    make("span", { class: alarm.on ? "bad" : "good" }, alarm.on ? "look" : "fine"),
    make("span", {}, alarm.name), make("span", { class: "faint" }, alarm.says));
}

if (data.summary) {
  const table = make("table", {}, make("tr", {},
    ...["checkpoint", "step", `avg@${data.summary.final.k}`, "95% interval"].map((head) => make("th", {}, head))));
  const names = { base: "base policy", final: "final", dev_best: "best on dev", test_best: "best on test (selected on test)" };
  for (const [key, name] of Object.entries(names)) {
    const found = data.summary[key];
    if (!found) continue;
    const interval = found.interval ? `[${found.interval.map(fixed).join(", ")}]` : "none";
    table.append(make("tr", {}, ...[name, found.step, fixed(found.avg_at_k), interval]
      .map((cell) => make("td", {}, String(cell)))));
  }
  at("results").append(table);
} else {
  at("results").append(make("p", { class: "faint" }, "The run has not finished."));
}

at("charts").append(
  chart("Held-out problems right", [line("test", "blue", evaluations("test")), line("dev", "orange", evaluations("dev"))], { ceiling: 1 }),
  chart("Rollouts right", [line("reward", "blue", column("reward")), line("problems solved", "green", column("groups_solved"))], { ceiling: 1 }),
  chart("Divergence, nats a token", [line("divergence", "violet", column("divergence"))]),
  chart("Entropy, nats a token", [line("student", "blue", column("entropy")), line("teacher", "orange", column("teacher_entropy"))]),
  chart("Length, tokens", [line("mean", "blue", column("completion_tokens"))]),
  chart("Shares", [line("teacher active", "violet", column("teacher_active")), line("cut", "red", column("truncated"))], { ceiling: 1 }),
  chart("Memory, living items", [line("experience", "blue", column("memory", "experience")),
    line("insight", "orange", column("memory", "insight")), line("behavior", "green", column("memory", "behavior"))]),
  chart("Sampler gap, nats a token", [line("mean", "blue", column("sampler_gap"))]),
  chart("Norm of the gradient, before the clip", [line("norm", "blue", column("grad_norm"))]));

if (data.memory) at("links").append(make("a", { href: "memory.html" }, "The memory of this run, and each problem's story"));
const rows = data.samples.map((sample, i) => make("div", { class: "row", click: () => choose(i) },
  make("div", {}, `step ${sample.step}  `, make("span", { class: sample.reward > 0.5 ? "good" : "bad" }, sample.reward > 0.5 ? "right" : "wrong")),
  make("div", { class: "faint" }, sample.problem)));
at("list").append(...rows);
function choose(i) {
  rows.forEach((row, n) => row.classList.toggle("chosen", n === i));
  const sample = data.samples[i];
  const story = data.memory
    ? make("a", { href: "memory.html#" + encodeURIComponent(sample.problem) }, `The story of ${sample.problem}`) : sample.problem;
  at("sample").replaceChildren(make("div", { class: "small" }, story), showSample(sample));
}
if (rows.length) choose(rows.length - 1);
else at("sample").append("No samples were kept.");
