// The console's page: shows every look that the server sends, and asks for rows and plots when somebody wants them.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { look: null, history: [], writable: false, interval: 2, heard: 0, configs: new Map(), variables: "" };

// ---- words for numbers ---------------------------------------------------------------------------------------------

const count = (value) => Math.round(value).toLocaleString("en");
const whole = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(2)} G` : value >= 1e6 ? `${(value / 1e6).toFixed(2)} M` : value >= 1e4 ? `${(value / 1e3).toFixed(1)} k` : count(value));
const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : whole(value));
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value));

function size(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(value) < 1000) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

function age(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0) return seconds < -1 ? `in ${age(-seconds)}` : "now";
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} m`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
}

/** A span in its largest unit alone, for axes. */
function span(seconds) {
  for (const [unit, long] of [["d", 86400], ["h", 3600], ["m", 60]]) {
    if (seconds >= 1.5 * long) return `${Number((seconds / long).toPrecision(2))} ${unit}`;
  }
  return `${Number(seconds.toPrecision(2))} s`;
}

const ms = (value) => (value === null || value === undefined ? "–" : value < 10 ? value.toFixed(2) : value.toFixed(0));
const moment = (unix) => new Date(unix * 1000).toLocaleString();

// ---- making elements -----------------------------------------------------------------------------------------------

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function cell(name, content, kind = "") {
  return make("td", { "data-name": name, class: kind }, content);
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The console does not answer.");
  }
  const body = await response.json();
  if (!response.ok) throw new Error(`${body.error}: ${body.message}`);
  return body;
}

const failed = (error) => make("p", { class: "error" }, error.message);

// ---- what every look shows -----------------------------------------------------------------------------------------

function tile(name, value, note, values, bad = false) {
  return make("div", { class: "tile" }, make("div", { class: "name" }, name),
    make("div", { class: bad ? "value bad" : "value" }, value), make("div", { class: "note", title: note }, note),
    values ? sparkline(values) : null);
}

function showTotals() {
  const { totals, shards, replicas } = state.look;
  const past = (key) => state.history.map((point) => point[key]);
  const limit = shards.reduce((sum, shard) => sum + shard.memory_limit_bytes, 0);
  const queued = shards.reduce((sum, shard) => sum + shard.queued, 0);
  $("totals").replaceChildren(
    tile("PS that answer", `${totals.alive} of ${totals.shards}`, `step ${count(totals.global_step)}`, past("alive"), totals.alive < totals.shards),
    tile("Rows", whole(totals.rows), `${state.look.tables.length} tables`, past("rows")),
    tile("Memory", size(totals.memory_bytes), limit ? `of ${size(limit)}` : "no limit", past("memory_bytes")),
    tile("Looked up", `${rate(totals.lookups_per_s)}/s`, "ids", past("lookups_per_s")),
    tile("Updated", `${rate(totals.updates_per_s)}/s`, "ids", past("updates_per_s")),
    tile("Lookup p99", totals.lookup_p99_ms === null ? "–" : `${ms(totals.lookup_p99_ms)} ms`, `${queued} calls wait`, past("lookup_p99_ms")),
    tile("Sync lag", totals.lag_s === null ? "–" : age(totals.lag_s), replicas.length ? `${replicas.filter((one) => one.alive).length} of ${replicas.length} replicas` : "no replicas", past("lag_s"), replicas.some((one) => !one.alive)),
  );
}

function quantiles(shard, method) {
  const found = shard.latencies.find((each) => each.method === method);
  return found && found.p50_ms !== null ? `${ms(found.p50_ms)} · ${ms(found.p99_ms)}` : "–";
}

function memory(shard) {
  if (!shard.memory_limit_bytes) return make("span", { title: "no limit" }, size(shard.memory_bytes));
  const share = Math.min(shard.memory_bytes / shard.memory_limit_bytes, 1);
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  return make("span", { title: `of ${size(shard.memory_limit_bytes)}` }, size(shard.memory_bytes),
    make("span", { class: share > 0.9 ? "meter high" : "meter" }, bar));
}

function shardRow(shard) {
  const address = make("code", {}, shard.address || "nowhere");
  if (!shard.alive) {
    const told = make("td", { colspan: 10, class: "wide error whole", "data-name": "" }, make("span", { class: "pill bad" }, "no answer"), ` ${shard.error}`);
    return make("tr", {}, cell("PS", String(shard.index), "head"), cell("Address", address), told);
  }
  const up = make("span", { class: "pill good", title: `version ${shard.version}, incarnation ${shard.incarnation}, ${size(shard.resident_bytes)} resident` }, age(shard.uptime_s));
  const checkpoint = shard.last_checkpoint_unix_s
    ? make("span", { title: `${shard.last_checkpoint}, ${moment(shard.last_checkpoint_unix_s)}` }, `${age(state.look.unix_s - shard.last_checkpoint_unix_s)} ago`)
    : make("span", { class: "dim" }, "none");
  return make("tr", {},
    cell("PS", String(shard.index), "head"), cell("Address", address, "whole"), cell("Up", up), cell("Step", count(shard.global_step), "n"),
    cell("Rows", count(shard.rows), "n"), cell("Memory", memory(shard)), cell("Looked up/s", rate(shard.lookups_per_s), "n"),
    cell("Updated/s", rate(shard.updates_per_s), "n"), cell("Lookup p50 · p99, ms", quantiles(shard, "Lookup"), "n whole"),
    cell("Update p50 · p99, ms", quantiles(shard, "ApplyGradients"), "n whole"), cell("Queue", count(shard.queued), "n"), cell("Checkpoint", checkpoint));
}

function replicaRow(replica) {
  const words = replica.copying ? "full copy" : replica.state || (replica.alive ? "answers" : "");
  const pill = replica.alive
    ? make("span", { class: replica.copying || words === "loading" ? "pill warn" : "pill good" }, words)
    : make("span", { class: "pill bad", title: replica.error }, replica.state === "missing" ? "missing" : "no answer");
  const lag = replica.lag_s === null
    ? (replica.as_of_unix_s ? age(Math.max(state.look.unix_s - replica.as_of_unix_s, 0)) : "–")
    : age(replica.lag_s);
  return make("tr", { title: replica.error },
    cell("Serves", `PS ${replica.shard}`, "head"), cell("Name", replica.name), cell("State", pill),
    cell("Address", make("code", {}, replica.address || "nowhere"), "whole"),
    cell("Rows", count(replica.rows), "n"), cell("Memory", size(replica.memory_bytes), "n"), cell("Lag", lag, "n"),
    cell("Rows behind", replica.lag_rows === null ? "–" : count(replica.lag_rows), "n"),
    cell("Synced/s", rate(replica.synced_per_s), "n"), cell("Failed pushes", count(replica.failures), "n"));
}

function entryRow(entry) {
  const address = make("code", {}, entry.address || "nowhere");
  if (!entry.alive) {
    const told = make("td", { colspan: 10, class: "wide error whole", "data-name": "" }, make("span", { class: "pill bad" }, "no answer"), ` ${entry.error}`);
    return make("tr", {}, cell("", entry.name, "head"), cell("Address", address, "whole"), told);
  }
  const refused = entry.load_error !== "";
  const mood = entry.problem && entry.model ? "pill bad" : refused || !entry.model ? "pill warn" : "pill good";
  const pill = make("span", { class: mood, title: entry.problem || entry.load_error || `up for ${age(entry.uptime_s)}` },
    entry.model ? (refused && !entry.problem ? "not the newest" : entry.state) : "no model");
  const others = entry.versions.filter((each) => each !== entry.model_version);
  const also = [entry.pinned && entry.pinned === entry.model_version ? "pinned" : "", others.length ? `also loaded: ${others.join(", ")}` : ""];
  const told = [entry.mode, entry.loaded_unix_s ? `loaded ${moment(entry.loaded_unix_s)}` : "", ...also].filter(Boolean).join(", ");
  const version = make("span", { title: told },
    make("b", {}, entry.model || "–"), entry.model ? ` ${entry.model_version}${others.length ? ` +${others.length}` : ""}` : "");
  const since = (unix) => (unix === null ? "–" : make("span", { title: moment(unix) }, age(Math.max(state.look.unix_s - unix, 0))));
  const well = entry.healthy_replicas === entry.replicas;
  const replicas = entry.replicas ? make("span", { class: well ? "" : "error" }, `${entry.healthy_replicas} of ${entry.replicas}`) : "–";
  return make("tr", {},
    cell("", entry.name, "head"), cell("Address", address, "whole"), cell("Model", version, "whole"), cell("State", pill),
    cell("Step", count(entry.model_step), "n"), cell("Age of rows", since(entry.rows_as_of_unix_s), "n"),
    cell("Age of model", since(entry.checkpoint_unix_s), "n"), cell("Requests/s", rate(entry.requests_per_s), "n"),
    cell("Records/s", rate(entry.records_per_s), "n"), cell("p50 · p99, ms", entry.p50_ms === null ? "–" : `${ms(entry.p50_ms)} · ${ms(entry.p99_ms)}`, "n whole"),
    cell("Failed/s", entry.failures_per_s ? make("span", { class: "error" }, rate(entry.failures_per_s)) : "0", "n"), cell("Replicas", replicas, "n"));
}

function showServing() {
  const { replicas, entries } = state.look;
  $("replicas").querySelector("tbody").replaceChildren(...replicas.map(replicaRow));
  $("replicas").hidden = !replicas.length;
  $("no-replicas").hidden = !$("replicas").hidden;
  $("entries").querySelector("tbody").replaceChildren(...entries.map(entryRow));
  $("entries-section").hidden = !entries.length;
}

function figures(table) {
  const part = (name, value) => make("span", {}, make("small", {}, name), value);
  return [make("b", {}, table.name), part("rows", count(table.rows)), part("size", size(table.bytes)),
    part("found", table.hit_ratio === null ? "–" : `${(100 * table.hit_ratio).toFixed(1)} %`),
    part("looked up", `${rate(table.lookups_per_s)}/s`), part("updated", `${rate(table.updates_per_s)}/s`),
    part("newest", table.newest_update_unix_s ? `${age(state.look.unix_s - table.newest_update_unix_s)} ago` : "–")];
}

function showTables() {
  const names = state.look.tables.map((table) => table.name);
  const place = $("tables");
  const cards = new Map([...place.querySelectorAll(".tablecard")].map((card) => [card.dataset.table, card]));
  if ([...cards.keys()].join("\n") !== names.join("\n")) {
    place.replaceChildren(...names.map((name) => cards.get(name) ?? tableCard(name)));
    if (!names.length) place.replaceChildren(make("div", { class: "card dim" }, "No tables yet."));
    const chosen = $("find-table").value;
    $("find-table").replaceChildren(...names.map((name) => make("option", {}, name)));
    if (names.includes(chosen)) $("find-table").value = chosen;
    readAddress();
  }
  for (const table of state.look.tables) {
    const card = [...place.children].find((each) => each.dataset.table === table.name);
    card?.querySelector("summary").replaceChildren(...figures(table));
  }
}

function show(look) {
  state.look = look;
  state.heard = Date.now();
  $("problem").hidden = !look.problem;
  if (look.problem) $("problem").textContent = `${look.problem.error}: ${look.problem.message}`;
  showTotals();
  $("shards").querySelector("tbody").replaceChildren(...look.shards.map(shardRow));
  showServing();
  showTables();
  beat();
}

/** Says whether the page is fresh. */
function beat() {
  const late = Date.now() - state.heard > 1000 * (3 * state.interval + 3);
  $("live").className = late ? "pill bad" : "pill good";
  $("live").textContent = late ? `silent for ${age((Date.now() - state.heard) / 1000)}` : "live";
}

// ---- a table, opened -----------------------------------------------------------------------------------------------

function tableCard(name) {
  const inside = make("div", { class: "inside" });
  const card = make("details", { class: "card tablecard", "data-table": name }, make("summary"), inside);
  card.addEventListener("toggle", () => { if (card.open && !inside.childElementCount) openTable(name, inside); });
  return card;
}

async function openTable(name, inside) {
  const plots = make("div", { class: "full" });
  const config = make("div", { class: "full" });
  inside.replaceChildren(plots, config);
  drawPlots(name, plots);
  try {
    const table = await ask(`/api/tables/${encodeURIComponent(name)}`);
    const rows = table.segments.map((one) => make("tr", {}, make("td", {}, `${one.dim} floats`),
      ...[one.optimizer, one.initializer, one.compressor].map((text) => make("td", { class: "wide" }, make("code", {}, text)))));
    const head = make("tr", {}, ...["Segment", "Optimizer", "Initializer", "Served as"].map((text) => make("th", {}, text)));
    const by = state.look.tables.find((each) => each.name === name)?.rows_by_shard ?? [];
    config.append(make("h3", {}, "Config"), make("table", { class: "segments" }, make("thead", {}, head), make("tbody", {}, ...rows)),
      make("p", { class: "dim" }, `Rows by shard: ${by.map((rows) => (rows === null ? "?" : count(rows))).join(", ")}`
        + (table.features.length ? `. Features: ${table.features.join(", ")}` : "")),
      make("details", {}, make("summary", {}, "As protobuf writes it"), make("pre", {}, JSON.stringify(table.config, null, 1))));
    if (state.writable) config.append(make("p", {}, make("button", { class: "danger", onclick: () => evict(name, config) }, "Delete expired rows")));
  } catch (error) {
    config.append(failed(error));
  }
}

async function drawPlots(name, place) {
  place.setAttribute("aria-busy", "true");
  try {
    const found = await ask(`/api/tables/${encodeURIComponent(name)}/distribution`);
    const again = make("button", { class: "plain", onclick: () => drawPlots(name, place) }, "Sample again");
    const about = `${count(found.sampled)} of ${count(found.rows)} rows sampled`
      + (found.not_finite ? `, ${count(found.not_finite)} not finite` : "")
      + (found.without_time ? `, ${count(found.without_time)} without a time` : "")
      + (found.silent_shards.length ? `; PS ${found.silent_shards.join(", ")} did not answer` : "");
    const room = place.clientWidth;
    const wide = room >= 700 ? (room - 22) / 2 : room;
    const plot = (title, data, text) => make("div", { class: "plot" }, make("h3", {}, title),
      data.counts.length ? histogram(data, text, title, wide) : make("p", { class: "dim" }, "Nothing to show."),
      data.counts.length ? make("p", { class: "note" }, `least ${text(data.least)}, median ${text(data.median)}, greatest ${text(data.greatest)}`) : null);
    const both = make("div", { class: "plots" }, plot("Norm of rows", found.norms, short), plot("Time since the last update", found.ages, span));
    place.replaceChildren(make("div", { class: "split" }, make("span", { class: "dim" }, about), again), both);
  } catch (error) {
    place.replaceChildren(failed(error));
  }
  place.removeAttribute("aria-busy");
}

async function evict(name, place) {
  if (!confirm(`Delete the expired rows of table ${name}?`)) return;
  try {
    const done = await ask(`/api/tables/${encodeURIComponent(name)}/expired`, { method: "DELETE" });
    place.append(make("p", {}, `${count(done.rows)} rows deleted`));
  } catch (error) {
    place.append(failed(error));
  }
}

// ---- one id --------------------------------------------------------------------------------------------------------

function vector(title, values) {
  if (!Array.isArray(values)) return make("div", { class: "vector" }, make("h3", {}, title), make("code", {}, String(values)));
  if (values.length === 1) return make("div", { class: "vector" }, make("h3", {}, title), make("code", {}, String(values[0])));
  const list = make("div", { class: "numbers" }, ...values.map((value) => make("span", {}, String(value))));
  return make("div", { class: "vector" }, make("h3", {}, `${title} (${values.length})`), vectorPlot(values, title),
    make("details", values.length <= 32 ? { open: "" } : {}, make("summary", { class: "dim" }, "Numbers"), list));
}

function showRow(row) {
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  const facts = make("dl", { class: "facts" },
    fact("Id", make("code", {}, row.id === row.signed_id ? row.id : `${row.id} (${row.signed_id})`)),
    fact("Owner", `PS ${row.owner} `), fact("Address", make("code", {}, row.address || "nowhere")));
  const parts = [facts];
  if (!row.found) {
    parts.push(make("p", {}, make("span", { class: "pill warn" }, "no row"), " Never updated, below its occurrence threshold, deleted or expired."));
  } else {
    facts.append(fact("Last update", row.last_update_unix_s ? moment(row.last_update_unix_s) : "no time"), fact("Age", age(row.age_s)), fact("Norm", short(row.norm)));
    parts.push(vector("Weights", row.weights));
    row.optimizers.forEach((one, i) => {
      const where = row.optimizers.length > 1 ? `segment ${i} ` : "";
      const slots = Object.entries(one.slots);
      if (!slots.length) parts.push(make("p", { class: "dim" }, `${where}${one.optimizer}: no state`));
      for (const [slot, values] of slots) parts.push(vector(`${where}${one.optimizer} ${slot}`, values));
    });
  }
  if (row.replicas.length) {
    parts.push(make("div", { class: "vector" }, make("h3", {}, "At serving replicas"), ...row.replicas.map((one) => make("p", {},
      `${one.name} `, make("code", {}, one.address), " ", one.error ? make("span", { class: "error" }, one.error)
        : make("span", { class: one.found === row.found ? "pill good" : "pill warn" }, one.found ? (one.largest_difference === null ? "has a row" : one.largest_difference === 0 ? "the same row" : `differs by ${short(one.largest_difference)} at most`) : "no row")))));
  }
  if (state.writable && row.found) {
    parts.push(make("p", {}, make("button", { class: "danger", onclick: () => erase(row) }, "Delete this row")));
  }
  $("row").replaceChildren(...parts);
}

async function lookUp(table, id) {
  $("row").setAttribute("aria-busy", "true");
  try {
    showRow(await ask(`/api/tables/${encodeURIComponent(table)}/rows/${encodeURIComponent(id)}`));
  } catch (error) {
    $("row").replaceChildren(failed(error));
  }
  $("row").removeAttribute("aria-busy");
}

async function erase(row) {
  if (!confirm(`Delete the row of id ${row.id} in table ${row.table}?`)) return;
  try {
    await ask(`/api/tables/${encodeURIComponent(row.table)}/rows/${row.id}`, { method: "DELETE" });
    await lookUp(row.table, row.id);
  } catch (error) {
    $("row").replaceChildren(failed(error));
  }
}

$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const table = $("find-table").value, id = $("find-id").value.trim();
  history.replaceState(null, "", `#table=${encodeURIComponent(table)}&id=${encodeURIComponent(id)}`);
  lookUp(table, id);
});

/** A link may name an id: #table=user&id=42; and a table to open: #open=user. */
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const table = wanted.get("table"), id = wanted.get("id");
  if (table && id && [...$("find-table").options].some((option) => option.value === table)) {
    $("find-table").value = table;
    $("find-id").value = id;
    lookUp(table, id);
  }
  const opened = [...document.querySelectorAll(".tablecard")].find((card) => card.dataset.table === wanted.get("open"));
  if (opened) opened.open = true;
  if (table && id) $("find").scrollIntoView();
}

// ---- variables -----------------------------------------------------------------------------------------------------

async function showVariables() {
  let found;
  try {
    found = await ask("/api/variables");
  } catch {
    return; // a PS is away; what was shown stays
  }
  const text = JSON.stringify(found);
  if (text === state.variables) return;
  state.variables = text;
  $("variables-section").hidden = !found.length;
  $("variables").querySelector("tbody").replaceChildren(...found.map((one) => make("tr", {},
    cell("Name", make("a", { href: `/api/variables/${encodeURIComponent(one.name)}` }, make("code", {}, one.name)), "head"), cell("Floats", count(one.floats), "n"),
    cell("Held by", one.owners.map((owner) => `PS ${owner}`).join(", ")), cell("Optimizer", make("code", {}, one.optimizer), "wide whole"))));
}

// ---- start ---------------------------------------------------------------------------------------------------------

let events = null;

function listen() {
  if (events) return;
  state.heard = Date.now();
  events = new EventSource("/api/events"); // the browser connects again by itself when the console comes back
  events.addEventListener("look", (event) => {
    const look = JSON.parse(event.data);
    if (!look.problem && look.unix_s > (state.history.at(-1)?.unix_s ?? 0)) {
      state.history = [...state.history, { unix_s: look.unix_s, ...look.totals }].slice(-300);
    }
    show(look);
  });
}

function hush() {
  events?.close();
  events = null;
}

async function begin() {
  try {
    const overview = await ask("/api/cluster");
    document.title = `Trilith: ${overview.cluster}`;
    $("cluster").textContent = overview.cluster;
    $("cluster").title = overview.cluster;
    state.writable = overview.writable;
    state.interval = overview.interval_s;
    state.history = overview.history;
    $("writable").hidden = !overview.writable;
  } catch {
    setTimeout(begin, 1000);
    return;
  }
  listen();
  // A browser has six connections to a server, for all tabs: one that nobody sees shall not hold any.
  document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
  addEventListener("pagehide", hush);
  addEventListener("pageshow", listen);
  setInterval(beat, 1000);
  showVariables();
  setInterval(showVariables, 10000);
}

begin();
