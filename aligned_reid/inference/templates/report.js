"use strict";
// The grid of queries and the picture of an alignment. data.js calls showReport, pairs/*.js call addPairs.

const byId = (id) => document.getElementById(id);
const MARKS = { right: "✓", wrong: "✗", junk: "–" };
const MEANING = { right: "the query's person", wrong: "someone else", junk: "same person and camera, not counted" };
const STOPS = [[8, 29, 88], [34, 94, 168], [65, 182, 196], [199, 233, 180], [255, 255, 217]]; // dark: alike
const alignments = new Map(); // by file in pairs/: a promise of its content
const arrived = new Map(); // what to do when a file has been read
let report, order, observer, opened;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // strings become text, never markup
  return element;
}

function draw(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.append(draw("title")), element.firstChild.append(text);
  return element;
}

const photo = (image) => (report.thumbnails ? report.thumbnails[image] : `images/${image}.jpg`);
const percent = (thousandths) => (thousandths === null ? "no match" : (thousandths / 10).toFixed(1) + "%");
const place = (image) => `person ${report.person[image]}, camera ${report.camera[image]}`;

function kindOf(query, image) {
  if (report.person[image] !== report.person[query]) return "wrong";
  return report.camera[image] === report.camera[query] ? "junk" : "right";
}

function hitsOf(query) {
  const flat = order.hits[query];
  let rank = 0;
  return Array.from({ length: flat.length / 2 }, (_, index) => {
    const image = flat[2 * index];
    const kind = kindOf(query, image);
    return { image, kind, distance: flat[2 * index + 1], rank: kind === "junk" ? "" : ++rank };
  });
}

function showReport(data) {
  report = data;
  data.orders.forEach((one, index) => byId("order").append(make("option", { value: index }, one.title)));
  observer = new IntersectionObserver(
    (entries) => entries.forEach((entry) => (entry.isIntersecting ? fill(entry.target) : clear(entry.target))),
    { rootMargin: "800px" },
  );
  byId("tools").addEventListener("input", list);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  list();
}

function list() {
  order = report.orders[byId("order").value];
  const person = byId("person").value.trim();
  const camera = byId("camera").value;
  const direction = Number(byId("sort").value);
  const score = (query) => order.ap[query] ?? (direction > 0 ? 2000 : -1); // without a match: last
  const chosen = report.queries
    .filter((query) => !person || String(report.person[query]) === person)
    .filter((query) => !camera || String(report.camera[query]) === camera)
    .sort((one, other) => direction * (score(one) - score(other)) || one - other);
  observer.disconnect();
  const rows = chosen.map((query) => make("li", { class: "row", "data-query": query }));
  byId("rows").replaceChildren(...rows);
  rows.forEach((row) => observer.observe(row));
  byId("count").value = `${chosen.length.toLocaleString("en")} of ${report.queries.length.toLocaleString("en")} queries`;
}

function clear(row) {
  if (!row.contains(document.activeElement)) row.replaceChildren();
}

function fill(row) {
  if (row.firstChild) return;
  const query = Number(row.dataset.query);
  const others = report.orders.filter((one) => one !== order);
  const text = make("div", {}, make("b", {}, percent(order.ap[query])), " AP", make("br"), `person ${report.person[query]}`);
  text.append(make("br"), `camera ${report.camera[query]}`);
  for (const one of others) text.append(make("small", { class: "soft", title: one.title }, shortly(one, query)));
  const hits = hitsOf(query).map((hit, index) => {
    const name = `${hit.rank ? `rank ${hit.rank}: ` : ""}${place(hit.image)}, ${MEANING[hit.kind]}, distance ${hit.distance}`;
    const button = make("button", { class: `hit ${hit.kind}`, "aria-label": name, title: name });
    button.append(make("img", { src: photo(hit.image), alt: "", loading: "lazy", decoding: "async" }));
    button.append(make("span", {}, make("b", {}, `${MARKS[hit.kind]}${hit.rank}`), hit.distance.toPrecision(3)));
    button.addEventListener("click", () => open(query, index));
    return make("li", {}, button);
  });
  row.append(
    make("div", { class: "query" }, make("img", { src: photo(query), alt: `query, ${place(query)}` }), text),
    make("ol", { class: "hits", tabindex: "-1" }, ...hits),
  );
}

function shortly(one, query) {
  const name = one.key.replace("global_local", "g + l").replace("global", "g").replace("_re_ranked", ", re-ranked");
  return `${percent(one.ap[query])} ${name}`;
}

// Arrow keys move between the images of the grid.
byId("rows").addEventListener("keydown", (event) => {
  const hit = event.target.closest(".hit");
  if (!hit) return;
  const hits = [...hit.closest(".hits").querySelectorAll(".hit")];
  const index = hits.indexOf(hit);
  const row = hit.closest(".row");
  let target;
  if (event.key === "ArrowRight") target = hits[index + 1];
  if (event.key === "ArrowLeft") target = hits[index - 1];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
    if (next) fill(next);
    const there = next ? [...next.querySelectorAll(".hit")] : [];
    target = there[Math.min(index, there.length - 1)];
  }
  if (!target) return;
  event.preventDefault();
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
});

async function open(query, index) {
  const hits = hitsOf(query);
  const hit = hits[index];
  opened = { query, index, length: hits.length };
  const title = hit.rank ? `Rank ${hit.rank}: ${MEANING[hit.kind]}` : "Not counted: same person and camera";
  byId("detail-title").textContent = `${MARKS[hit.kind]} ${title}`;
  byId("detail-text").textContent = `Query: ${place(query)}. Found: ${place(hit.image)}. ${order.title}: ${hit.distance}.`;
  byId("files").textContent = `${report.name[query]} and ${report.name[hit.image]}`;
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === hits.length - 1;
  if (!byId("detail").open) byId("detail").showModal();
  const pair = report.stripes ? (await readPairs(query))[query][hit.image] : null;
  if (opened.query !== query || opened.index !== index) return; // another one was opened meanwhile
  byId("pair").replaceChildren(...drawPair(query, hit.image, pair));
}

function step(by) {
  const index = opened.index + by;
  if (index >= 0 && index < opened.length) open(opened.query, index);
}

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => byId("detail").close());
byId("detail").addEventListener("click", (event) => event.target === byId("detail") && byId("detail").close());
byId("detail").addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});

function readPairs(query) {
  if (report.pairs) return Promise.resolve(report.pairs);
  const file = Math.floor(query / report.pairQueries);
  if (!alignments.has(file)) {
    alignments.set(file, new Promise((resolve) => arrived.set(file, resolve)));
    document.head.append(make("script", { src: `pairs/${file}.js` })); // a page from the disk may not fetch
  }
  return alignments.get(file);
}

function addPairs(file, pairs) {
  arrived.get(file)(pairs);
}

function shade(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const first = Math.min(Math.floor(at), STOPS.length - 2);
  const mix = STOPS[first].map((low, channel) => Math.round(low + (at - first) * (STOPS[first + 1][channel] - low)));
  return `rgb(${mix})`;
}

const [HEIGHT, WIDTH, GAP] = [300, 150, 120]; // of the photos in the picture, as the model sees them

function drawPair(query, image, pair) {
  const photos = draw("svg", { viewBox: `0 0 ${2 * WIDTH + GAP} ${HEIGHT}`, width: 2 * WIDTH + GAP, role: "img" });
  photos.setAttribute("aria-label", "both photos, their stripes joined along the shortest path");
  for (const [one, x] of [[query, 0], [image, WIDTH + GAP]]) {
    photos.append(draw("image", { href: photo(one), x, width: WIDTH, height: HEIGHT, preserveAspectRatio: "none" }));
  }
  byId("alignment").textContent = "";
  if (!pair) return [photos];
  const [costs, moves, distance] = pair;
  const stripes = report.stripes;
  const cost = Array.from(atob(costs), (one) => one.charCodeAt(0) / 255);
  const [least, most] = [Math.min(...cost), Math.max(...cost)];
  const at = (i, j) => cost[i * stripes + j];
  const share = (i, j) => (at(i, j) - least) / Math.max(most - least, 1e-6); // 0: alike
  const cells = [[0, 0]];
  for (const move of moves) {
    const [i, j] = cells[cells.length - 1];
    cells.push(move === "d" ? [i + 1, j] : [i, j + 1]);
  }
  const middle = (stripe, size) => ((stripe + 0.5) * size) / stripes;
  for (let stripe = 1; stripe < stripes; stripe++) {
    const y = (stripe * HEIGHT) / stripes;
    for (const x of [0, WIDTH + GAP]) photos.append(draw("line", { class: "stripe", x1: x, x2: x + WIDTH, y1: y, y2: y }));
  }
  for (const [i, j] of cells) {
    const alike = 1 - share(i, j);
    const ends = { x1: WIDTH, y1: middle(i, HEIGHT), x2: WIDTH + GAP, y2: middle(j, HEIGHT) };
    const look = { "stroke-width": 1 + 7 * alike, "stroke-opacity": 0.35 + 0.65 * alike };
    photos.append(draw("line", { class: "link", ...ends, ...look }, `stripes ${i + 1} and ${j + 1}: cost ${at(i, j).toFixed(2)}`));
  }
  const matrix = draw("svg", { viewBox: `0 0 ${HEIGHT} ${HEIGHT}`, width: HEIGHT, role: "img" });
  matrix.setAttribute("aria-label", "costs of all pairs of stripes, and the shortest path");
  const side = HEIGHT / stripes;
  cost.forEach((one, index) => {
    const [i, j] = [Math.floor(index / stripes), index % stripes];
    const box = { x: j * side, y: i * side, width: side + 0.5, height: side + 0.5, fill: shade(share(i, j)) };
    matrix.append(draw("rect", box, `stripe ${i + 1} of the query, ${j + 1} of the image: cost ${one.toFixed(2)}`));
  });
  const points = cells.map(([i, j]) => `${middle(j, HEIGHT)},${middle(i, HEIGHT)}`).join(" ");
  for (const [stroke, width] of [["white", 8], ["#f2711c", 4]]) {
    matrix.append(draw("polyline", { class: "trail", points, stroke, "stroke-width": width }));
  }
  let diagonal = at(0, 0); // without alignment: the mean of the paths along the diagonal
  for (let i = 1; i < stripes; i++) diagonal += at(i, i) + (at(i - 1, i) + at(i, i - 1)) / 2;
  byId("alignment").textContent =
    `Aligned distance ${distance}, along the diagonal ${diagonal.toPrecision(4)}. ` +
    "The thicker a line and the darker a square, the more alike its stripes.";
  return [photos, matrix];
}
