// The report's controls: the axes of the picture, and sorting and filtering of the tables.

const $ = (id) => document.getElementById(id);
const found = JSON.parse($("points").textContent);
const tables = [...document.querySelectorAll("table.sortable")];
const recipes = tables.filter((table) => table.id.startsWith("recipes"));

function drawPicture() {
  const axis = found.axes.find((one) => one.key === $("axis").value);
  const shown = new Set(recipes.flatMap((table) => [...table.tBodies[0].rows]).filter((row) => !row.hidden).map(nameOf));
  const points = found.rows
    .filter((row) => axis && row.data === $("data").value && shown.has(row.name) && row.costs[axis.key])
    .map((row) => {
      const [x, said] = row.costs[axis.key];
      const flag = row.flagged ? "\nFlagged: read what was found first" : "";
      const text = `${row.name}\n${row.description}\n${row.said}\n${axis.label}: ${said}${flag}`;
      return {key: row.name, name: row.name, x, y: row.score, low: row.low, high: row.high, text, flagged: row.flagged};
    });
  const title = axis ? `${found.score}, against ${axis.label}, ${points.length} recipes` : found.score;
  const labels = {x: axis ? axis.label : "", y: found.score, title, none: "No recipe to show"};
  drawChart($("chart"), points, labels, showRow);
}

function nameOf(row) {
  return row.cells[0].textContent;
}

function showRow(name) {
  for (const row of recipes.flatMap((table) => [...table.tBodies[0].rows])) {
    row.removeAttribute("aria-current");
    if (nameOf(row) !== name) continue;
    row.setAttribute("aria-current", "true");
    row.scrollIntoView({block: "nearest", inline: "nearest"});
  }
}

// Numbers by size with what is unknown last, words by the alphabet.
function sort(table, column, descending) {
  const value = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const rows = [...table.tBodies[0].rows], numbers = rows.some((row) => value(row) !== null);
  const order = descending ? -1 : 1;
  rows.sort((one, other) => {
    const [left, right] = [one, other].map((row) => row.cells[column].textContent);
    if (!numbers) return order * left.localeCompare(right, "en", {numeric: true});
    const a = value(one), b = value(other);
    return a === null || b === null ? (a === null) - (b === null) : order * (a - b);
  });
  table.tBodies[0].append(...rows);
  for (const heading of table.tHead.rows[0].cells) heading.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
}

function filter() {
  const wanted = $("find").value.trim().toLowerCase();
  let shown = 0, all = 0;
  for (const row of recipes.flatMap((table) => [...table.tBodies[0].rows])) {
    const said = [...row.querySelectorAll("th, td.text")].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !said.includes(wanted) || ($("front").checked && !row.classList.contains("front"));
    shown += !row.hidden;
    all += 1;
  }
  $("count").textContent = `${shown} of ${all} shown`;
  drawPicture();
}

for (const table of tables)
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading.getAttribute("aria-sort") === "ascending"));
    heading.append(button);
  });
$("axis").append(...found.axes.map((axis) => new Option(axis.label, axis.key)));
const datasets = [...new Set(found.rows.map((row) => row.data))];
$("data").append(...datasets.map((name) => new Option(name)));
$("datasets").hidden = datasets.length < 2;
$("axis").addEventListener("change", drawPicture);
$("data").addEventListener("change", drawPicture);
$("find").addEventListener("input", filter);
$("front").addEventListener("change", filter);
for (const controls of document.querySelectorAll("[data-script]")) controls.hidden = false;
let width = 0;
new ResizeObserver(() => {
  if ($("chart").clientWidth === width) return;
  width = $("chart").clientWidth;
  drawPicture();
}).observe($("chart"));
filter();

// On paper everything is open, and as it was on the screen afterwards.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
