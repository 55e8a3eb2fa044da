"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.querySelector("form.filters");
const dialog = document.querySelector("dialog");
const article = dialog.querySelector("article");
const table = document.querySelector("table");
const bodies = [...table.tBodies];

/* --- building what a dialog shows; text only, never markup --- */

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

const pill = (status) => element("span", { class: "pill " + status.replaceAll(" ", "-") }, status);

function pairs(entries) {
  const list = element("dl");
  for (const [term, value] of entries) {
    if (value === undefined || value === null || value === "") continue;
    list.append(element("dt", null, term), element("dd", null, value));
  }
  return list;
}

function save(name, content, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function copier(text) {
  return element("button", { type: "button", onclick: async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      button.textContent = "copying is not allowed here";
    }
  } }, "copy");
}

function program(name, [text, input]) {
  const stored = name.replace(/\.py$/, ".safetensors");
  const buttons = element("div", { class: "buttons" }, copier(text),
    element("button", { type: "button", onclick: () => save(name, text, "text/x-python") }, "save " + name));
  if (input) {
    const bytes = () => Uint8Array.from(atob(input), (character) => character.charCodeAt(0));
    buttons.append(element("button", { type: "button",
      onclick: () => save(stored, bytes(), "application/octet-stream") }, "save " + stored));
  }
  return element("details", { open: true },
    element("summary", null, "reproduction: plain PyTorch, no harness"),
    element("p", { class: "quiet" }, "Save both files into one folder and run: python " + name),
    buttons, element("pre", { tabindex: "0" }, text));
}

function entry(found, column) {
  const failure = found.failure;
  const part = element("section", null, element("h3", null, "through " + found.entry + " ", pill(found.status)));
  if (found.reason) part.append(element("p", null, found.reason));
  if (failure.kind === "error") {
    part.append(pairs([["error", element("span", { class: "number" }, failure.summary)], ["input", failure.words]]));
    if (failure.detail) part.append(element("pre", { tabindex: "0" }, failure.detail));
  } else if (failure.summary) {
    part.append(pairs([
      ["quantity", failure.aspect],
      ["expected", element("span", { class: "number expected" }, failure.expected || "")],
      ["got", element("span", { class: "number got" }, failure.got || "")],
      ["besides", failure.detail],
      ["input", failure.words],
      ["note", failure.secondary ? "wrong already where this rule plays no part: the cause lies elsewhere" : ""],
    ]));
  } else if (found.examples) {
    const recorded = found.recorded ? ", " + found.recorded + " of them recorded from upstream" : "";
    part.append(element("p", { class: "quiet" }, found.examples + " examples" + recorded
      + (found.outOfTime ? "; fewer than asked for, out of time" : "")));
  }
  const source = column.programs[failure.reproduction];
  if (source) part.append(program(failure.reproduction, source));
  return part;
}

function diagnosis(column) {
  if (!column.diagnosis.length) return null;
  return element("section", { class: "diagnosis" }, element("h3", null, "diagnosis of " + column.name),
    ...column.diagnosis.map((line) => element("p", null, line)));
}

function show(title, ...parts) {
  const close = element("button", { type: "button", class: "close", onclick: () => dialog.close() }, "close");
  article.replaceChildren(element("header", null, element("h2", { id: "dialog-title" }, title), close),
    ...parts.filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  close.focus();
}

function openCell(id, index) {
  const requirement = data.requirements[id], column = data.columns[index], cell = data.cells[id][index];
  show(id + " · " + column.name,
    element("section", null, element("p", null, pill(cell.status), " " + requirement.statement),
      cell.reason ? element("p", null, cell.reason) : null,
      pairs([["level", requirement.level], ["why", requirement.why], ["source", requirement.source]])),
    ...cell.entries.map((found) => entry(found, column)),
    cell.entries.some((found) => found.status === "failed") ? diagnosis(column) : null);
}

function openColumn(index) {
  const column = data.columns[index];
  const refused = Object.entries(column.refused || {}).map(([dtype, why]) => dtype + ": " + why).join("; ");
  const versions = Object.entries(column.versions || {}).map(([name, version]) => name + " " + version).join(", ");
  show(column.name,
    element("section", null, element("p", null, column.verdict || column.message),
      pairs([["package", column.version], ["device", column.device], ["dtypes", (column.dtypes || []).join(", ")],
        ["not judged", refused], ["offers", (column.offered || []).join(", ")], ["run", column.run],
        ["versions", versions]])),
    diagnosis(column));
}

/* --- filters; the address keeps them, so that a view can be sent to somebody --- */

function chosen() {
  const values = new FormData(form);
  return { family: values.get("family"), level: values.get("level"), statuses: values.getAll("status") };
}

function filter() {
  const { family, level, statuses } = chosen();
  let shown = 0;
  for (const body of bodies) {
    let visible = 0;
    const folded = body.querySelector(".fold").getAttribute("aria-expanded") === "false";
    for (const row of body.querySelectorAll("tr[data-id]")) {
      const cells = [...row.querySelectorAll(".cell")];
      const fits = (!family || body.dataset.family === family) && (!level || row.dataset.level === level)
        && (!statuses.length || cells.some((cell) => statuses.includes(cell.dataset.status)));
      visible += fits;
      row.hidden = !fits || folded;
      for (const cell of cells) {
        cell.classList.toggle("aside", statuses.length > 0 && !statuses.includes(cell.dataset.status));
      }
    }
    body.hidden = !visible;
    shown += visible;
  }
  const all = Object.keys(data.requirements).length;
  document.querySelector(".shown").textContent = shown === all ? "" : shown + " of " + all + " requirements";
  document.querySelector(".nothing").hidden = shown > 0;
  document.querySelector(".wide").hidden = shown === 0;
  rove();
}

function remember(cell) {
  const { family, level, statuses } = chosen();
  const parts = new URLSearchParams();
  if (family) parts.set("family", family);
  if (level) parts.set("level", level);
  for (const status of statuses) parts.append("status", status);
  if (cell) parts.set("cell", cell);
  try {
    history.replaceState(null, "", parts.size ? "#" + parts : location.pathname + location.search);
  } catch { /* a sandboxed frame has no address of its own */ }
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  form.reset();
  for (const name of ["family", "level"]) {
    const wanted = parts.get(name) || "";
    if ([...form.elements[name].options].some((option) => option.value === wanted)) form.elements[name].value = wanted;
  }
  for (const box of form.querySelectorAll("[name=status]")) box.checked = parts.getAll("status").includes(box.value);
  filter();
  const [id, ...rest] = (parts.get("cell") || "").split("@");
  const index = data.columns.findIndex((column) => column.name === rest.join("@"));
  if (data.requirements[id] && index >= 0) {
    const cell = table.querySelector(`tr[data-id="${CSS.escape(id)}"] .cell[data-column="${index}"]`);
    if (!cell.closest("tr").hidden && !cell.closest("tbody").hidden) {
      cell.scrollIntoView({ block: "center", inline: "center" });
      focusOn(cell);
    }
    openCell(id, index);
  }
}

/* --- keyboard: one tab stop for the table, arrows inside it --- */

function lines() {
  return [...table.rows].filter((row) => !row.hidden && !row.parentElement.hidden)
    .map((row) => [...row.cells].map((cell) => cell.querySelector("button")));
}

let current = null;
let wanted = 1;

function rove(next) {
  const buttons = lines().flat().filter(Boolean);
  if (next) current = next;
  if (!buttons.includes(current)) current = table.querySelector("tbody:not([hidden]) tr[data-id]:not([hidden]) .cell")
    || buttons[0];
  for (const button of table.querySelectorAll("button")) button.tabIndex = button === current ? 0 : -1;
}

function focusOn(button) {
  rove(button);
  button.focus();
}

function neighbour(grid, row, column, key, control) {
  const along = grid[row];
  if (key === "Home") return control ? grid[0].find(Boolean) : along.find(Boolean);
  if (key === "End") return (control ? grid.at(-1) : along).findLast(Boolean);
  if (key === "ArrowLeft") return along.slice(0, column).findLast(Boolean);
  if (key === "ArrowRight") return along.slice(column + 1).find(Boolean);
  const next = grid[row + (key === "ArrowUp" ? -1 : 1)];
  return next && (next[wanted] || next.find(Boolean));
}

table.addEventListener("keydown", (event) => {
  if (!/^(Arrow(Up|Down|Left|Right)|Home|End)$/.test(event.key) || event.altKey || event.metaKey) return;
  const grid = lines();
  const from = event.target.closest("button");
  const row = grid.findIndex((line) => line.includes(from));
  if (row < 0) return;
  event.preventDefault();
  const column = grid[row].indexOf(from);
  if (column > 0) wanted = column;
  const target = neighbour(grid, row, column, event.key, event.ctrlKey);
  if (target) focusOn(target);
});

table.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  rove(button);
  const index = Number(button.dataset.column);
  if (button.classList.contains("cell")) {
    const id = button.closest("tr").dataset.id;
    openCell(id, index);
    remember(id + "@" + data.columns[index].name);
  } else if (button.classList.contains("head")) openColumn(index);
  else fold(button, button.getAttribute("aria-expanded") === "true");
});

function fold(button, folded) {
  button.setAttribute("aria-expanded", String(!folded));
  foldAll.textContent = anyOpen() ? "fold all" : "unfold all";
  filter();
}

const foldAll = form.querySelector("[data-do=fold]");
const folders = () => [...table.querySelectorAll(".fold")];
const anyOpen = () => folders().some((button) => button.getAttribute("aria-expanded") === "true");

foldAll.addEventListener("click", () => {
  const folded = anyOpen();
  for (const button of folders()) fold(button, folded);
});

dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  remember();
  if (current && current.isConnected) current.focus();
});
form.addEventListener("change", () => { filter(); remember(); });
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => {
  for (const button of folders()) button.setAttribute("aria-expanded", "true");
  foldAll.textContent = "fold all";
  filter();
  remember();
}));

/* What is focused must not end up behind the head or the first column, which stay in place. */
function edges() {
  const wide = document.querySelector(".wide");
  wide.style.setProperty("--above", table.tHead.offsetHeight + "px");
  wide.style.setProperty("--beside", table.querySelector("tbody th").offsetWidth + "px");
}

window.addEventListener("resize", edges);
window.addEventListener("hashchange", recall);
document.querySelector(".note").hidden = true;
const filterBox = document.querySelector(".filter");
filterBox.hidden = false;
filterBox.open = !matchMedia("(max-width: 44rem)").matches;
edges();
recall();
if (document.querySelector(".shown").textContent) filterBox.open = true;
