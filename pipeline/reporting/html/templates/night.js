"use strict";
// Sorting and filtering. Without this script everything can be read, too.
const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b) : difference;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        return x === "" || y === "" || up ? compare(x, y) : compare(y, x);
      });
      body.append(...rows);
    });
  });
}

const form = document.querySelector("form.filter");
const rows = [...document.querySelectorAll(".filtered tbody tr")];
function filter() {
  const [words, decision] = [form.querySelector("input").value.toLowerCase(), form.querySelector("select").value];
  for (const row of rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(words)
      || (decision !== "" && row.dataset.decision !== decision);
  }
  const fold = document.querySelector("details.fold");
  if (fold && (words || decision)) fold.open = [...fold.querySelectorAll("tbody tr")].some((row) => !row.hidden);
  form.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} tasks`;
}
form.hidden = rows.length < 2;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
