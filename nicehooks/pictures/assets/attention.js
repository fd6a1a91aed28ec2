// The patterns: small pictures of all heads to choose from, then the tokens, and where the one that is looked at attends.
const bytes = Uint8Array.from(atob(data.weights), (letter) => letter.charCodeAt(0));
const weights = new DataView(bytes.buffer);
const heads = data.layers.flatMap(({ label, heads }) => [...Array(heads).keys()].map((head) => ({ layer: label, head })));
const [queries, keys] = [data.queries[0].length, data.keys[0].length];
const state = { example: 0, head: 0, from: true, token: queries - 1 };

/** How much `query` attends to `key`, from 0 to 1. */
function weight(head, query, key, example = state.example) {
  return weights.getUint16(2 * (((example * heads.length + head) * queries + query) * keys + key), true) / 65535;
}

/** Draws a pattern, queries from top to bottom; at most `most` points wide, each the largest of what it stands for. */
function draw(canvas, head, most) {
  const [width, height] = [Math.min(keys, most), Math.min(queries, most)];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  const colour = getComputedStyle(canvas).color.match(/[0-9]+/g).slice(0, 3).map(Number);
  const alpha = new Float64Array(width * height);
  for (let query = 0; query < queries; query++) {
    for (let key = 0; key < keys; key++) {
      const point = Math.floor(query * height / queries) * width + Math.floor(key * width / keys);
      alpha[point] = Math.max(alpha[point], weight(head, query, key));
    }
  }
  alpha.forEach((value, point) => picture.data.set([...colour, Math.round(255 * value)], 4 * point));
  context.putImageData(picture, 0, 0);
}

// --- all heads ---

const count = Math.max(...data.layers.map(({ heads }) => heads));
const buttons = heads.map(({ layer, head }, index) =>
  make("button", { tabIndex: index ? -1 : 0, "aria-pressed": "false", "aria-label": `layer ${layer}, head ${head}`, title: `layer ${layer}, head ${head}`,
    onclick: () => { state.head = index; show(); } }, make("canvas")));
let next = 0;
const table = make("table", { className: "heads" },
  make("thead", {}, make("tr", {}, make("th", { title: "layers down, heads across" }, "layer"), ...[...Array(count).keys()].map((head) => make("th", { scope: "col" }, String(head))))),
  make("tbody", {}, ...data.layers.map(({ label, heads }) => make("tr", {}, make("th", { scope: "row" }, label),
    ...[...Array(heads).keys()].map(() => make("td", {}, buttons[next++]))))));
moveByArrows(table, () => [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("button")]));

function drawAll() { buttons.forEach((button, head) => draw(button.firstChild, head, 48)); }

// --- the tokens of one example, and one head ---

const title = make("h2", { "aria-live": "polite" });
const said = make("p", { className: "said", role: "status" });
const texts = { queries: make("div", { className: "text" }), keys: make("div", { className: "text" }) };
const whole = make("canvas", { id: "whole", role: "img", "aria-label": "the pattern of the chosen head, queries from top to bottom" });
let spans = { queries: [], keys: [] };

function putTokens() {
  for (const side of data.cross ? ["queries", "keys"] : ["keys"]) {
    spans[side] = data[side][state.example].map((text, index) => make("span", { tabIndex: -1 }, text.replaceAll("\n", "↵") || "␣"));
    texts[side].replaceChildren(...spans[side]);
    spans[side].forEach((span, index) => {
      const look = () => { if (canLook(side)) { state.token = index; show(); } };
      for (const kind of ["pointerenter", "focus", "click"]) span.addEventListener(kind, look);
    });
  }
  if (!data.cross) spans.queries = spans.keys;
  for (const side of Object.values(texts)) if (side.firstChild) side.firstChild.tabIndex = 0;
}
/** In cross-attention only the tokens of one side attend, and only those of the other are attended to. */
function canLook(side) { return !data.cross || (side === "queries") === state.from; }

function show() {
  const { layer, head } = heads[state.head];
  const [mine, theirs] = state.from ? ["queries", "keys"] : ["keys", "queries"];
  state.token = Math.min(state.token, spans[mine].length - 1);
  title.textContent = `layer ${layer}, head ${head}`;
  buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === state.head)));
  const found = spans[theirs].map((_, other) => (state.from ? weight(state.head, state.token, other) : weight(state.head, other, state.token)));
  for (const span of [...spans.queries, ...spans.keys]) { span.style.setProperty("--weight", 0); span.classList.remove("strong", "from"); }
  found.forEach((value, other) => {
    spans[theirs][other].style.setProperty("--weight", value.toFixed(4));
    spans[theirs][other].classList.toggle("strong", value > 0.55);
  });
  spans[mine][state.token]?.classList.add("from");
  const words = (side, index) => `${JSON.stringify(data[side][state.example][index])} (${index})`;
  const most = found.map((value, other) => [value, other]).sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([value]) => value >= 0.005);
  said.textContent = `${words(mine, state.token)} ${state.from ? "attends to" : "is attended to by"} `
    + (most.map(([value, other]) => `${words(theirs, other)} ${value.toFixed(3)}`).join(", ") || "nothing");
  draw(whole, state.head, 512);
}

whole.addEventListener("pointermove", (event) => {
  const box = whole.getBoundingClientRect();
  const query = Math.min(queries - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * queries)));
  const key = Math.min(keys - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * keys)));
  state.token = state.from ? query : key;
  show();
});

const example = make("select", { onchange: () => { state.example = Number(example.value); drawAll(); putTokens(); show(); } },
  ...data.queries.map((tokens, index) => make("option", { value: String(index) }, `${index}: ${tokens.join("").slice(0, 40)}`)));
const direction = make("select", { onchange: () => { state.from = direction.value === "from"; show(); } },
  make("option", { value: "from" }, "attends to"), make("option", { value: "to" }, "is attended to by"));
const controls = make("div", { className: "controls" }, make("label", {}, "the token that is looked at ", direction));
if (data.queries.length > 1) controls.prepend(make("label", {}, "example ", example));
for (const side of Object.values(texts)) moveByArrows(side, () => [[...side.children]]);

main.append(controls, title, ...(data.cross ? [texts.queries, texts.keys] : [texts.keys]), said,
  make("div", { className: "pair" }, make("div", { className: "scroll" }, table), whole),
  make("p", { className: "faint" }, "A picture chooses its head. A token under the pointer, or reached by the tab and arrow keys, shows its weights."));
drawAll();
putTokens();
show();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); show(); });
