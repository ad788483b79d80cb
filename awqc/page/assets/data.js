// The report's columns, and how values are written.

const data = JSON.parse(document.getElementById("data").textContent);
const {strings, layers, linears, groups} = data;
const count = linears.name.length;

// A name is the number of its template and the numbers that its stars stand for.
function nameOf([template, ...numbers]) {
  let i = 0;
  return numbers.length ? strings[template].replace(/\*/g, () => numbers[i++]) : strings[template];
}

const linearName = (i) => nameOf(linears.name[i]);
const groupName = (g) => nameOf(groups.name[g]);
const textOf = (column, i) => strings[linears[column][i]];

// Rows by layer, in the order of the model.
const linearsIn = d3.group(d3.range(count), (i) => linears.layer[i]);
const groupsIn = d3.group(d3.range(groups.name.length), (g) => groups.layer[g]);

function layerName(number) {
  const {stack, index} = layers[number];
  return index < 0 ? "outside of the layers" : stack ? `${stack}.${index}` : String(index);
}

// What a kind is called where space is short: its last parts, as many as tell all kinds apart.
function shortKinds(kinds) {
  const trimmed = kinds.map((kind) => kind.replace(/\.weight$/, ""));
  const tail = (kind, parts) => kind.split(".").slice(-parts).join(".");
  return trimmed.map((kind) => {
    for (let parts = 1; parts < 6; ++parts) {
      const short = tail(kind, parts);
      const alike = trimmed.filter((other) => other !== kind && tail(other, parts) === short);
      if (!alike.length && !/^[*\d[\]]/.test(short)) return short;
    }
    return kind;
  });
}

function percent(value, digits = 2) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0%";
  const scaled = 100 * value;
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(scaled))));
  return `${scaled.toFixed(Math.min(places, 8))}%`;
}

function change(before, after) {
  if (!before || after === null) return "";
  const share = after / before - 1;
  const size = Math.abs(100 * share);
  return `${share > 0 ? "+" : "−"}${size.toFixed(size < 2 ? 1 : 0)}%`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    ++unit;
  }
  return `${unit ? value.toPrecision(3) : value} ${units[unit]}`;
}

const whole = (value) => value.toLocaleString("en-US");
const weightsOf = (i) => (linears.expert_count[i] ?? 1) * linears.out[i] * linears.in[i];
const shapeOf = (i) =>
  `${linears.expert_count[i] ? `${whole(linears.expert_count[i])} of ` : ""}${whole(linears.out[i])} × ${whole(linears.in[i])}`;
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

// Error shades: eight steps of a ratio each, from the smallest to the largest error of the report. Few
// outliers at either end share the last shade; errors that hardly differ do not get shades that do.
const shades = (() => {
  const values = [...linears.before, ...linears.after].filter((v) => v > 0).sort(d3.ascending);
  const low = d3.quantileSorted(values, 0.02) || 1e-4;
  const high = Math.max(d3.quantileSorted(values, 0.98) || 1e-2, low * 10);
  const step = Math.pow(high / low, 1 / 8);
  return d3.range(1, 8).map((i) => Number((low * Math.pow(step, i)).toPrecision(2)));
})();
const shade = (value) => `var(--heat-${d3.bisect(shades, value)})`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function pairs(rows) {
  const list = element("dl", {className: "pairs"});
  for (const [label, value] of rows) {
    if (value === "" || value === null || value === undefined) continue;
    list.append(element("div", {}, element("dt", {textContent: label}), element("dd", {}, value)));
  }
  return list;
}

// A name that may break after each dot.
function breakable(name) {
  const made = document.createDocumentFragment();
  for (const part of name.split(/(?<=\.)/)) made.append(part, document.createElement("wbr"));
  return made;
}

// Without the names of its parts, which mean nothing to who hears them.
function unlabel(plot) {
  for (const group of plot.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
  return plot;
}

const byId = (id) => document.getElementById(id);

// What is chosen: a layer, and a parameter's kind within it. Whoever draws it listens.
const chosen = {layer: layers.length > 1 ? 1 : 0, kind: null, listeners: []};

function choose(layer, kind = null) {
  Object.assign(chosen, {layer, kind});
  for (const listener of chosen.listeners) listener();
}
