// What was decided for the chosen box: its linear, and the scale that it divides or undoes.

function drawDetail() {
  const place = byId("detail");
  const box = layerParts(chosen.layer).boxes.find(({kind}) => kind === chosen.kind);
  if (!box) {
    place.replaceChildren(element("p", {className: "quiet", textContent: "Nothing is known of this layer."}));
    return;
  }
  const parts = [
    element(
      "h3",
      {},
      breakable(box.names.size > 1 ? `${layerName(chosen.layer)}.${box.kind}` : [...box.names][0]),
    ),
  ];
  if (box.linears.length === 1) {
    parts.push(linearFacts(box.linears[0]));
    parts.push(...expertTokens(linears.expert_tokens[box.linears[0]]));
  }
  if (box.linears.length > 1) parts.push(...linearsFacts(box));
  const own = new Set(box.linears);
  const undone = (groupsIn.get(chosen.layer) ?? []).filter((g) => groups.linears[g].some((i) => own.has(i)));
  if (undone.length) parts.push(...scaleFacts("Undoes a scale", undone));
  if (box.groups.length) parts.push(...scaleFacts("Divided by a scale", box.groups));
  parts.push(...ownText(box));
  place.replaceChildren(...parts);
}

function linearFacts(i) {
  const before = 2 * weightsOf(i);
  return pairs([
    ["decision", textOf("decision", i)],
    ["because", textOf("reason", i)],
    ["scheme", textOf("scheme", i)],
    [linears.expert_count[i] ? "experts of outputs × inputs" : "outputs × inputs", shapeOf(i)],
    ["bytes", linears.bytes[i] === before ? bytes(before) : `${bytes(before)} → ${bytes(linears.bytes[i])}`],
    ["error, rounded to nearest", percent(linears.before[i], 3)],
    [
      "error, as stored",
      linears.after[i] === null
        ? ""
        : `${percent(linears.after[i], 3)} (${change(linears.before[i], linears.after[i])})`,
    ],
    ["range clipped off", percent(linears.clipped[i])],
    ["rounding", textOf("rounding", i)],
    ["backend", textOf("backend", i)],
    ["no input scale", textOf("no_group", i)],
    ["experts searched on the layer's tokens", linears.borrowing[i] ? whole(linears.borrowing[i]) : ""],
    ["notes", textOf("notes", i)],
  ]);
}

// How many calibration tokens reached each expert.
function expertTokens(tokens) {
  if (!tokens.length) return [];
  const [least, most] = d3.extent(tokens);
  const plot = Plot.plot({
    width: Math.min(320, byId("detail").clientWidth || 320),
    height: 90,
    marginLeft: 40,
    marginRight: 4,
    marginTop: 8,
    marginBottom: 18,
    style: {background: "none", fontSize: "11px"},
    ariaLabel: `Calibration tokens of ${tokens.length} experts: ${least} to ${most}`,
    x: {axis: null, padding: tokens.length > 40 ? 0 : 0.15},
    y: {label: null, ticks: 3, tickSize: 3, grid: false},
    marks: [
      Plot.barY(
        d3.sort(tokens, (n) => -n),
        {x: (_, i) => i, y: (n) => n, fill: "var(--bar)"},
      ),
      Plot.ruleY([0], {stroke: "var(--strong-line)"}),
    ],
  });
  unlabel(plot).setAttribute("role", "img");
  const remark = element("p", {
    className: "quiet",
    textContent: `${whole(least)} to ${whole(most)}, by expert from the busiest down`,
  });
  return [
    element("h4", {textContent: "Calibration tokens by expert"}),
    element("div", {className: "figure"}, plot),
    remark,
  ];
}

function linearsFacts(box) {
  const sorted = box.linears
    .filter((i) => linears.after[i] !== null)
    .sort((a, b) => linears.after[b] - linears.after[a]);
  const decisions = d3.rollups(
    box.linears,
    (v) => v.length,
    (i) => textOf("decision", i),
  );
  const list = pairs([
    ["linears", whole(box.linears.length)],
    ["decision", decisions.map(([what, n]) => (decisions.length > 1 ? `${n} ${what}` : what)).join(", ")],
    [
      "error, rounded to nearest",
      percent(
        d3.mean(sorted, (i) => linears.before[i]),
        3,
      ),
    ],
    [
      "error, as stored",
      percent(
        d3.mean(sorted, (i) => linears.after[i]),
        3,
      ),
    ],
    ["bytes", bytes(d3.sum(box.linears, (i) => linears.bytes[i]))],
  ]);
  if (!sorted.length) return [list];
  const worst = pairs(
    sorted
      .slice(0, 5)
      .map((i) => [linearName(i).slice(layerName(chosen.layer).length + 1), percent(linears.after[i], 3)]),
  );
  return [list, element("h4", {textContent: "Largest errors"}), worst];
}

function scaleFacts(heading, found) {
  const [g] = found;
  const parts = [
    element("h4", {
      textContent: found.length > 1 ? `${heading} (${found.length} groups, the first)` : heading,
    }),
  ];
  const applied = groups.applied[g];
  const alive = groups.alive[g] === groups.channels[g] ? "" : `${whole(groups.alive[g])} of `;
  parts.push(
    pairs([
      ["from", withoutWeight(groupName(g)).slice(layerName(groups.layer[g]).length + 1) || groupName(g)],
      [
        "chosen",
        applied ? `${strings[groups.family[g]]}, ratio ${groups.ratio[g]}` : "identity: nothing was better",
      ],
      ["held-out loss", applied ? change(1, 1 - groups.gain[g]) : ""],
      ["channels", `${alive}${whole(groups.channels[g])}`],
      ["tokens, held out", `${whole(groups.tokens[g])}, ${whole(groups.held_out[g])}`],
    ]),
  );
  const curve = drawCurve(g);
  if (curve) parts.push(curve);
  return parts;
}

// Search loss over the ratio, relative to no scale.
function drawCurve(g) {
  const points = groups.curve[g]
    .map((loss, i) => ({family: groups.grid[i][0], ratio: groups.grid[i][1], loss}))
    .filter(({loss, family}) => loss !== null && family !== "identity");
  if (points.length < 2) return null;
  const families = [...new Set(points.map((point) => point.family))];
  const colors = ["var(--accent)", "var(--heat-5)", "var(--muted)", "var(--ink)"];
  const family = strings[groups.family[g]];
  const best = points.filter(
    (point) => groups.applied[g] && point.family === family && point.ratio === groups.ratio[g],
  );
  const low = d3.min(points, (p) => p.loss);
  const high = Math.min(
    d3.max(points, (p) => p.loss),
    1 + 3 * Math.max(1 - low, 0.05),
  );
  const plot = Plot.plot({
    width: Math.min(320, byId("detail").clientWidth || 320),
    height: 170,
    marginLeft: 40,
    marginRight: 12,
    marginTop: 22,
    style: {background: "none", fontSize: "11px"},
    ariaLabel: `Search loss over the ratio, relative to no scale; lowest ${low}`,
    color: {domain: families, range: colors.slice(0, families.length)},
    x: {label: "ratio", labelArrow: "none", ticks: 5, tickSize: 3},
    y: {
      label: "search loss, 1 = no scale",
      labelArrow: "none",
      ticks: 4,
      tickSize: 3,
      domain: [Math.min(low, 1), Math.max(high, 1)],
      clamp: true,
    },
    marks: [
      Plot.ruleY([1], {stroke: "var(--strong-line)", strokeDasharray: "3 3"}),
      Plot.line(points, {x: "ratio", y: "loss", stroke: "family", strokeWidth: 1.5}),
      Plot.dot(points, {
        x: "ratio",
        y: "loss",
        fill: "family",
        r: 2,
        tip: {fill: "var(--raised)", stroke: "var(--line)", lineHeight: 1.35},
        title: (p) => `${p.family} ${p.ratio}\n${p.loss}`,
      }),
      Plot.dot(best, {x: "ratio", y: "loss", r: 5.5, stroke: "var(--ink)", strokeWidth: 1.5}),
    ],
  });
  unlabel(plot).setAttribute("role", "img");
  const key = element("p", {className: "quiet"});
  families.forEach((name, i) => {
    const dot = element("span", {className: "swatch"});
    dot.style.background = colors[i];
    key.append(dot, `${name}  `);
  });
  if (best.length) key.append("○ chosen");
  return element("div", {className: "figure"}, plot, key);
}

function ownText(box) {
  const lines = (data.graphs[chosen.layer]?.diff ?? []).filter(mentions(box.names));
  if (!lines.length) return [];
  const code = element("div", {className: "code", tabIndex: 0}, ...codeLines(lines));
  code.setAttribute("role", "region");
  code.setAttribute("aria-label", "Its lines of the graph, before and after");
  return [element("h4", {textContent: "In the graph, before and after"}), code];
}
