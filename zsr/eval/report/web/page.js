"use strict";
// Sorting: a click on a column's head sorts the rows by it, highest first, then lowest; what was not measured stays last.
for (const table of document.querySelectorAll("table.grid")) {
  const heads = [...table.tHead.rows[1].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => Number(row.cells[place + 1].dataset.value);
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (value(a) < 0) - (value(b) < 0) || (down ? value(b) - value(a) : value(a) - value(b)));
    table.tBodies[0].append(...rows);
  }));
}
// Filters: made from what the page holds, so that the page is whole without a script.
const hiddenNames = { row: new Set(), set: new Set(), block: new Set() };
function apply() {
  for (const element of document.querySelectorAll("[data-row], [data-set], [data-block]")) {
    element.hidden = ["row", "set", "block"].some((kind) => hiddenNames[kind].has(element.dataset[kind]));
  }
  for (const head of document.querySelectorAll("[data-head]")) {
    const leaves = [...head.closest("thead").rows[1].cells];
    const shown = leaves.filter((leaf) => leaf.dataset.block === head.dataset.head && !leaf.hidden).length;
    head.hidden = shown === 0;
    head.colSpan = Math.max(1, shown);
  }
}
const panel = document.getElementById("filters");
for (const [kind, title] of [["row", "Models"], ["set", "Sets"], ["block", "Attacks"]]) {
  const names = [...new Set([...document.querySelectorAll(`table.grid [data-${kind}]`)].map((one) => one.dataset[kind]))];
  if (names.length < 2) continue;
  const group = panel.querySelector(".choices").appendChild(document.createElement("fieldset"));
  group.appendChild(document.createElement("legend")).textContent = title;
  const boxes = [];
  const put = (text, checked, change) => {
    const label = group.appendChild(document.createElement("label"));
    const box = label.appendChild(document.createElement("input"));
    box.type = "checkbox";
    box.checked = checked;
    label.append(` ${text}`);
    box.addEventListener("change", () => { change(box.checked); apply(); });
    return box;
  };
  put("all", true, (on) => boxes.forEach(([box, name]) => { box.checked = on; toggle(kind, name, on); }));
  for (const name of names) boxes.push([put(name, true, (on) => toggle(kind, name, on)), name]);
  panel.hidden = false;
}
function toggle(kind, name, on) {
  if (on) hiddenNames[kind].delete(name);
  else hiddenNames[kind].add(name);
}
