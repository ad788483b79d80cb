// Every linear: sorted, searched and shown a page at a time, so that 100,000 rows cost as little as 25.

const PAGE = 25;
const COLUMNS = [
  {id: "name", label: "Linear", cell: nameCell},
  {id: "shape", label: "N × K", number: true, wide: true, value: weightsOf, cell: shapeOf},
  {
    id: "scheme",
    label: "Scheme",
    wide: true,
    value: (i) => linears.scheme[i],
    cell: (i) =>
      textOf("scheme", i) || element("span", {className: "tag", textContent: textOf("decision", i)}),
  },
  {
    id: "before",
    label: "Nearest",
    number: true,
    value: (i) => linears.before[i],
    cell: (i) => percent(linears.before[i]),
  },
  {id: "after", label: "Stored", number: true, value: (i) => linears.after[i], cell: afterCell},
  {
    id: "change",
    label: "Change",
    number: true,
    wide: true,
    value: (i) =>
      linears.after[i] === null || !linears.before[i] ? null : linears.after[i] / linears.before[i],
    cell: (i) => change(linears.before[i], linears.after[i]),
  },
  {
    id: "clipped",
    label: "Clipped",
    number: true,
    wide: true,
    value: (i) => linears.clipped[i],
    cell: (i) => percent(linears.clipped[i]),
  },
  {
    id: "bytes",
    label: "Size",
    number: true,
    wide: true,
    value: (i) => linears.bytes[i],
    cell: (i) => bytes(linears.bytes[i]),
  },
];

const table = {
  order: Uint32Array.from({length: count}, (_, i) => i),
  sort: null,
  descending: false,
  page: 0,
  open: null,
  texts: null,
};

function nameCell(i) {
  const button = element("button", {type: "button", className: "plain name"}, breakable(linearName(i)));
  button.setAttribute("aria-expanded", String(table.open === i));
  button.addEventListener("click", () => {
    table.open = table.open === i ? null : i;
    drawRows();
    byId("table").querySelector(`[data-row="${i}"] button`)?.focus();
  });
  return button;
}

function afterCell(i) {
  if (linears.after[i] === null) return "";
  const swatch = element("span", {className: "swatch"});
  swatch.style.background = shade(linears.after[i]);
  return element("span", {}, swatch, percent(linears.after[i]));
}

// What a search looks in: made when the first search begins.
function searchTexts() {
  table.texts ??= Array.from({length: count}, (_, i) =>
    [
      linearName(i),
      textOf("decision", i),
      textOf("reason", i),
      textOf("scheme", i),
      textOf("backend", i),
      textOf("no_group", i),
      textOf("rounding", i),
    ]
      .join(" ")
      .toLowerCase(),
  );
  return table.texts;
}

function arrange() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const decision = byId("decision").value;
  const texts = words.length ? searchTexts() : null;
  const kept = [];
  for (let i = 0; i < count; ++i) {
    if (decision && textOf("decision", i) !== decision) continue;
    if (texts && !words.every((word) => texts[i].includes(word))) continue;
    kept.push(i);
  }
  const column = COLUMNS.find(({id}) => id === table.sort);
  if (column) {
    const sign = table.descending ? -1 : 1;
    const names = column.value ? null : kept.map((i) => [i, linearName(i)]);
    if (names) {
      const collator = new Intl.Collator("en", {numeric: true});
      names.sort((a, b) => sign * collator.compare(a[1], b[1]));
      kept.splice(0, kept.length, ...names.map(([i]) => i));
    } else {
      const values = new Map(kept.map((i) => [i, column.value(i)]));
      // What has no value comes last either way.
      kept.sort((a, b) => {
        const [x, y] = [values.get(a), values.get(b)];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (x - y) || a - b;
      });
    }
  }
  table.order = kept;
  table.page = 0;
  drawRows();
}

function drawHead() {
  const row = element("tr");
  for (const column of COLUMNS) {
    const cell = element("th", {scope: "col", className: classOf(column)});
    const active = table.sort === column.id;
    if (active) cell.setAttribute("aria-sort", table.descending ? "descending" : "ascending");
    const sign = element("span", {
      className: "sign",
      textContent: active ? (table.descending ? "↓" : "↑") : "",
    });
    sign.setAttribute("aria-hidden", "true");
    const button = element(
      "button",
      {type: "button"},
      ...(column.number ? [sign, column.label] : [column.label, sign]),
    );
    button.addEventListener("click", () => {
      // Errors are looked at from the largest down, and a third click gives the order of the model back.
      const first = Boolean(column.number);
      if (!active) Object.assign(table, {sort: column.id, descending: first});
      else if (table.descending === first) table.descending = !first;
      else table.sort = null;
      drawHead();
      arrange();
      byId("table").querySelectorAll("th button")[COLUMNS.indexOf(column)].focus();
    });
    cell.append(button);
    row.append(cell);
  }
  byId("table").tHead.replaceChildren(row);
}

const classOf = (column) =>
  [`of-${column.id}`, column.number ? "number" : "", column.wide ? "wide" : ""].join(" ").trim();

function drawRows() {
  const first = table.page * PAGE;
  const shown = [...table.order.slice(first, first + PAGE)];
  const rows = shown.flatMap((i) => {
    const row = element("tr");
    row.dataset.row = i;
    for (const column of COLUMNS) row.append(element("td", {className: classOf(column)}, column.cell(i)));
    return table.open === i ? [row, moreRow(i)] : [row];
  });
  byId("table").tBodies[0].replaceChildren(...rows);
  const total = table.order.length;
  const range = total
    ? `${whole(first + 1)}–${whole(first + shown.length)} of ${plural(total, "linear")}`
    : "No linear matches";
  byId("page-range").textContent = range;
  byId("page-previous").disabled = first === 0;
  byId("page-next").disabled = first + PAGE >= total;
}

function moreRow(i) {
  const go = element("button", {type: "button", textContent: `Show in ${layerName(linears.layer[i])}`});
  go.addEventListener("click", () => {
    choose(linears.layer[i], kindWithin(linears.layer[i], linearName(i)));
    byId("layer").scrollIntoView();
    byId("layer-choice").focus({preventScroll: true});
  });
  const cell = element("td", {colSpan: COLUMNS.length}, linearFacts(i), go);
  return element("tr", {className: "more"}, cell);
}

function setUpTable() {
  const decisions = d3.rollups(
    d3.range(count),
    (v) => v.length,
    (i) => textOf("decision", i),
  );
  byId("decision").append(
    element("option", {value: "", textContent: `All decisions (${whole(count)})`}),
    ...decisions.map(([what, n]) => element("option", {value: what, textContent: `${what} (${whole(n)})`})),
  );
  byId("search").addEventListener("input", arrange);
  byId("decision").addEventListener("change", arrange);
  const turn = (by) => () => {
    table.page += by;
    drawRows();
    byId("linears").scrollIntoView();
  };
  byId("page-previous").addEventListener("click", turn(-1));
  byId("page-next").addEventListener("click", turn(1));
  drawHead();
  drawRows();
}
