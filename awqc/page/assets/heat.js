// The heat map: a cell for each kind of linear in each layer, before and after. Many linears of one kind in a
// layer (experts) are one cell with their mean.

const heat = {cells: [], index: new Map(), current: null};

const STATES = [
  {column: "before", label: "rounded to nearest"},
  {column: "after", label: "as stored"},
];

function aggregate() {
  const found = new Map();
  for (let i = 0; i < count; ++i) {
    if (linears.before[i] === null && linears.after[i] === null) continue;
    const key = `${linears.layer[i]} ${linears.kind[i]}`;
    if (!found.has(key)) {
      found.set(key, {layer: linears.layer[i], kind: linears.kind[i], n: 0, before: 0, after: 0, worst: 0});
    }
    const cell = found.get(key);
    cell.n += 1;
    cell.before += linears.before[i] ?? 0;
    cell.after += linears.after[i] ?? 0;
    cell.worst = Math.max(cell.worst, linears.after[i] ?? 0);
  }
  return [...found.values()].flatMap((cell) =>
    STATES.map((state) => ({
      layer: cell.layer,
      kind: cell.kind,
      n: cell.n,
      worst: cell.worst,
      state: state.label,
      error: cell[state.column] / cell.n,
    })),
  );
}

const cellLabel = (cell) =>
  `${layerName(cell.layer)}, ${strings[cell.kind]}, ${cell.state}: ${percent(cell.error)}` +
  (cell.n > 1 ? ` on average of ${cell.n}` : "");

function drawHeat() {
  const place = byId("heat");
  if (!heat.cells.length) heat.cells = aggregate();
  if (!heat.cells.length) {
    place.replaceChildren(element("p", {className: "quiet", textContent: "This report holds no errors."}));
    return;
  }
  const kinds = [...new Set(heat.cells.map((cell) => cell.kind))];
  const names = new Map(shortKinds(kinds.map((k) => strings[k])).map((short, i) => [kinds[i], short]));
  const there = [...new Set(heat.cells.map((cell) => cell.layer))];
  const stacks = [...new Set(there.map((layer) => layers[layer].stack).filter(Boolean))];
  const called = new Map(shortKinds(stacks).map((short, i) => [stacks[i], short]));
  const label = (layer) => {
    const {stack, index} = layers[layer];
    return index < 0 ? "–" : stacks.length > 1 ? `${called.get(stack)} ${index}` : index;
  };
  const across = place.clientWidth >= 600;
  // As many labels as there is room for, side by side or below each other.
  const widest = 10 + 6.5 * d3.max(there, (layer) => String(label(layer)).length);
  const every = Math.ceil(across ? (there.length * widest) / (0.85 * place.clientWidth) : there.length / 24);
  const ticks = there.filter((_, i) => i % every === 0);
  const layerScale = {domain: there, label: null, tickFormat: label, ticks, tickSize: 0, padding: 0.06};
  const kindScale = {domain: kinds, label: null, tickFormat: (k) => names.get(k), tickSize: 0, padding: 0.06};
  const longest = 7.1 * d3.max([...names.values()], (name) => name.length);
  const domain = STATES.map((state) => state.label);
  const color = {type: "threshold", domain: shades, range: d3.range(8).map((i) => `var(--heat-${i})`)};
  const common = {
    style: {fontSize: "12px", background: "none", overflow: "visible"},
    color,
    ariaLabel: "Error by layer",
  };
  const plot = across
    ? Plot.plot({
        ...common,
        width: Math.max(place.clientWidth, longest + 24 + 11 * there.length),
        height: 62 + 2 * 22 * kinds.length + 30,
        marginLeft: longest + 14,
        marginRight: 4,
        marginTop: 26,
        marginBottom: 34,
        x: {...layerScale, label: "layer", labelAnchor: "center", labelArrow: "none"},
        y: kindScale,
        fy: {domain, label: null, padding: 0.14, axis: null},
        marks: [
          Plot.text(domain, {
            fy: (d) => d,
            text: (d) => d,
            frameAnchor: "top-left",
            dy: -17,
            dx: 1,
            fill: "var(--muted)",
          }),
          cellMark({x: "layer", y: "kind", fy: "state", rx: 2}),
        ],
      })
    : Plot.plot({
        ...common,
        width: place.clientWidth,
        height: longest + 34 + 15 * there.length,
        marginLeft: widest + 2,
        marginRight: 2,
        marginTop: longest + 30,
        marginBottom: 4,
        x: {...kindScale, axis: "top", tickRotate: -90},
        y: layerScale,
        fx: {domain, label: null, padding: 0.07, axis: null},
        marks: [
          Plot.text(domain, {
            fx: (d) => d,
            text: (d) => d,
            frameAnchor: "top-left",
            dy: -longest - 24,
            fill: "var(--muted)",
          }),
          cellMark({x: "kind", y: "layer", fx: "state", rx: 1.5}),
        ],
      });
  place.replaceChildren(plot);
  byId("heat-legend").replaceChildren(legend(color));
  makeKeyboardUsable(plot, kinds, there, across);
}

function legend(color) {
  return Plot.legend({
    color,
    label: "relative error of outputs",
    tickFormat: (value, i) => (i % 2 ? "" : percent(value)),
    tickSize: 0,
    width: 340,
    height: 42,
    marginTop: 16,
    marginBottom: 18,
    style: {background: "none", fontSize: "11px"},
  });
}

function cellMark(options) {
  return Plot.cell(heat.cells, {
    ...options,
    fill: "error",
    inset: 0,
    tip: {fill: "var(--raised)", stroke: "var(--line)", lineHeight: 1.35},
    title: (cell) =>
      cellLabel(cell).replace(/, /g, "\n") + (cell.n > 1 ? `\nworst as stored ${percent(cell.worst)}` : ""),
    className: "cells",
  });
}

function makeKeyboardUsable(plot, kinds, there, across) {
  const rects = d3.select(plot).selectAll('g[aria-label="cell"] rect');
  heat.index = new Map();
  rects.each(function (i) {
    const cell = heat.cells[i];
    const position = [
      there.indexOf(cell.layer),
      kinds.indexOf(cell.kind),
      STATES.findIndex((s) => s.label === cell.state),
    ];
    heat.index.set(position.join(), this);
    this.position = position;
    this.cell = cell;
    this.classList.add("cell");
    this.setAttribute("role", "button");
    this.setAttribute("tabindex", "-1");
    this.setAttribute("aria-label", cellLabel(cell));
  });
  unlabel(plot);
  const first = heat.current ? heat.index.get(heat.current) : rects.node();
  (first ?? rects.node()).setAttribute("tabindex", "0");
  rects.on("click", (event) => pick(event.currentTarget));
  rects.on("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick(event.currentTarget);
      return;
    }
    const next = neighbour(event.currentTarget.position, event.key, across, kinds.length);
    const target = next && heat.index.get(next.join());
    if (!target) return;
    event.preventDefault();
    focusCell(target);
    target.focus();
  });
  markChosenCell();
}

// The cell next to one in the direction of an arrow key; from the edge of the upper map on to the lower.
function neighbour([layer, kind, state], key, across, kinds) {
  const steps = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]};
  if (!(key in steps)) return null;
  const [x, y] = steps[key];
  let [byLayer, byKind] = across ? [x, y] : [y, x];
  kind += byKind;
  layer += byLayer;
  if (kind < 0 && state === 1) return [layer, kinds - 1, 0];
  if (kind >= kinds && state === 0) return [layer, 0, 1];
  return [layer, kind, state];
}

function focusCell(rect) {
  for (const other of heat.index.values()) other.setAttribute("tabindex", "-1");
  rect.setAttribute("tabindex", "0");
  heat.current = rect.position.join();
}

function pick(rect) {
  focusCell(rect);
  choose(rect.cell.layer, strings[rect.cell.kind]);
}

function markChosenCell() {
  for (const rect of heat.index.values()) {
    const {layer, kind} = rect.cell;
    rect.classList.toggle("chosen", layer === chosen.layer && strings[kind] === chosen.kind);
  }
}
