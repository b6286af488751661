"use strict";
// Tables sort by a click on a column's name; long ones have a filter. Escape closes the list of a cell.
const names = new Intl.Collator(undefined, { numeric: true });
function compare(a, b) {
  const [x, y] = [a, b].map((text) => parseFloat(text.replace(/,/g, "")));
  return (/^[-+]?[\d.,]+( %)?$/.test(a) && /^[-+]?[\d.,]+( %)?$/.test(b) && x - y) || names.compare(a, b);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const rows = [...table.tBodies[0].rows];
  for (const head of table.tHead.rows[0].cells) {
    if (!head.textContent) continue;
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      const text = (row) => row.cells[head.cellIndex].textContent;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      table.tBodies[0].append(...rows.sort((a, b) => sign * compare(text(a), text(b))));
    };
  }
  if (rows.length < 12) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = filter.ariaLabel = `Filter ${rows.length} rows`;
  filter.oninput = () => {
    const wanted = filter.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  };
  table.parentNode.before(filter);
}
document.onkeydown = (event) => {
  if (event.key === "Escape" && location.hash) location.hash = "matrix";
};
