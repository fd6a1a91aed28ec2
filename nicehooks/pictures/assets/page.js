"use strict";
// What all pages share: their data, making elements, a tip beside what is looked at, moving by arrow keys.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");

/** A new element; what is in it is text, never HTML. */
function make(kind, properties = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A number for people, with its sign. */
function shown(number, digits = 4) {
  if (number === null || Number.isNaN(number)) return "none";
  return (number > 0 ? "+" : "") + String(Number(number.toPrecision(digits))).replace("-", "−");
}

const tip = document.body.appendChild(make("div", { id: "tip", role: "status" }));

/** Shows `text` below `element`, or above where there is no room; screen readers say it, too. */
function tell(element, text) {
  tip.textContent = text;
  const at = element.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = at.bottom + 6, above = at.top - size.height - 6;
  const top = below + size.height > innerHeight && above > 0 ? above : below;
  const left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - size.width - 4));
  tip.style.top = `${top + scrollY}px`;
  tip.style.left = `${left + scrollX}px`;
}
function hush() { tip.textContent = ""; }
addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });

/** One stop of the tab key for all of `stops()`, a list of rows of elements; arrows, Home and End move in it. */
function moveByArrows(root, stops) {
  root.addEventListener("focusin", (event) => {
    for (const other of root.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    event.target.tabIndex = 0;
  });
  root.addEventListener("keydown", (event) => {
    const rows = stops();
    const row = rows.findIndex((each) => each.includes(document.activeElement));
    if (row < 0) return;
    const column = rows[row].indexOf(document.activeElement);
    const to = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, rows[row].length - 1] }[event.key];
    if (!to) return;
    event.preventDefault();
    const target = rows[to[0]]?.[Math.min(to[1], rows[to[0]].length - 1)];
    if (target) { target.focus(); target.scrollIntoView({ block: "nearest", inline: "nearest" }); }
  });
}

// In a notebook: as high as the page is, and dark where JupyterLab is, whatever the system says.
if (window.frameElement) {
  const dark = parent.document.body.dataset.jpThemeLight;
  if (dark !== undefined) document.documentElement.style.colorScheme = dark === "false" ? "dark" : "light";
  new ResizeObserver(() => { frameElement.style.height = `${document.body.offsetHeight + 4}px`; }).observe(document.body);
}
