// A node that is looked at lights up its edges; the edges are listed, sorted by whatever heading is clicked.
const drawing = document.querySelector("svg");
const [lines, boxes] = [[...drawing.querySelectorAll(".edge")], [...drawing.querySelectorAll(".node")]];

function light(box) {
  const node = box.dataset.node, ends = new Set([node]), said = [];
  for (const line of lines) {
    const on = line.dataset.from === node || line.dataset.to === node;
    line.classList.toggle("on", on);
    if (on) { ends.add(line.dataset.from).add(line.dataset.to); said.unshift(line.textContent); }
  }
  for (const other of boxes) other.classList.toggle("on", ends.has(other.dataset.node));
  drawing.classList.add("lit");
  const more = said.length > 8 ? `\n… ${said.length - 8} more` : "";
  tell(box, said.length ? said.slice(0, 8).join("\n") + more : `${node}: no edges`);
}
function unlight() { drawing.classList.remove("lit"); hush(); }

for (const box of boxes) {
  box.addEventListener("pointerenter", () => light(box));
  box.addEventListener("pointerleave", unlight);
  box.addEventListener("focus", () => light(box));
  box.addEventListener("blur", unlight);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); boxes[(boxes.indexOf(box) + step + boxes.length) % boxes.length].focus(); }
  });
}
boxes.slice(1).forEach((box) => box.setAttribute("tabindex", "-1"));
drawing.addEventListener("focusin", (event) => {
  for (const box of boxes) box.setAttribute("tabindex", box === event.target ? "0" : "-1");
});

const titles = ["from", "to", "into", "effect"];
const kept = titles.map((_, column) => column).filter((column) => column !== 2 || data.edges.some((edge) => edge[2]));
const body = make("tbody");
const heads = kept.map((column) => make("th", { scope: "col" }, make("button", { onclick: () => sortBy(column) }, titles[column])));
let order = { column: 3, down: true };

function sortBy(column) {
  order = { column, down: order.column === column ? !order.down : column === 3 };
  listEdges();
}
function listEdges() {
  const key = (edge) => (order.column === 3 ? Math.abs(edge[3] ?? -1) : edge[order.column]);
  const compare = (a, b) => (order.column === 3 ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
  const sorted = [...data.edges].sort((a, b) => (order.down ? -1 : 1) * compare(a, b));
  body.replaceChildren(...sorted.map((edge) => make("tr", {}, ...kept.map((column) =>
    make("td", {}, column === 3 ? shown(edge[3]) : edge[column])))));
  kept.forEach((column, index) => {
    const sort = order.column === column ? (order.down ? "descending" : "ascending") : "none";
    heads[index].setAttribute("aria-sort", sort);
    heads[index].firstChild.textContent = titles[column] + { descending: " ▼", ascending: " ▲", none: "" }[sort];
  });
}
listEdges();
main.append(make("p", { className: "faint" }, "A node under the pointer, or reached by the tab and arrow keys, lights up its edges."),
  make("div", { className: "scroll" }, make("table", { className: "list" }, make("thead", {}, make("tr", {}, ...heads)), body)));
