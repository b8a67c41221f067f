// A picture of points as inline SVG: the pointer, a finger or the arrow keys move between them and say what each is.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Round numbers that cover an interval, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((multiple) => multiple * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12); k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

// Numbers of one axis, all with as many digits as tell the closest two apart.
function said(numbers) {
  const largest = Math.max(...numbers.map(Math.abs));
  if (largest >= 1e6 || (largest < 1e-3 && largest > 0))
    return numbers.map((n) => n === 0 ? "0" : n.toExponential().replace("e+", "e"));
  const step = numbers.length > 1 ? numbers[1] - numbers[0] : largest || 1;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return numbers.map((n) => n.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits}));
}

// What no other point beats in both, from the cheapest to the best; less is better of both.
function front(points) {
  const found = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || a.y - b.y))
    if (!found.length || point.y < found.at(-1).y) found.push(point);
  return found;
}

/* Draws `points` into `place`, an element of class chart.

A point is {key, name, x, y, low, high, text, flagged}: its interval may be null, its text is what a reader is told.
`labels` is {x, y, title, none}; `chosen` is called with the key of a point that is clicked or entered. */
function drawChart(place, points, labels, chosen) {
  const width = Math.max(300, place.clientWidth), height = Math.min(460, Math.max(300, width * .55));
  const left = 58, right = 14, top = 26, bottom = 46;
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": labels.title});
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  if (!points.length) {
    svg.append(element("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, labels.none));
    place.replaceChildren(svg);
    return;
  }
  const xs = points.map((p) => p.x), ys = points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
  const spread = (Math.max(...ys) - Math.min(...ys)) || Math.abs(ys[0]) || 1;
  const low = Math.min(...ys) - .08 * spread, high = Math.max(...ys) + .08 * spread;
  const most = 1.05 * Math.max(...xs) || 1;
  const across = (x) => left + (width - left - right) * x / most;
  const up = (y) => height - bottom - (height - top - bottom) * (y - low) / (high - low);

  const xTicks = ticks(0, most, width < 500 ? 4 : 7), yTicks = ticks(low, high, 6);
  said(xTicks).forEach((text, i) => {
    const x = across(xTicks[i]);
    svg.append(element("line", {class: "grid", x1: x, x2: x, y1: top, y2: height - bottom}));
    svg.append(element("text", {class: "tick", x, y: height - bottom + 16, "text-anchor": "middle"}, text));
  });
  said(yTicks).forEach((text, i) => {
    const y = up(yTicks[i]);
    svg.append(element("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}));
    svg.append(element("text", {class: "tick", x: left - 6, y: y + 4, "text-anchor": "end"}, text));
  });
  svg.append(element("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle"}, labels.x));
  svg.append(element("text", {x: 4, y: 14}, labels.y));

  const best = front(points), isBest = new Set(best.map((p) => p.key));
  const path = best.map((p, i) => i ? `H${across(p.x)}V${up(p.y)}` : `M${across(p.x)} ${up(p.y)}`).join("");
  svg.append(element("path", {class: "line", d: path}));

  const ordered = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  const places = ordered.map((point) => [across(point.x), up(point.y)]);
  const kinds = ordered.map((point) => point.flagged ? " flagged" : isBest.has(point.key) ? " front" : "");
  const marks = ordered.map((point, index) => {
    const [x, y] = places[index];
    const attributes = {class: "point" + kinds[index], role: "img", tabindex: index ? -1 : 0, "aria-label": point.text};
    const g = element("g", {...attributes, "data-key": point.key});
    if (point.low != null)
      g.append(element("line", {class: "interval", x1: x, x2: x, y1: up(point.low), y2: up(point.high)}));
    g.append(element("circle", {class: "halo", cx: x, cy: y, r: 11}), mark(kinds[index], x, y));
    g.addEventListener("focus", () => tell(index));
    g.addEventListener("blur", () => tell(-1));
    return g;
  });
  // What tells most lies on top.
  svg.append(...marks.filter((_, index) => !kinds[index]), ...marks.filter((_, index) => kinds[index]));
  const telling = ordered.filter((_, index) => kinds[index]);
  label(svg, ordered.length > 40 ? telling : [...telling, ...ordered], across, up, width - right);

  function tell(index) {
    for (const g of marks) g.classList.toggle("told", g === marks[index]);
    tip.hidden = index < 0;
    if (index < 0) return;
    const [x, y] = places[index];
    const others = ordered.filter((_, i) => i !== index && Math.hypot(places[i][0] - x, places[i][1] - y) < 3);
    const also = others.length ? "\nAlso here: " + others.map((other) => other.name).join(", ") : "";
    tip.textContent = ordered[index].text + also;
    const scale = place.clientWidth / width;
    tip.style.left = Math.max(0, Math.min(x * scale + 14, place.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = (y > height / 2 ? Math.max(0, y * scale - tip.offsetHeight - 16) : y * scale + 16) + "px";
  }
  // The point that the pointer means: the nearest, if any is near.
  function meant(event) {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const at = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const away = places.map(([x, y]) => Math.hypot(at[0] - x, at[1] - y));
    const index = away.indexOf(Math.min(...away));
    return away[index] < 20 ? index : -1;
  }
  // One point is in the order of the Tab key at a time; the arrows go on from it.
  function enter(index) {
    marks.forEach((g, other) => g.setAttribute("tabindex", other === index ? 0 : -1));
    marks[index].focus({preventScroll: true});
  }
  svg.addEventListener("pointermove", (event) => tell(meant(event)));
  svg.addEventListener("pointerleave", () => tell(-1));
  svg.addEventListener("click", (event) => {
    const index = meant(event);
    if (index < 0) return;
    enter(index);
    tell(index);
    chosen(ordered[index].key);
  });
  svg.addEventListener("keydown", (event) => {
    const at = marks.indexOf(document.activeElement), last = marks.length - 1;
    const to = {ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: last}[event.key];
    if (at >= 0 && event.key === "Enter") chosen(ordered[at].key);
    if (at >= 0 && event.key === "Escape") tell(-1);
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    enter(Math.max(0, Math.min(last, to)));
  });
  place.replaceChildren(svg, tip);
}

// Shape tells the kinds apart where colour does not: a disc on the front, a triangle where harm was found, else a cross.
function mark(kind, x, y) {
  if (kind === " flagged") return element("path", {class: "mark", d: `M${x} ${y - 8}L${x + 8} ${y + 6}H${x - 8}Z`});
  if (kind === " front") return element("circle", {class: "mark", cx: x, cy: y, r: 6});
  return element("path", {class: "mark", d: `M${x - 5} ${y - 5}l10 10m0 -10l-10 10`});
}

// Names beside their points, the telling ones first, none over another or over a point.
function label(svg, points, across, up, right) {
  const taken = points.map((p) => [across(p.x) - 7, up(p.y) - 7, across(p.x) + 7, up(p.y) + 7]), done = new Set();
  for (const point of points) {
    if (done.has(point.key) || done.size >= 30) continue;
    const width = 6.6 * point.name.length + 4, x = across(point.x), y = up(point.y);
    const before = x - 10 - width, middle = x - width / 2;
    const places = [[x + 10, y - 8], [x + 10, y + 18], [before, y - 8], [before, y + 18], [middle, y - 14], [middle, y + 24]];
    const free = places.find(([a, b]) => a > 30 && a + width < right
      && !taken.some(([l, t, r, u]) => a < r && a + width > l && b - 11 < u && b + 3 > t));
    if (!free) continue;
    taken.push([free[0], free[1] - 11, free[0] + width, free[1] + 3]);
    done.add(point.key);
    svg.append(element("text", {x: free[0], y: free[1], "aria-hidden": true}, point.name));
  }
}
