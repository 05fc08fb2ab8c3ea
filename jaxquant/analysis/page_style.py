"""The style and the script of the page: plain CSS and JavaScript, nothing loaded from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --line: #d9dde2; --ink: #1d2430; --dim: #5d6673; --ground: #fff;
  --raised: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a414c; --ink: #e3e7ec; --dim: #a0a8b4; --ground: #16191f; --raised: #222730; }
}
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 16px; font-size: 26px; }
h2 { margin: 32px 0 8px; font-size: 19px; }
h3 { margin: 20px 0 4px; font-size: 15px; font-family: ui-monospace, monospace;
  overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
.cards b { display: block; font-size: 20px; }
.cards span { color: var(--dim); font-size: 13px; }
li { overflow-wrap: anywhere; }
details { margin: 8px 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--dim); }
.wide { overflow: auto; max-height: 640px; border: 1px solid var(--line); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; z-index: 1; background: var(--raised); text-align: left;
  white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; border-right: 1px solid var(--line); }
th:first-child { z-index: 2; }
td:first-child { background: var(--ground); max-width: 40vw; overflow: hidden;
  text-overflow: ellipsis; }
th button { font: inherit; font-weight: 600; color: inherit; border: 0; background: none;
  padding: 6px 8px; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
td { padding: 4px 8px; border-top: 1px solid var(--line); white-space: nowrap; }
th.number { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.float td { color: var(--dim); }
pre { background: var(--raised); padding: 12px; overflow-x: auto; }
.figure { overflow-x: auto; margin: 8px 0; }
.figure img { display: block; max-width: none; border-radius: 6px; background: #fff; }
@media (min-width: 900px) { .figure img { max-width: 100%; height: auto; } }
@media (max-width: 500px) { main { padding: 12px; } }
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
