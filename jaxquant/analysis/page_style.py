"""The style and the script of the page: plain CSS and JavaScript, nothing loaded from elsewhere."""

STYLE = """
:root { color-scheme: light; --line: #d9dde2; --ink: #1d2430; --dim: #5d6673; --blue: #1f6f8b; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 16px; font-size: 26px; }
h2 { margin: 32px 0 8px; font-size: 19px; }
h3 { margin: 20px 0 4px; font-size: 15px; font-family: ui-monospace, monospace; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
.cards b { display: block; font-size: 20px; }
.cards span { color: var(--dim); font-size: 13px; }
.wide { overflow-x: auto; max-height: 640px; overflow-y: auto; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: #f3f5f7; text-align: left; white-space: nowrap; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 6px 8px;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
td { padding: 4px 8px; border-top: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.float td { color: var(--dim); }
pre { background: #f3f5f7; padding: 12px; overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; margin: 8px 0; }
footer { margin-top: 40px; color: var(--dim); font-size: 13px; }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    const value = row => row.cells[column].dataset.value;
    const numeric = rows.every(row => value(row) === "" || !isNaN(Number(value(row))));
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return ascending ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
