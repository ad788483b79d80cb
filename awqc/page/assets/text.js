// A layer's graph text: the difference, or either side of it.

const DIFF = {" ": "", "-": "del", "+": "add"};
// A hyphen would be broken after.
const SIGNS = {" ": " ", "-": "\u2212", "+": "+"};
const SIDES = {diff: " -+", before: " -", after: " +"};

function codeLines(lines, side = "diff", about = null) {
  const shown = lines.filter((line) => SIDES[side].includes(line[0]));
  return shown.map((line) => {
    const mark = side === "diff" ? DIFF[line[0]] : "";
    const made = element("div", {
      className: mark,
      textContent: (side === "diff" ? `${SIGNS[line[0]]}\u00a0` : "") + line.slice(1),
    });
    if (about && about(line)) made.classList.add("about");
    return made;
  });
}

// Lines that speak of a module: its name, followed by what is not part of a longer name.
function mentions(names) {
  const found = [...names].map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`(^|[^\\w.])(${found.join("|")})(\\.\\w+)?(?![\\w.])`);
  return (line) => pattern.test(line.slice(1));
}

function drawText() {
  const panel = byId("text");
  if (!panel.open) return;
  const lines = data.graphs[chosen.layer]?.diff ?? [];
  const side = panel.querySelector("input:checked").value;
  const box = layerParts(chosen.layer).boxes.find(({kind}) => kind === chosen.kind);
  const place = byId("text-lines");
  if (!lines.length) {
    const why =
      "This page was made without graphs: awqc report CHECKPOINT writes them, from a checkpoint that it can load.";
    place.replaceChildren(element("div", {className: "none", textContent: why}));
    return;
  }
  place.replaceChildren(...codeLines(lines, side, box ? mentions(box.names) : null));
}

function setUpText() {
  const panel = byId("text");
  panel.addEventListener("toggle", drawText);
  panel.addEventListener("change", drawText);
}
