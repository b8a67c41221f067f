// The live view: asks what the study's folder says, and shows it where it has changed.

const $ = (id) => document.getElementById(id);
const EVERY_MILLISECONDS = 2000;
let before = "";

const or = (value, text) => value === null || value === undefined ? "unknown" : text(value);
const digits = (value) => value.toLocaleString("en", {maximumSignificantDigits: 3});
const whole = (value) => Math.round(value).toLocaleString("en");

function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function fill(id, rows) {
  $(id).replaceChildren(...rows.map((texts) => {
    const row = document.createElement("tr");
    row.append(...texts.map((text, index) => {
      const cell = document.createElement(index ? "td" : "th");
      if (!index) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

function ago(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s ago";
  return seconds < 5400 ? Math.round(seconds / 60) + " min ago" : Math.round(seconds / 3600) + " h ago";
}

function showStatus(state) {
  if (state.quiet_seconds === null) return put("status", "Nothing is written there yet; this page goes on looking.");
  if (!state.finished) return put("status", `Running, or stopped: something was last written ${ago(state.quiet_seconds)}.`);
  if ($("status").querySelector("a")) return;
  const link = document.createElement("a");
  link.href = "report.html";
  link.textContent = "read the report";
  $("status").replaceChildren("Finished: ", link, ".");
}

function show(state) {
  const last = state.lines.at(-1);
  // The first line of a study says what its scores are.
  const {unit = "score", heading = "score"} = state.lines.find((line) => line.unit) ?? {};
  put("score", heading);
  $("spent").hidden = !last;
  if (last) {
    put("seconds", digits(last.seconds) + " s");
    put("usd", or(last.usd, (usd) => digits(usd) + " USD"));
    put("kwh", or(last.kwh, (kwh) => digits(kwh) + " kWh"));
    put("tokens", whole(last.tokens));
  }
  const named = (line) => (line.recipe || line.event)
    + (line.recovery_steps ? `, ${line.recovery_steps} steps` : "") + (line.seed ? `, seed ${line.seed}` : "");
  fill("lines", [...state.lines].reverse().map((line) => [
    named(line), or(line.score, (score) => score.toFixed(3)), whole(line.seconds), or(line.usd, digits),
    new Date(1000 * line.time).toLocaleTimeString(),
  ]));
  fill("runs", state.runs.map((run) => [
    run.name, `${run.step ?? "none"} of ${run.steps}`,
    or(run.loss, (loss) => loss.toFixed(3)), or(run.tokens_per_second, whole),
  ]));
  const priced = state.lines.every((line) => line.usd !== null);
  const points = state.lines.filter((line) => line.score != null).map((line, index) => {
    const x = priced ? line.usd : line.seconds, name = named(line);
    const text = `${name}\n${line.score.toFixed(3)} ${heading}\nafter ${digits(x)} ${priced ? "USD" : "seconds"}`;
    return {key: String(index), name, x, y: line.score, low: null, high: null, text, flagged: false};
  });
  const x = priced ? "money of the whole study so far, USD (estimated)" : "seconds of the whole study so far (measured)";
  const labels = {x, y: `${unit}, held out (measured)`, title: `Scores against ${x}`, none: "No score yet"};
  drawChart($("chart"), points, labels, () => {});
}

async function ask() {
  try {
    const answered = await fetch("state.json");
    const state = await answered.json();
    if (!answered.ok) throw new Error(state.error);
    showStatus(state);
    // Only what has changed is drawn again: a reader may be pointing at it.
    const {quiet_seconds: _, ...rest} = state, now = JSON.stringify(rest);
    if (now !== before) show(state);
    before = now;
  } catch (error) {
    put("status", error instanceof TypeError ? "The server does not answer; this page goes on asking." : error.message);
  }
  setTimeout(ask, EVERY_MILLISECONDS);
}
ask();
