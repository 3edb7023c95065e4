"use strict";
const PLANS = JSON.parse(document.getElementById("data").textContent);
const KINDS = { attn: "attention", ffn: "FFN" };
const MEANINGS = {
  similarity: "Cosine between the residual stream before and behind each sublayer, on the " +
    "calibration rows. More colour: changes more.",
  sensitivity: "Nats per answer token that are lost if this one alone is replaced; a first look, on "
    + "few rows. More colour: loses more (logarithmic). In its place:",
  time: "Milliseconds of a dense forward. More colour: takes longer.",
};
const NS = "http://www.w3.org/2000/svg";
const $ = id => document.getElementById(id);
let plan = PLANS[0];
let at = 0;

/* What is replaced at a stop, by sublayer. */
function replaced(stop) {
  const found = {};
  for (const { changes } of plan.stops.slice(0, stop)) {
    for (const [sublayer, name] of Object.entries(changes)) {
      if (name === "runs") delete found[sublayer];
      else found[sublayer] = name;
    }
  }
  return found;
}

function depth(sublayer) {
  return 2 * Number(sublayer.replace(/\D+/, "")) + (sublayer.startsWith("ffn") ? 1 : 0);
}

function words(sublayer) {
  const kind = sublayer.startsWith("ffn") ? "ffn" : "attn";
  return `${KINDS[kind]} ${sublayer.slice(kind.length)}`;
}

function digits(value, n) {
  return value === null || value === undefined ? "–" : value.toFixed(n);
}

function short(value) {
  return value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();
}

/* What is said behind the loss of a stop: nobody looked at that of a plan fitted anew. */
function beforeFit(stop) {
  return stop.fitted && stop.loss !== null ? ", before it was fitted anew" : "";
}

/* The value of a cell under a metric: [number for the shade, text]; null if unknown. */
function value(metric, kind, layer) {
  const told = plan[metric][kind][layer];
  if (told === null) return null;
  if (metric === "similarity") return [1 - told, told.toFixed(3)];
  if (metric === "time") return [told, `${short(1e3 * told)} ms`];
  return [Math.log10(Math.max(told[1], 1e-5)), short(told[1])];
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function drawMap() {
  const metric = document.querySelector("input[name=metric]:checked").value;
  const now = replaced(at);
  const last = at > 0 ? plan.stops[at - 1].changes : {};
  const cells = [];
  for (let layer = 0; layer < plan.layers; layer++) {
    for (const kind of Object.keys(KINDS)) cells.push([layer, kind, value(metric, kind, layer)]);
  }
  // The first layers differ from all others by far; they would leave the rest without colour, so
  // the highest twentieth has all of it.
  const known = cells.filter(cell => cell[2]).map(cell => cell[2][0]).sort((a, b) => a - b);
  const low = known[0], high = known[Math.max(Math.ceil(0.95 * known.length) - 1, 0)];
  const body = document.querySelector("#map tbody");
  body.replaceChildren();
  let row;
  for (const [layer, kind, told] of cells) {
    if (kind === "attn") {
      row = body.insertRow();
      const head = element("th", layer);
      head.scope = "row";
      row.append(head);
    }
    const cell = element("td", told ? told[1] : "–", told ? "" : "unknown");
    const share = told && high > low ? (told[0] - low) / (high - low) : 0;
    cell.style.setProperty("--share", Math.min(Math.max(share, 0), 1).toFixed(3));
    const name = now[kind + layer];
    if (name) {
      cell.classList.add("replaced");
      if (kind + layer in last) cell.classList.add("new");
      cell.append(" ", element("span", name));
    }
    const by = metric === "sensitivity" && told ? ` with ${plan.sensitivity[kind][layer][0]}` : "";
    const detail = at === plan.stops.length ? plan.last[kind][layer] : name;
    cell.title = `${words(kind + layer)}: ${metric} ${told ? told[1] : "unknown"}${by}; ` +
      (name ? `replaced by ${detail || name}` : "computed");
    row.append(cell);
  }
  const looked = Object.keys(KINDS).map(kind => {
    const names = new Set(plan.sensitivity[kind].filter(Boolean).map(told => told[0]));
    return names.size ? `${KINDS[kind]} ${[...names].join(" or ")}` : "";
  }).filter(Boolean).join(", ");
  $("meaning").textContent = !known.length ? "Not known: the plan's file does not tell it."
    : metric === "sensitivity" ? `${MEANINGS[metric]} ${looked}.` : MEANINGS[metric];
  $("map-caption").textContent = `${metric} of each sublayer, and what takes its place`;
}

function drawTiles() {
  const stop = at ? plan.stops[at - 1] : { speedup: 1, kv: 1, loss: 0, changes: {} };
  const now = replaced(at);
  const isLast = at > 0 && at === plan.stops.length;
  $("speedup").textContent = stop.speedup ? `${stop.speedup.toFixed(3)} ×` : "–";
  $("milliseconds").textContent = plan.total && stop.speedup
    ? `${short(1e3 * plan.total / stop.speedup)} of ${short(1e3 * plan.total)} ms` : "";
  const measured = isLast ? plan.measured : null;
  $("measured").textContent = measured ? `${measured[0].toFixed(3)} ×` : at ? "not yet" : "1 ×";
  $("interval").textContent = measured && measured[1] !== null
    ? `${measured[1].toFixed(3)} to ${measured[2].toFixed(3)}` : "";
  $("kv").textContent = stop.kv === null ? "–" : `${(100 * stop.kv).toFixed(1)} %`;
  $("loss").textContent = stop.loss === null ? "–" : digits(stop.loss, 4);
  $("unit").textContent = `nats per token${beforeFit(stop)}`;
  const count = Object.keys(now).length;
  $("count").textContent = `${count} of ${2 * plan.layers}`;
  const kinds = Object.keys(KINDS)
    .map(kind => [Object.keys(now).filter(s => s.startsWith(kind)).length, KINDS[kind]]);
  $("kinds").textContent = count ? kinds.filter(k => k[0]).map(k => k.join(" ")).join(", ") : "";
  $("changed").textContent = changed(stop, isLast);
  const slider = $("budget");
  slider.value = at;
  slider.setAttribute("aria-valuetext",
    `predicted ${stop.speedup ? stop.speedup.toFixed(2) : "unknown"} times as fast, ` +
    `${count} sublayers replaced, ` +
    `loss ${stop.loss === null ? "unknown" : digits(stop.loss, 3)}${beforeFit(stop)}`);
  $("less").disabled = at === 0;
  $("more").disabled = at === plan.stops.length;
}

function changed(stop, isLast) {
  if (!at) return "Dense: every sublayer is computed.";
  const before = replaced(at - 1);
  const parts = Object.keys(stop.changes).sort((a, b) => depth(a) - depth(b)).map(s => {
    const name = stop.changes[s];
    if (name === "runs") return `${words(s)} is computed again`;
    return before[s] ? `${words(s)}: ${before[s]} → ${name}` : `${words(s)}: ${name}`;
  });
  const more = parts.length > 6 ? `, and ${parts.length - 6} more` : "";
  const how = isLast && plan.whole ? "The plan itself" : `Step ${at} of ${plan.stops.length}`;
  return `${how}. New: ${parts.slice(0, 6).join(", ")}${more}.`;
}

function drawList() {
  const groups = {};
  const now = replaced(at);
  const isLast = at === plan.stops.length;
  const detail = s => isLast ? plan.last[s.replace(/\d+/, "")][s.replace(/\D+/, "")] : null;
  for (const sublayer of Object.keys(now).sort((a, b) => depth(a) - depth(b))) {
    (groups[now[sublayer]] ||= []).push(sublayer);
  }
  const lines = Object.entries(groups).sort().map(([name, sublayers]) => {
    // What they share stands in front of all, what is of each behind it.
    const details = new Set(sublayers.map(detail));
    const shared = details.size === 1 && detail(sublayers[0]) || name;
    const each = s => details.size === 1 ? "" : ` (${detail(s).replace(`${name} `, "")})`;
    const line = element("li", `: ${sublayers.map(s => words(s) + each(s)).join(", ")}`);
    line.prepend(element("strong", `${shared} (${sublayers.length})`));
    return line;
  });
  $("list").replaceChildren(...(lines.length ? lines : [element("li", "Nothing is replaced.")]));
  const stop = at ? plan.stops[at - 1] : null;
  $("how").textContent = stop && at < plan.stops.length && stop.speedup
    ? "The file holds the last plan. To make one like this: adaskip plan --acceleration " +
      `${Math.floor(1e3 * stop.speedup) / 1e3} …; a search for this acceleration passes near here, ` +
      "then exchanges, and fits gains and maps anew."
    : "";
}

function node(tag, attributes, text) {
  const made = document.createElementNS(NS, tag);
  for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
  if (text !== undefined) made.textContent = text;
  return made;
}

/* Round numbers from 0, or from 1, to the largest. */
function ticks(from, to) {
  const rough = (to - from) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(size => size >= rough);
  return [...Array(Math.floor((to - from) / step + 1e-9) + 1).keys()].map(i => from + i * step);
}

/* The end of a name, which tells plans apart where there is little room. */
function tail(name) {
  return name.length > 28 ? `…${name.slice(-27)}` : name;
}

function points(one) {
  return [{ speedup: 1, loss: 0 }, ...one.stops].map((stop, i) => ({ ...stop, i }))
    .filter(stop => stop.loss !== null && stop.speedup !== null);
}

/* Plans that one axis is of: times of other models, phases and contexts are others. */
function alike() {
  return PLANS.filter(one => one.model === plan.model &&
    ["phase", "context"].every(key => one.facts[key] === plan.facts[key]));
}

function drawCurve() {
  const shown = alike();
  const all = shown.map(points);
  const measured = shown.filter(p => p.measured && p.stops.length)
    .map(p => ({ ...p.stops[p.stops.length - 1], name: p.name, at: p.measured }))
    .filter(p => p.loss !== null);
  const xs = [...all.flat().map(p => p.speedup), ...measured.flatMap(p => p.at), 1.01];
  const ys = [...all.flat().map(p => p.loss), 1e-3];
  const xTop = Math.max(...xs), yTop = Math.max(...ys) * 1.05;
  const xLow = Math.min(1, ...xs.filter(x => x !== null));
  const [width, height, left, right, top, bottom] = [520, 330, 62, 16, 14, 44];
  const x = v => left + (v - xLow) / (xTop - xLow) * (width - left - right);
  const y = v => height - bottom - Math.max(v, 0) / yTop * (height - top - bottom);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const tick of ticks(1, xTop)) {
    svg.append(node("path", { class: "tick", d: `M${x(tick)} ${top}V${height - bottom}` }));
    svg.append(node("text", { x: x(tick), y: height - bottom + 17, "text-anchor": "middle" },
      Number(tick.toFixed(4))));
  }
  for (const tick of ticks(0, yTop)) {
    svg.append(node("path", { class: "tick", d: `M${left} ${y(tick)}H${width - right}` }));
    svg.append(node("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" },
      Number(tick.toFixed(6))));
  }
  const middle = (left + width - right) / 2;
  svg.append(node("text", { x: middle, y: height - 8, "text-anchor": "middle" },
    `times as fast as dense (${plan.facts.phase || "forward"})`));
  svg.append(node("text", { x: 14, y: height / 2, "text-anchor": "middle",
    transform: `rotate(-90 14 ${height / 2})` }, "nats lost per answer token"));
  const line = set => set.map((p, i) => `${i ? "L" : "M"}${x(p.speedup)} ${y(p.loss)}`).join("");
  shown.forEach((one, i) => {
    if (one !== plan) svg.append(node("path", { class: "other", d: line(all[i]) }));
  });
  const own = all[shown.indexOf(plan)];
  svg.append(node("path", { class: "path", d: line(own) }));
  for (const p of own) {
    const dot = node("circle", { cx: x(p.speedup), cy: y(p.loss), r: p.i === at ? 6 : 3.5,
      class: p.i === at ? "stop now" : "stop" });
    dot.append(node("title", {},
      `${p.speedup.toFixed(3)} ×, loss ${digits(p.loss, 4)}${beforeFit(p)}`));
    dot.addEventListener("click", () => go(p.i));
    svg.append(dot);
  }
  measured.forEach((p, i) => {
    const [now, low, high] = p.at, cy = y(p.loss);
    if (low !== null) {
      svg.append(node("path", { class: "measured", d: `M${x(low)} ${cy}H${x(high)}` }));
    }
    const mark = node("path", { class: "measured",
      d: `M${x(now)} ${cy - 6}l6 6l-6 6l-6 -6z` });
    mark.append(node("title", {},
      `${p.name}: measured ${now.toFixed(3)} ×, loss ${digits(p.loss, 4)}${beforeFit(p)}`));
    svg.append(mark);
    if (shown.length > 1) {
      // Beside the mark where there is room, above and below by turns.
      const end = x(now) > middle;
      svg.append(node("text", { class: "name", x: x(now) + (end ? -8 : 8),
        y: cy + (i % 2 ? 18 : -8), "text-anchor": end ? "end" : "start" }, tail(p.name)));
    }
  });
  $("curve").replaceChildren(svg);
  const unknown = own.length < plan.stops.length + 1;
  const last = own[own.length - 1];
  $("curve").setAttribute("aria-label",
    `Loss against predicted speed: ${own.length} plans from dense to ` +
    `${digits(last.speedup, 2)} times as fast, which loses ` +
    `${digits(last.loss, 3)} nats per answer token${beforeFit(last)}.`);
  $("legend").textContent = "○ predicted, plan by plan" +
    (measured.length ? "; ◆ measured, with its interval" : "") +
    (shown.length > 1 ? "; dashed: the other plans of this model, phase and context" : "") +
    (shown.length < PLANS.length ? "; those of another one are not drawn" : "") +
    (own.some(beforeFit) ? "; the last loss is from before the plan was fitted anew" : "") +
    (unknown ? ". Not every plan on the way has been looked at." : ".");
}

function go(stop) {
  at = Math.min(Math.max(Number(stop), 0), plan.stops.length);
  drawTiles();
  drawMap();
  drawList();
  drawCurve();
}

function choose(index) {
  plan = PLANS[index];
  $("name").textContent = plan.name;
  document.title = `${[plan.name, plan.model].filter(Boolean).join(", ")} – adaskip plan explorer`;
  const facts = plan.model ? { model: plan.model, ...plan.facts } : plan.facts;
  $("facts").replaceChildren(...Object.entries(facts).map(([name, fact]) => {
    const part = document.createElement("div");
    // Whole numbers stay whole: tokens, seeds.
    const whole = typeof fact !== "number" || Number.isInteger(fact);
    part.append(element("dt", name), element("dd", whole ? fact : short(fact)));
    return part;
  }));
  $("budget").max = plan.stops.length;
  go(plan.stops.length);
}

PLANS.forEach((one, i) => $("plans").append(new Option(one.name, i)));
$("pick").hidden = PLANS.length < 2;
$("plans").addEventListener("change", event => choose(event.target.value));
$("budget").addEventListener("input", event => go(event.target.value));
$("less").addEventListener("click", () => go(at - 1));
$("more").addEventListener("click", () => go(at + 1));
$("metric").addEventListener("change", drawMap);
choose(0);
