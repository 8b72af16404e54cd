// The page's only script. Whatever a model, an index or a person says is put in as text, never as markup.

const byId = (id) => document.getElementById(id);
const form = byId("form"), results = byId("results");
const SVG = "http://www.w3.org/2000/svg";
const HIGHEST = 7; // nines: float32 does not tell a cosine from 1 beyond 0.9999999
let choices = null, running = null, shown = [];

// --- Small tools

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawn(tag, attributes, text = null) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const readable = (token) => token.trim() || JSON.stringify(token);
const span = (first, last) => (first === last ? `Step ${first}` : `Steps ${first}–${last}`);

function amount(operations) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (operations >= size) return `${(operations / size).toPrecision(3)} ${unit}FLOP`;
  }
  return `${operations} FLOP`;
}

function cosine(value) {
  // As many digits as it takes to see how far from 1 it is.
  const digits = value < 1 ? Math.min(HIGHEST, Math.max(3, 2 - Math.floor(Math.log10(1 - value)))) : HIGHEST;
  return value.toFixed(digits);
}

// --- Talking to the server

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  let answer;
  try {
    answer = await fetch("explore", { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  const value = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, value?.error?.message ?? `The server answered ${answer.status}.`);
  return value;
}

async function learn() {
  choices = await ask();
  byId("key-field").hidden = true;
  byId("steps").max = choices.max_steps;
  byId("steps").value = choices.models[0].steps;
  for (const [place, side] of ["a", "b"].entries()) {
    const select = byId(`model-${side}`);
    select.replaceChildren(...choices.models.map((model) => element("option", { value: model.name }, model.name)));
    select.selectedIndex = place && choices.models.length > 1 ? 1 : 0;
    select.closest(".field").hidden = choices.models.length < 2;
    if (!byId(`instruction-${side}`).value) byId(`instruction-${side}`).value = choices.models[0].query_instruction ?? "";
  }
  const index = choices.index && `${plural(choices.index.passages, "passage")} to find, indexed by ${choices.index.model}`;
  byId("served").textContent = [
    ...choices.models.map((model) => `${model.name}: ${model.dimensions} dimensions, ${model.halt}`),
    index || "No index is loaded: start the server with --index to see what is found",
  ].join(". ") + ".";
}

function askForKey(error) {
  if (error.status !== 401) return false;
  const again = !byId("key-field").hidden;
  byId("key-field").hidden = false;
  byId("key").focus();
  byId("status").textContent = "";
  byId("problem").textContent = again ? "That is not the key of this server." : "This server asks for a key.";
  return true;
}

function wanted(side) {
  return {
    text: byId("text").value,
    instruction: byId(`instruction-${side}`).value.trim() || null,
    model: byId(`model-${side}`).value,
    steps: byId("steps").valueAsNumber,
  };
}

async function run() {
  if (!form.reportValidity()) return;
  running?.abort();
  const own = (running = new AbortController());
  byId("problem").textContent = "";
  byId("status").textContent = "Refining …";
  results.setAttribute("aria-busy", "true");
  try {
    if (choices === null) await learn();
    const sides = byId("compare").checked ? ["a", "b"] : ["a"];
    shown = await Promise.all(sides.map((side) => ask({ method: "POST", body: JSON.stringify(wanted(side)), signal: own.signal })));
    show(shown);
    byId("status").textContent = `Done. ${shown.map((one, place) => `${titleOf(place)}${said(one)}`).join(" ")}`;
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!askForKey(error)) {
      byId("status").textContent = "";
      byId("problem").textContent = error.message;
    }
  } finally {
    if (running === own) results.removeAttribute("aria-busy");
  }
}

// --- What is shown of one reading

const last = (one) => one.steps.length - 1;
const titleOf = (place) => (shown.length > 1 ? `${["First", "Second"][place]} reading: ` : "");

function said(one) {
  if (one.halted === null) return `The model would not halt within ${plural(last(one), "step")}.`;
  return `The model halts at step ${one.halted} of ${last(one)}.`;
}

function show(readings) {
  const most = Math.max(...readings.flatMap((one) => one.steps.flatMap((step) => step.spoken.map((word) => word.probability))), 0);
  results.className = readings.length > 1 ? "two" : "one";
  results.replaceChildren(...readings.map((one, place) => reading(one, place, readings[1 - place], most)));
  drawCurves();
}

function reading(one, place, other, most) {
  return element("article", { "aria-labelledby": `title-${place}` },
    heading(one, place), curve(one, place), phases(one, other), tokens(one, most), documents(one));
}

function heading(one, place) {
  const title = element("h2", { id: `title-${place}` }, `${titleOf(place)}${one.model}, `);
  title.append(one.instruction === null ? "read bare" : element("q", {}, one.instruction));
  const cut = one.truncated ? element("p", { class: "cut" }, `The text was too long: it was cut to ${one.tokens} tokens.`) : null;
  return element("div", { class: "reading" }, title, cost(one), cut);
}

function cost(one) {
  const whole = one.steps[0].operations, line = element("p", { class: "cost" });
  const price = (k) => (whole === null ? "" : `: ${amount(one.steps[k].operations)}, ${(one.steps[k].operations / whole).toFixed(2)} passes`);
  line.append(`${plural(one.tokens, "prompt token")}; ${plural(last(one), "step")}${price(last(one))}`);
  if (one.halted === null) line.append("; not halted by then");
  else line.append("; ", element("strong", {}, `halted at ${one.halted}`), price(one.halted));
  return line;
}

function part(title, ...children) {
  return element("section", { class: "part" }, element("h3", {}, title), ...children);
}

function table(caption, columns, rows, kind = "") {
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  return element("table", kind ? { class: kind } : {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...rows));
}

function row(one, k, ...cells) {
  const when = k === one.halted ? "halted" : one.halted !== null && k > one.halted ? "after" : "";
  const name = element("th", { scope: "row" }, String(k), when === "halted" ? element("span", { class: "badge" }, "halts") : null);
  return element("tr", when ? { class: when } : {}, name, ...cells);
}

function tokens(one, most) {
  if (!last(one)) return part("Soft tokens", element("p", {}, "No step, no soft token: this is the prompt alone."));
  const list = (step) => element("ol", { class: "tokens" }, ...step.spoken.map((word) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", `${100 * Math.sqrt(word.probability / most)}%`);
    const name = element("span", { class: "token" }, readable(word.token));
    return element("li", {}, name, bar, element("span", { class: "share" }, word.probability.toFixed(3)));
  }));
  const rows = one.steps.slice(1).map((step) => row(one, step.step, element("td", {}, list(step))));
  return part("Soft tokens, step by step",
    element("p", {}, "The likeliest tokens of each and their weights; bars have the length of the square root, so that small ones show."),
    table("Likeliest tokens of each step with their weights", ["Step", "Likeliest tokens and weights"], rows));
}

function phases(one, other) {
  const theirs = new Set(other?.phases.flatMap((phase) => phase[2]) ?? []);
  const word = (token) => element("li", other && !theirs.has(token) ? { class: "own" } : {}, readable(token));
  const rows = one.phases.map(([first, end, fresh]) => element("div", {}, element("dt", {}, span(first, end)),
    element("dd", {}, fresh.length ? element("ul", {}, ...fresh.map(word)) : "nothing new")));
  const note = other ? "Tokens that were not among the likeliest before; underlined: the other reading never says them."
    : "Tokens that were not among the likeliest before.";
  return part("New tokens by phase", element("p", {}, rows.length ? note : "Nothing is said without a step."), element("dl", { class: "phases" }, ...rows));
}

// --- What is found

function documents(one) {
  if (one.steps.every((step) => step.hits === null)) {
    const why = choices.index ? `The index was made by ${choices.index.model}: its vectors do not compare with those of ${one.model}.`
      : "No index is loaded; start the server with --index to see what is found after each step.";
    return part("Nearest passages", element("p", {}, why));
  }
  const groups = [];
  for (const step of one.steps.filter((step) => step.hits !== null)) {
    const known = groups.at(-1);
    if (known && sameOrder(known.hits, step.hits)) Object.assign(known, { last: step.step, hits: step.hits });
    else groups.push({ first: step.step, last: step.step, hits: step.hits, before: known?.hits ?? null });
  }
  const changes = groups.length - 1;
  const note = changes ? `The order changes ${changes === 1 ? "once" : `${changes} times`}; steps between two changes stand together.`
    : "The same at every step.";
  return part("Nearest passages, after each step", element("p", {}, note),
    element("ol", { class: "found" }, ...groups.map((group) => groupItem(group, one.halted))), everyScore(one));
}

const sameOrder = (some, others) => some.length === others.length && some.every((hit, place) => hit.reference === others[place].reference);

function groupItem(group, halted) {
  const hits = group.hits.map((hit, place) => {
    const name = element("span", { class: "name" }, hit.reference, " ", markOf(hit, place, group.before));
    return element("li", {}, element("span", { class: "score" }, hit.score.toFixed(3)), name, element("span", { class: "summary" }, hit.summary));
  });
  const halts = halted !== null && group.first <= halted && halted <= group.last;
  const badge = halts ? element("span", { class: "badge" }, `halts at ${halted}`) : null;
  return element("li", {}, element("h4", {}, span(group.first, group.last), badge), element("ol", { class: "hits" }, ...hits));
}

function markOf(hit, place, before) {
  if (before === null) return null;
  const was = before.findIndex((other) => other.reference === hit.reference);
  if (was === place) return null;
  if (was < 0) return element("span", { class: "mark new" }, "new");
  return element("span", { class: "mark" }, was > place ? `up from ${was + 1}` : `down from ${was + 1}`);
}

function everyScore(one) {
  const rows = one.steps.filter((step) => step.hits !== null).map((step) =>
    row(one, step.step, element("td", {}, ...step.hits.map((hit) => element("div", {}, `${hit.score.toFixed(4)}  ${hit.reference}`)))));
  return element("details", {}, element("summary", {}, "Every step"), table("Nearest passages after each step", ["Step", "Cosine and passage"], rows));
}

// --- The curve: cosines of consecutive vectors, on an axis of nines

function curve(one, place) {
  const figure = element("figure", { class: "curve-box", id: `curve-${place}` });
  const measured = one.steps.filter((step) => step.stability !== null);
  if (!measured.length) return part("Stability", element("p", {}, "From two steps on there are two vectors of steps to compare."));
  const rows = measured.map((step) => row(one, step.step, element("td", {}, cosine(step.stability)),
    ...(one.threshold === null ? [] : [element("td", {}, step.stability >= one.threshold ? "yes" : "no")]),
    ...(step.operations === null ? [] : [element("td", {}, amount(step.operations))])));
  const columns = ["Step", "Cosine", ...(one.threshold === null ? [] : ["Stable"]), ...(measured[0].operations === null ? [] : ["Cost so far"])];
  const values = element("details", {}, element("summary", {}, "The values as a table"),
    table("Cosine of consecutive embeddings after each step", columns, rows, "numbers"));
  const rule = one.threshold === null ? `This model counts steps: ${one.halt}.` : `Cosine with the step before; filled: at or above the threshold ${one.threshold}.`;
  return part("Stability", element("p", {}, rule), figure, values);
}

const nines = (value) => Math.min(HIGHEST, -Math.log10(Math.max(1 - value, 1e-9)));

function drawCurves() {
  const measured = shown.flatMap((one) => one.steps.map((step) => step.stability).filter((value) => value !== null));
  const levels = [...measured, ...shown.map((one) => one.threshold).filter((value) => value !== null && value < 1)].map(nines);
  if (!measured.length) return;
  const range = { low: Math.floor(Math.min(...levels)), high: Math.ceil(Math.max(...levels) + 0.15), steps: Math.max(...shown.map(last)) };
  for (const [place, one] of shown.entries()) {
    const figure = byId(`curve-${place}`);
    if (figure) figure.replaceChildren(picture(one, range, figure.clientWidth));
  }
}

function picture(one, range, width) {
  const height = 230, left = 68, right = 14, top = 26, bottom = 34;
  const x = (k) => left + ((width - left - right) * (k - 1)) / Math.max(1, range.steps - 1);
  const y = (value) => top + ((height - top - bottom) * (range.high - nines(value))) / (range.high - range.low);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": described(one) });
  for (let level = range.low; level <= range.high; level++) {
    const value = 1 - 10 ** -level, name = level > 0 ? value.toFixed(level) : value.toFixed(0);
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, name));
  }
  const every = Math.ceil(range.steps / Math.max(2, Math.floor((width - left) / 34)));
  for (let k = 1; k <= range.steps; k += every) {
    svg.append(drawn("text", { x: x(k), y: height - bottom + 18, "text-anchor": "middle" }, k));
  }
  svg.append(drawn("text", { x: width - right, y: height - 2, "text-anchor": "end" }, "step"));
  drawMarks(svg, one, x, y, { left, right: width - right, top, bottom: height - bottom });
  return svg;
}

function drawMarks(svg, one, x, y, box) {
  if (one.halted !== null && one.halted >= 1) {
    const at = x(one.halted), near = at > (box.left + box.right) / 2;
    svg.append(drawn("line", { class: "halt", x1: at, x2: at, y1: box.top - 8, y2: box.bottom }));
    svg.append(drawn("text", { class: "halt-name", x: near ? at - 6 : at + 6, y: box.top - 10, "text-anchor": near ? "end" : "start" }, `halts at ${one.halted}`));
  }
  if (one.threshold !== null && one.threshold < 1) {
    const level = y(one.threshold);
    svg.append(drawn("line", { class: "threshold", x1: box.left, x2: box.right, y1: level, y2: level }));
    svg.append(drawn("text", { class: "threshold-name", x: box.right, y: level + 15, "text-anchor": "end" }, `threshold ${one.threshold}`));
  }
  const measured = one.steps.filter((step) => step.stability !== null);
  svg.append(drawn("polyline", { class: "curve", points: measured.map((step) => `${x(step.step)},${y(step.stability)}`).join(" ") }));
  for (const step of measured) {
    const stable = one.threshold !== null && step.stability >= one.threshold;
    const point = drawn("circle", { class: stable ? "point stable" : "point", cx: x(step.step), cy: y(step.stability), r: 4 });
    point.append(drawn("title", {}, `step ${step.step}: ${cosine(step.stability)}`));
    svg.append(point);
  }
}

function described(one) {
  const measured = one.steps.filter((step) => step.stability !== null), [first, end] = [measured[0], measured.at(-1)];
  const rule = one.threshold === null ? "" : ` The threshold is ${one.threshold}.`;
  return `Cosine of consecutive vectors: ${cosine(first.stability)} at step ${first.step}, ${cosine(end.stability)} at step ${end.step}.${rule} ${said(one)}`;
}

// --- What a person does

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});
byId("compare").addEventListener("change", (event) => {
  byId("reading-b").hidden = !event.target.checked;
  byId("readings").classList.toggle("two", event.target.checked);
});

let width = 0;
new ResizeObserver(() => {
  if (results.clientWidth !== width) drawCurves();
  width = results.clientWidth;
}).observe(results);

learn().catch((error) => {
  if (!askForKey(error)) byId("problem").textContent = error.message;
});
