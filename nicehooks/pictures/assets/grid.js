// The grid: its cells, the axes that are not shown at once, sorting by a row or a column.
const [rows, columns, ...others] = [...data.axes, { name: "", labels: [""] }, { name: "", labels: [""] }].slice(0, Math.max(2, data.axes.length));
const barred = data.axes.length < 2;
const sizes = [rows, columns, ...others].map((axis) => axis.labels.length);
const strides = sizes.map((_, axis) => sizes.slice(axis + 1).reduce((a, b) => a * b, 1));
const chosen = others.map((axis) => (axis.labels.length > 1 ? null : 0)); // an index of each further axis; null is the mean
const most = Math.max(...data.values.map((value) => Math.abs(value ?? 0)), 0) || 1;
const numbered = columns.labels.length <= 24;

/** The numbers of the cells of the data that are shown at one place of the grid. */
function behind(row, column) {
  let cells = [row * strides[0] + column * strides[1]];
  others.forEach((axis, index) => {
    const picked = chosen[index] === null ? axis.labels.map((_, one) => one) : [chosen[index]];
    cells = cells.flatMap((cell) => picked.map((one) => cell + one * strides[index + 2]));
  });
  return cells;
}
function valueAt(row, column) {
  const found = behind(row, column).map((cell) => data.values[cell]).filter((value) => value !== null);
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
}

/** All that is known of a cell, in words. */
function wordsFor(row, column) {
  const cells = behind(row, column);
  const place = [[rows, row], [columns, column], ...others.map((axis, index) => [axis, chosen[index]])];
  const where = place.filter(([axis]) => axis.name).map(([axis, one]) => `${axis.name} ${one === null ? "(mean)" : axis.labels[one]}`);
  const spread = cells.length === 1 && data.spread ? data.spread[cells[0]] : null;
  const site = cells.length === 1 && data.sites ? `\n${data.sites[cells[0]]}` : "";
  return `${where.join(", ")}: ${shown(valueAt(row, column), 5)}${spread === null ? "" : ` ± ${shown(spread, 3).slice(1)}`}${site}`;
}

// --- the table ---

const table = make("table", { className: barred ? "grid bars" : "grid", role: "grid" });
const corner = make("button", { title: "the order of the beginning", onclick: reset, tabIndex: 0 },
  barred ? rows.name : `${rows.name} \\ ${columns.name}`);
const columnHeads = columns.labels.map((label, column) =>
  make("th", { scope: "col", "aria-sort": "none" },
    make("button", { tabIndex: -1, title: `sort by ${columns.name || "effect"} ${label}`, onclick: () => sortRows(column) }, barred ? "effect" : label)));
const head = make("tr", {}, make("th", { className: "corner", scope: "col" }, corner), ...columnHeads);
const lines = rows.labels.map((label, row) => {
  const name = make("button", { tabIndex: -1, onclick: () => sortColumns(row) }, label);
  const cells = columns.labels.map((_, column) => {
    const cell = make("td", { tabIndex: -1, role: "gridcell" });
    cell.place = [row, column];
    return cell;
  });
  return { line: make("tr", {}, make("th", { scope: "row", "aria-sort": "none" }, name), ...cells), cells };
});
const body = make("tbody", {}, ...lines.map(({ line }) => line));
table.append(make("thead", {}, head), body);

function paint() {
  lines.forEach(({ cells }, row) => cells.forEach((cell, column) => {
    const value = valueAt(row, column), share = Math.abs(value ?? 0) / most;
    cell.className = value === null ? "none" : `${value < 0 ? "down" : "up"}${share > 0.55 ? " strong" : ""}${numbered ? " numbered" : ""}`;
    cell.style.setProperty("--share", share.toFixed(3));
    if (barred) bar(cell, value, share);
    else if (numbered) cell.textContent = value === null ? "" : brief(value);
  }));
}
function brief(value) {
  const text = most >= 1000 || most < 0.01 ? value.toExponential(0) : value.toFixed(most >= 10 ? 1 : 2);
  return (Number(text) === 0 ? "0" : text).replace("-", "−");
}
const signs = [data.values.some((value) => value > 0), data.values.some((value) => value < 0)];
function bar(cell, value, share) {
  const zero = !signs[1] ? 0 : !signs[0] ? 100 : 50, room = signs[0] && signs[1] ? 50 : 100;
  const filled = make("span", { className: "bar" });
  filled.style.width = `${share * room}%`;
  if (value < 0) filled.style.right = `${100 - zero}%`;
  else filled.style.left = `${zero}%`;
  const line = make("span", { className: "zero" });
  line.style.left = `${zero}%`;
  cell.replaceChildren(make("div", {}, line, filled), make("span", {}, shown(value, 3)));
}

// --- sorting ---

let sorted = { by: "", down: true };
function mark(element, by) {
  const turn = sorted.by !== by ? "descending" : sorted.down ? "ascending" : "none";
  for (const each of table.querySelectorAll("[aria-sort]")) each.setAttribute("aria-sort", "none");
  element.setAttribute("aria-sort", turn);
  sorted = { by: turn === "none" ? "" : by, down: turn === "descending" };
  return turn;
}
function orderOf(count, turn, value) {
  const order = [...Array(count).keys()];
  if (turn === "none") return order;
  const key = (one) => value(one) ?? -Infinity;
  return order.sort((a, b) => (turn === "descending" ? key(b) - key(a) : key(a) - key(b)) || a - b);
}
function keepingFocus(change) {
  const focused = document.activeElement;
  change();
  if (table.contains(focused)) focused.focus();
}
function putRows(order) { keepingFocus(() => body.append(...order.map((row) => lines[row].line))); }
function putColumns(order) {
  keepingFocus(() => {
    head.append(...order.map((column) => columnHeads[column]));
    for (const { line, cells } of lines) line.append(...order.map((column) => cells[column]));
  });
}
function sortRows(column) {
  putRows(orderOf(rows.labels.length, mark(columnHeads[column], `column ${column}`), (row) => valueAt(row, column)));
}
function sortColumns(row) {
  if (barred) return;
  const turn = mark(lines[row].line.firstChild, `row ${row}`);
  putColumns(orderOf(columns.labels.length, turn, (column) => valueAt(row, column)));
}
function reset() {
  for (const each of table.querySelectorAll("[aria-sort]")) each.setAttribute("aria-sort", "none");
  sorted = { by: "", down: true };
  putRows([...rows.labels.keys()]);
  putColumns([...columns.labels.keys()]);
}

// --- looking at cells ---

function look(event) {
  const cell = event.target.closest("td");
  if (cell) tell(cell, wordsFor(...cell.place));
  else hush();
}
table.addEventListener("pointerover", look);
table.addEventListener("focusin", look);
table.addEventListener("pointerleave", hush);
table.addEventListener("focusout", hush);
moveByArrows(table, () => [...table.rows].map((line) => [...line.cells].map((cell) => cell.querySelector("button") ?? cell)));

const controls = make("div", { className: "controls" });
others.forEach((axis, index) => {
  if (axis.labels.length < 2) return;
  const choose = make("select", { onchange: () => { chosen[index] = choose.value === "" ? null : Number(choose.value); paint(); } },
    make("option", { value: "" }, "mean"), ...axis.labels.map((label, one) => make("option", { value: String(one) }, label)));
  controls.append(make("label", {}, `${axis.name} `, choose));
});

paint();
main.append(...data.notes.map((note) => make("p", { className: "faint" }, note)));
if (controls.children.length) main.append(controls);
main.append(make("div", { className: "scroll" }, table));
if (!barred) main.append(make("div", { className: "scale" }, shown(-most, 3), make("i"), shown(most, 3)));
main.append(make("p", { className: "faint" }, barred
  ? "A click on the heading sorts, on the corner puts back the order. The arrow keys move from bar to bar, Enter sorts."
  : "A click on a label sorts by its row or column, on the corner puts back the order. The arrow keys move, Enter sorts."));
