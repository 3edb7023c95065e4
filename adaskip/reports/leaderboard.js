"use strict";
// Sorts the tables by their column buttons, and filters their rows by the form above the first.
const form = document.querySelector("form");
const boards = [...document.querySelectorAll("table.board")];

const valueOf = (row, column) => {
  const text = row.cells[column].dataset.value;
  const value = Number(text);
  return text === "" ? null : Number.isNaN(value) ? text : value;
};

const compare = (a, b) => (typeof a === "string" || typeof b === "string")
  ? String(a).localeCompare(String(b)) : a - b;

function sortBy(button) {
  const head = button.closest("th");
  const table = head.closest("table");
  const rising = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const body = table.tBodies[0];
  const ordered = [...body.rows].sort((one, two) => {
    const [a, b] = [valueOf(one, head.cellIndex), valueOf(two, head.cellIndex)];
    if (a === null || b === null) return (a === null) - (b === null); // nothing comes last
    return rising ? compare(a, b) : compare(b, a);
  });
  body.append(...ordered);
}

function filter() {
  const wanted = new FormData(form);
  const fits = (row) => ["model", "context", "method"].every(
    (key) => !wanted.get(key) || row.dataset[key] === wanted.get(key) ||
      (key === "method" && row.dataset.method === "dense")) &&
    (!wanted.has("front") || row.dataset.front === "yes");
  for (const board of boards) {
    const rows = [...board.tBodies[0].rows];
    for (const row of rows) row.hidden = !fits(row);
    board.closest("section").querySelector("[role=status]").textContent =
      `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  }
}

for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button));
form.addEventListener("change", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
