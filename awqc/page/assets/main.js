// Everything once, then again where the window or the choice changes.

function setUpLayers() {
  const select = byId("layer-choice");
  const there = d3.range(layers.length).filter((layer) => layer || linears.layer.includes(0));
  select.append(...there.map((layer) => element("option", {value: layer, textContent: layerName(layer)})));
  select.addEventListener("change", () => choose(Number(select.value)));
  const step = (by) => () => choose(there[there.indexOf(chosen.layer) + by]);
  byId("layer-previous").addEventListener("click", step(-1));
  byId("layer-next").addEventListener("click", step(1));
  chosen.listeners.push(() => {
    select.value = chosen.layer;
    byId("layer-previous").disabled = chosen.layer === there[0];
    byId("layer-next").disabled = chosen.layer === there.at(-1);
  });
}

function arrowHead() {
  const svg = d3
    .create("svg")
    .attr("width", 0)
    .attr("height", 0)
    .attr("aria-hidden", "true")
    .style("position", "absolute");
  const marker = svg.append("defs").append("marker").attr("id", "arrow").attr("viewBox", "0 0 8 8");
  marker
    .attr("refX", 7)
    .attr("refY", 4)
    .attr("markerWidth", 8)
    .attr("markerHeight", 8)
    .attr("orient", "auto");
  marker.append("path").attr("class", "arrow-head").attr("d", "M0 0.5L8 4L0 7.5Z");
  document.body.append(svg.node());
}

setUpTheme();
if (count) {
  arrowHead();
  setUpLayers();
  setUpText();
  setUpTable();
  chosen.listeners.push(drawFlow, drawDetail, drawText, markChosenCell);
  // Plot would pin its tip where the pointer is pressed, over the cell that is meant.
  byId("heat").addEventListener("pointerdown", (event) => event.stopPropagation(), {capture: true});
  drawHeat();
  choose(chosen.layer);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawHeat();
    drawFlow();
    drawDetail();
  });
} else {
  for (const id of ["error", "layer", "linears"]) byId(id).hidden = true;
}
