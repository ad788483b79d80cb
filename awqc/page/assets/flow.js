// The scale flow of a layer as a graph: what a scale divides, and what undoes it. Parameters of one kind
// (experts) are one box.

const SMALLEST = 0.8;
const withoutWeight = (name) => name.replace(/\.weight$/, "");

// The kind of a name within the layer that it belongs to.
function kindWithin(layer, name) {
  const path = layers[layer].index < 0 ? "" : `${layerName(layer)}.`;
  const rest = name.startsWith(path) ? name.slice(path.length) : name;
  return withoutWeight(rest.replace(/(^|[.[])\d+(?=[.\]]|$)/g, "$1*"));
}

function layerParts(layer) {
  const boxes = new Map();
  const arrows = new Map();
  const own = new Set((linearsIn.get(layer) ?? []).map(linearName));
  const box = (parameter) => {
    // Other parameters of a linear (its bias) go with it.
    const module = parameter.slice(0, parameter.lastIndexOf("."));
    const name = own.has(module) ? module : parameter;
    const kind = kindWithin(layer, name);
    if (!boxes.has(kind)) boxes.set(kind, {kind, linears: [], groups: [], n: 0, names: new Set()});
    boxes.get(kind).names.add(name);
    return boxes.get(kind);
  };
  for (const i of linearsIn.get(layer) ?? []) box(linearName(i)).linears.push(i);
  const arrow = (from, to, through) => {
    const source = box(from);
    const target = box(to);
    if (source !== target)
      arrows.set(`${source.kind}→${target.kind}`, {source: source.kind, target: target.kind, through});
  };
  for (const g of groupsIn.get(layer) ?? []) {
    box(withoutWeight(groupName(g))).groups.push(g);
    for (const i of groups.linears[g]) arrow(withoutWeight(groupName(g)), linearName(i), "");
  }
  for (const [from, to, through] of data.graphs[layer]?.edges ?? []) {
    arrow(withoutWeight(from), withoutWeight(to), through);
  }
  return {boxes: [...boxes.values()], arrows: [...arrows.values()]};
}

// Boxes that arrows connect, together.
function components({boxes, arrows}) {
  const root = new Map(boxes.map(({kind}) => [kind, kind]));
  const find = (kind) => (root.get(kind) === kind ? kind : find(root.get(kind)));
  for (const {source, target} of arrows) root.set(find(source), find(target));
  return d3
    .groups(boxes, ({kind}) => find(kind))
    .map(([, members]) => ({
      boxes: members,
      arrows: arrows.filter(({source}) => members.some(({kind}) => kind === source)),
    }));
}

function drawFlow() {
  const place = byId("flow");
  const parts = layerParts(chosen.layer);
  const titles = shortKinds(parts.boxes.map((box) => box.kind));
  parts.boxes.forEach((box, i) => Object.assign(box, {title: titles[i], sub: describe(box)}));
  if (!parts.boxes.some((box) => box.kind === chosen.kind)) {
    chosen.kind = (parts.boxes.find((box) => box.linears.length) ?? parts.boxes[0])?.kind ?? null;
  }
  const wide = place.clientWidth >= 560;
  // Boxes without arrows come last.
  const found = d3.sort(components(parts), (component) => component.boxes.length === 1);
  place.replaceChildren(...found.map((component) => drawComponent(component, wide, place.clientWidth)));
}

function describe(box) {
  const [i] = box.linears;
  const n = box.linears.length;
  if (!n)
    return box.groups.length
      ? chosenScale(box.groups[0])
      : `scaled along${box.names.size > 1 ? ` ×${box.names.size}` : ""}`;
  const experts = n > 1 ? n : linears.expert_count[i];
  const many = experts ? `×${experts} · ` : "";
  if (textOf("decision", i) !== "quantized") return `${many}stays in float`;
  const after = d3.mean(box.linears, (l) => linears.after[l] ?? undefined);
  return `${many}${textOf("scheme", i).split(" ")[0]}${after === undefined ? "" : ` · ${percent(after)}`}`;
}

// Magnitudes to a power, as the search writes its candidates.
function chosenScale(g) {
  const family = strings[groups.family[g]];
  return groups.applied[g] ? `divided by s · ${family} ${groups.ratio[g]}` : "scale not applied";
}

// From left to right where there is room for it, and from top to bottom where not; a layer that is too wide
// for that as well goes from left to right again, and is scrolled.
function drawComponent(component, wide, room) {
  let graph = layOut(component, wide);
  if (!wide && SMALLEST * graph.graph().width > room) {
    wide = true;
    graph = layOut(component, wide, 24);
  }
  return drawGraph(component, graph, wide, room);
}

function layOut({boxes, arrows}, wide, gap = wide ? 56 : 40) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({
    rankdir: wide ? "LR" : "TB",
    nodesep: wide ? 12 : 8,
    ranksep: gap,
    edgesep: 8,
    marginx: 2,
    marginy: 2,
  });
  graph.setDefaultEdgeLabel(() => ({}));
  // Linears of one width stand in line; the others are as wide as their text.
  const widthOf = (box) => Math.max(7.8 * box.title.length, 6 * box.sub.length, 48) + 28;
  const common = d3.max(
    boxes.filter((box) => box.linears.length),
    widthOf,
  );
  for (const box of boxes) {
    graph.setNode(box.kind, {width: wide && box.linears.length ? common : widthOf(box), height: 46});
  }
  for (const {source, target, through} of arrows) {
    const width = through ? 6.2 * through.length : 0;
    graph.setEdge(source, target, through ? {width: wide ? width : 0, height: 14, labelpos: "c"} : {});
  }
  dagre.layout(graph);
  return graph;
}

function drawGraph({boxes, arrows}, graph, wide, room) {
  const {width, height} = graph.graph();
  // A little too wide is made smaller; what would become illegible is scrolled instead.
  const scale = Math.max(SMALLEST, Math.min(1, (room - 12) / width));
  const svg = d3.create("svg").attr("viewBox", `0 0 ${width} ${height}`);
  svg.attr("width", scale * width).attr("height", scale * height);
  svg.attr("role", "group").attr("aria-label", `Scale flow from ${boxes[0].kind}`);
  const line = d3
    .line()
    .x((p) => p.x)
    .y((p) => p.y)
    .curve(d3.curveBasis);
  for (const {source, target, through} of arrows) {
    const edge = graph.edge(source, target);
    // From the middle of one side to the middle of the other: corners are round.
    const [from, to] = [graph.node(source), graph.node(target)];
    const start = wide ? {x: from.x + from.width / 2, y: from.y} : {x: from.x, y: from.y + from.height / 2};
    const end = wide ? {x: to.x - to.width / 2, y: to.y} : {x: to.x, y: to.y - to.height / 2};
    const path = line([start, ...edge.points.slice(1, -1), end]);
    svg.append("path").attr("class", "edge").attr("d", path).attr("marker-end", "url(#arrow)");
    if (!through) continue;
    const middle = edge.points[Math.floor(edge.points.length / 2)];
    const label = svg
      .append("text")
      .attr("class", "edge-label")
      .attr("y", middle.y)
      .attr("dy", "0.32em")
      .text(through);
    if (wide) label.attr("x", middle.x).attr("text-anchor", "middle");
    else label.attr("x", middle.x + 6);
  }
  for (const box of boxes) drawBox(svg, box, graph.node(box.kind));
  return element("div", {className: "part"}, svg.node());
}

function drawBox(svg, box, {x, y, width, height}) {
  const [i] = box.linears;
  const isFloat = i !== undefined && textOf("decision", i) !== "quantized";
  const after = d3.mean(box.linears, (l) => linears.after[l] ?? undefined);
  const g = svg.append("g").attr("transform", `translate(${x - width / 2},${y - height / 2})`);
  g.attr("class", `box ${box.linears.length ? "linear" : "producer"}${isFloat ? " float" : ""}`);
  g.classed("chosen", box.kind === chosen.kind);
  g.attr("role", "button").attr("tabindex", 0).attr("data-kind", box.kind);
  g.attr("aria-pressed", String(box.kind === chosen.kind));
  g.append("rect")
    .attr("class", "frame")
    .attr("width", width)
    .attr("height", height)
    .attr("rx", box.linears.length ? 5 : 23);
  if (after !== undefined) {
    g.append("rect")
      .attr("class", "mark")
      .attr("x", 7)
      .attr("y", 8)
      .attr("width", 5)
      .attr("height", height - 16)
      .attr("rx", 2)
      .style("fill", shade(after));
  }
  const left = after === undefined && !box.linears.length ? 14 : 19;
  const text = g.append("text");
  text.append("tspan").attr("class", "title").attr("x", left).attr("y", 19).text(`${box.title} `);
  text.append("tspan").attr("class", "sub").attr("x", left).attr("y", 36).text(box.sub);
  const open = () => {
    choose(chosen.layer, box.kind);
    byId("flow").querySelector(".box.chosen")?.focus();
  };
  g.on("click", open).on("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    open();
  });
}
