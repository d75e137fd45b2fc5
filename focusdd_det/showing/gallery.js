"use strict";
// The gallery's script. Texts of the set are shown with textContent, never parsed as HTML.

const $ = (id) => document.getElementById(id);
const head = JSON.parse($("head").textContent);
const detect = head.task === "detect";
const GAP = 14;
const CAPTION = 22;
const SVG = "http://www.w3.org/2000/svg";

// --- what the page holds: of every composite a few numbers, of everything else the text of its block

const ids = [];
const classes = [];
const counts = [];
const means = [];
const kinds = []; // classes of the boxes
const missed = []; // key patches that the teacher does not confirm
const blocks = [];
const opened = new Map(); // block -> its details, parsed; the latest ones
let whole = head.inside; // whether the full pictures are there

/** Called by the script behind each block: keeps its text, takes its elements out of the page. */
function take() {
  const call = document.currentScript;
  const thumbs = call.previousElementSibling;
  const details = thumbs.previousElementSibling;
  const tiles = details.previousElementSibling;
  for (const [id, index, boxes, mean, found, miss] of JSON.parse(tiles.textContent)) {
    ids.push(id);
    classes.push(index);
    counts.push(boxes);
    means.push(mean);
    kinds.push(found);
    missed.push(miss);
  }
  blocks.push({ details: details.textContent, thumbs: thumbs.textContent, words: null });
  for (const element of [tiles, details, thumbs, call]) element.remove();
  soon();
}

function block(i) {
  const number = Math.floor(i / head.block);
  let found = opened.get(number);
  if (!found) {
    found = { ...JSON.parse(blocks[number].details), thumbs: blocks[number].thumbs.split("\n") };
  }
  opened.delete(number);
  opened.set(number, found);
  if (opened.size > 64) opened.delete(opened.keys().next().value);
  return found;
}

function composite(i) {
  const [cells, boxes, group, index] = block(i).items[i % head.block];
  return { cells: cells.map(cellOf), boxes, group, index, folders: block(i).folders };
}

function cellOf([key, root, path, folder, width, height, crop, p, share, confirmed, map, place]) {
  return { key, root, path, folder, width, height, crop, p, share, confirmed, map, place };
}

const thumb = (i) => "data:image/jpeg;base64," + block(i).thumbs[i % head.block].trim();
const folderOf = (index) => head.classes[index] ?? String(index);
const className = (index) => (index in head.lemmas ? `${head.lemmas[index]} (${folderOf(index)})` : folderOf(index));

function file(i) {
  const name = encodeURIComponent(ids[i]) + ".jpg";
  return detect ? "images/train/" + name : "train/" + encodeURIComponent(folderOf(classes[i])) + "/" + name;
}

// --- small things

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

const colour = (index) => `hsl(${(index * 94) % 360} 85% 52%)`;
const many = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : /[sx]$/.test(word) ? "es" : "s"}`;
const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";

function svgBoxes(boxes) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1000 1000");
  svg.setAttribute("class", "boxes");
  svg.setAttribute("aria-hidden", "true");
  for (const [kind, x1, y1, x2, y2] of boxes) {
    const rect = document.createElementNS(SVG, "rect");
    const sides = { x: x1, y: y1, width: x2 - x1, height: y2 - y1, stroke: colour(kind) };
    for (const [key, value] of Object.entries(sides)) rect.setAttribute(key, value);
    svg.append(rect);
  }
  return svg;
}

// --- attention: g x g levels as a picture, dark violet over red to yellow, the more the less transparent

function heatPicture(cell, solid) {
  const levels = Uint8Array.from(atob(cell.map), (c) => c.charCodeAt(0));
  const g = Math.round(Math.sqrt(levels.length));
  const canvas = make("canvas");
  canvas.width = canvas.height = g;
  const pixels = new ImageData(g, g);
  levels.forEach((level, k) => {
    const t = level / 255;
    const rise = Math.min(1, t * 2);
    const fall = Math.max(0, t * 2 - 1);
    pixels.data.set([40 + 190 * rise + 25 * fall, 15 + 45 * rise + 160 * fall, 90 - 30 * rise + 20 * fall], k * 4);
    pixels.data[k * 4 + 3] = solid ? 255 : 225 * t ** 1.3;
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** Draw the part of a cell's map that the cell shows into a square of a canvas. */
function heatCell(context, cell, x, y, side) {
  if (!cell.map) return;
  const scale = side / (cell.crop ? cell.crop[2] : Math.max(cell.width, cell.height));
  const left = cell.crop ? -cell.crop[0] * scale : (side - cell.width * scale) / 2;
  const top = cell.crop ? -cell.crop[1] * scale : (side - cell.height * scale) / 2;
  context.save();
  context.beginPath();
  context.rect(x, y, side, side);
  context.clip();
  context.imageSmoothingQuality = "high";
  const [px, py, pw, ph] = cell.place;
  context.drawImage(
    heatPicture(cell, false), x + left + px * scale, y + top + py * scale, pw * scale, ph * scale
  );
  context.restore();
}

function heatCanvas(cells, size) {
  const canvas = make("canvas", "heat");
  canvas.width = canvas.height = size;
  const n = Math.round(Math.sqrt(cells.length)) || 1;
  const context = canvas.getContext("2d");
  cells.forEach((cell, k) => heatCell(context, cell, ((k % n) * size) / n, (Math.floor(k / n) * size) / n, size / n));
  return canvas;
}

/** Where the crop lies in its source, over the source's whole map if there is one. */
function sourceCanvas(cell) {
  const canvas = make("canvas", "source");
  const size = (canvas.width = canvas.height = 128);
  const context = canvas.getContext("2d");
  const scale = (size - 4) / Math.max(cell.width, cell.height);
  context.translate((size - cell.width * scale) / 2, (size - cell.height * scale) / 2);
  const style = getComputedStyle(document.body);
  context.fillStyle = style.getPropertyValue("--hole");
  context.fillRect(0, 0, cell.width * scale, cell.height * scale);
  if (cell.map) {
    const [x, y, w, h] = cell.place.map((v) => v * scale);
    context.imageSmoothingQuality = "high";
    context.drawImage(heatPicture(cell, true), x, y, w, h);
  }
  const [x, y, side] = cell.crop || [];
  const frame = cell.crop ? [x, y, side, side] : [0, 0, cell.width, cell.height];
  context.lineWidth = 4;
  context.strokeStyle = cell.map ? "#fff" : style.getPropertyValue("--accent");
  context.strokeRect(...frame.map((v) => v * scale));
  canvas.title = cell.map ? "attention over the whole source; the frame is the crop" : "where the crop lies in the source";
  return canvas;
}

// --- the tiles: only those that can be seen are in the page

let shown = []; // numbers of the composites that pass the filters, in order
let current = 0; // place in `shown`
const tiles = new Map(); // composite -> its tile
let columns = 1;
let side = 168;
let height = 200; // of a row

function measure() {
  const width = $("tiles").clientWidth;
  const wanted = Number($("zoom").value);
  columns = Math.max(1, Math.floor((width + GAP) / (wanted + GAP)));
  side = Math.max(40, Math.floor((width - GAP * (columns - 1)) / columns));
  height = side + CAPTION + GAP;
  $("tiles").style.height = Math.max(0, Math.ceil(shown.length / columns) * height - GAP) + "px";
}

function draw() {
  const grid = $("grid");
  const first = Math.max(0, Math.floor(grid.scrollTop / height) - 1) * columns;
  const last = Math.min(shown.length, (Math.ceil((grid.scrollTop + grid.clientHeight) / height) + 1) * columns);
  const wanted = new Set(shown.slice(first, last));
  for (const [i, tile] of tiles) {
    if (!wanted.has(i)) {
      tile.remove();
      tiles.delete(i);
    }
  }
  for (let place = first; place < last; place++) {
    const i = shown[place];
    let tile = tiles.get(i);
    if (!tile) {
      tile = tileOf(i);
      tiles.set(i, tile);
      $("tiles").append(tile);
    }
    tile.style.width = side + "px";
    tile.firstChild.style.height = side + "px";
    const row = Math.floor(place / columns);
    tile.style.transform = `translate(${(place % columns) * (side + GAP)}px, ${row * height}px)`;
    tile.classList.toggle("current", place === current);
    tile.setAttribute("aria-selected", place === current);
    tile.setAttribute("aria-setsize", shown.length);
    tile.setAttribute("aria-posinset", place + 1);
    tile.dataset.place = place;
  }
  if (shown.length) grid.setAttribute("aria-activedescendant", "tile-" + shown[current]);
  else grid.removeAttribute("aria-activedescendant");
}

function tileOf(i) {
  const tile = make("div", "tile");
  tile.id = "tile-" + i;
  tile.dataset.item = i;
  tile.setAttribute("role", "option");
  const picture = make("div", "pic");
  const image = make("img");
  image.alt = "";
  image.draggable = false;
  image.src = thumb(i);
  picture.append(image);
  tile.append(picture);
  const caption = make("div", "caption");
  const name = make("span", "", className(classes[i]));
  const tail = detect ? many(counts[i], "box") : "p " + means[i].toFixed(2);
  caption.append(name, make("span", "", detect && counts[i] ? `${counts[i]} · ${means[i].toFixed(2)}` : tail));
  caption.title = detect ? `${many(counts[i], "box")}, mean confidence ${means[i].toFixed(2)}` : ids[i];
  tile.append(caption);
  tile.setAttribute("aria-label", `${className(classes[i])}, ${tail}, ${ids[i]}`);
  overlay(tile, i);
  return tile;
}

function overlay(tile, i) {
  tile.querySelectorAll("svg, canvas").forEach((element) => element.remove());
  if (pressed("heat")) tile.firstChild.append(heatCanvas(composite(i).cells, 160));
  if (pressed("boxes") && counts[i]) tile.firstChild.append(svgBoxes(composite(i).boxes));
}

// --- filters and order

const ORDERS = {
  number: ["number", null],
  sure: [detect ? "most confident first" : "highest p first", (a, b) => means[b] - means[a]],
  unsure: [detect ? "least confident first" : "lowest p first", (a, b) => means[a] - means[b]],
  ...(detect && {
    most: ["most boxes first", (a, b) => counts[b] - counts[a]],
    fewest: ["fewest boxes first", (a, b) => counts[a] - counts[b]],
  }),
};

/** Everything of a composite that can be searched for, in small letters; made when it is first needed. */
function words(i) {
  const own = blocks[Math.floor(i / head.block)];
  if (!own.words) {
    const { items, folders } = JSON.parse(own.details);
    const start = i - (i % head.block);
    own.words = items.map(([cells, boxes, group], k) =>
      [
        ids[start + k], className(classes[start + k]), group, ...kinds[start + k].map(className),
        ...cells.flatMap((cell) => [cell[1], cell[2], cell[3], folders[cell[3]] || ""]),
      ].join("\n").toLowerCase()
    );
  }
  return own.words[i % head.block];
}

function passing() {
  const own = $("class").value;
  const box = $("box").value;
  const teacher = $("teacher").value;
  const wanted = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let i = 0; i < ids.length; i++) {
    if (own !== "" && classes[i] !== Number(own)) continue;
    if (box !== "" && !kinds[i].includes(Number(box))) continue;
    if (teacher && (teacher === "all") !== (missed[i] === 0)) continue;
    if (wanted.length && !wanted.every((word) => words(i).includes(word))) continue;
    found.push(i);
  }
  const compare = ORDERS[$("order").value][1];
  return compare ? found.sort((a, b) => compare(a, b) || a - b) : found;
}

function update(keep) {
  const before = shown[current];
  shown = passing();
  current = keep ? Math.max(0, shown.indexOf(before)) : 0;
  if (!keep) $("grid").scrollTop = 0;
  measure();
  draw();
  const all = ids.length.toLocaleString("en");
  const loading = document.readyState === "loading";
  const cut = !loading && ids.length < head.total;
  $("count").textContent =
    (shown.length === ids.length ? many(ids.length, "composite") : `${shown.length.toLocaleString("en")} of ${all}`) +
    (loading ? ` · reading ${head.total.toLocaleString("en")}` : "") +
    (cut ? ` · the file is cut short, it should hold ${head.total.toLocaleString("en")}` : "");
  $("empty").hidden = shown.length > 0 || loading;
  if (!keep) inspect();
}

function options(select, numbers, first) {
  const chosen = select.value;
  const made = [new Option(first, "")];
  for (const index of [...numbers.keys()].sort((a, b) => a - b)) {
    made.push(new Option(`${className(index)} (${numbers.get(index)})`, index));
  }
  select.replaceChildren(...made);
  select.value = numbers.has(Number(chosen)) ? chosen : "";
}

function listClasses() {
  const own = new Map();
  const boxes = new Map();
  const add = (map, key) => map.set(key, (map.get(key) || 0) + 1);
  classes.forEach((index) => add(own, index));
  kinds.forEach((list) => list.forEach((index) => add(boxes, index)));
  options($("class"), own, "all");
  options($("box"), boxes, "any class");
  const sum = counts.reduce((a, b) => a + b, 0);
  const about = [many(ids.length, "composite"), many(own.size, "class")];
  if (detect) about.push(many(sum, "box"));
  for (const [key, value] of head.told) about.push(`${key} ${value}`);
  $("about").textContent = about.join(" · ");
}

let planned = 0;

/** The first block at once, the others together a few times a second. */
function soon() {
  if (planned) return;
  const run = () => {
    planned = 0;
    listClasses();
    update(true);
    if (ids.length <= head.block || !$("panel").hasChildNodes()) inspect();
  };
  planned = setTimeout(run, blocks.length > 1 ? 150 : 0);
}

// --- one composite in words: the panel, and the large view

let asked = 0; // composite whose full picture is being fetched for the panel

function stage(i, found, large) {
  const box = make("div", "pic stage");
  const image = make("img");
  image.alt = `${className(classes[i])}: composite ${ids[i]}`;
  image.src = thumb(i);
  box.append(image);
  if (pressed("heat")) box.append(heatCanvas(found.cells, 640));
  if (pressed("boxes")) {
    box.append(svgBoxes(found.boxes));
    for (const [kind, x1, y1, , , conf] of large ? found.boxes : []) {
      const name = make("span", "name", `${className(kind)} ${(conf / 100).toFixed(2)}`);
      name.style.left = x1 / 10 + "%";
      name.style.top = y1 / 10 + "%";
      name.style.background = `hsl(${(kind * 94) % 360} 75% 32%)`;
      box.append(name);
    }
  }
  if (whole) {
    const full = new Image();
    full.onload = () => (image.src = full.src);
    full.onerror = () => (whole = false);
    const fetch = () => (full.src = file(i));
    if (large) fetch();
    else setTimeout(() => asked === i && fetch(), 150); // not of every tile that the pointer crosses
  }
  return box;
}

function cellCard(i, cell, k, n, picture) {
  const card = make("div", "cell");
  const small = make("div", "pic");
  const image = make("img");
  image.alt = "";
  image.src = thumb(i);
  Object.assign(image.style, {
    width: n * 100 + "%", height: n * 100 + "%", left: -(k % n) * 100 + "%", top: -Math.floor(k / n) * 100 + "%",
  });
  small.append(image);
  if (cell.map && pressed("heat")) {
    const canvas = make("canvas");
    canvas.width = canvas.height = 128;
    heatCell(canvas.getContext("2d"), cell, 0, 0, 128);
    small.append(canvas);
  }
  const text = make("div", "words");
  const first = make("p");
  first.append(make("span", "kind", cell.key ? "Key patch" : "Background"));
  if (detect && cell.key) {
    first.append(" · ", make("span", cell.confirmed ? "yes" : "no", cell.confirmed ? "✓ confirmed" : "✗ not confirmed"));
  }
  const lemma = composite(i).folders[cell.folder];
  text.append(
    first,
    make("p", "folder", lemma ? `${lemma.split(",")[0]} (${cell.folder})` : cell.folder),
    make("p", "scores", `p ${cell.p.toFixed(4)} · share ${cell.share.toFixed(4)}`)
  );
  const where = cell.crop ? `crop ${cell.crop[2]} px at ${cell.crop[0]}, ${cell.crop[1]}` : "whole";
  text.append(make("p", "hint", `${where} of ${cell.width}\u00a0×\u00a0${cell.height}`));
  card.append(small, sourceCanvas(cell), text, make("p", "path", `${cell.root}/${cell.path}`));
  card.addEventListener("mouseenter", () => {
    const mark = make("div", "mark");
    const share = 100 / n;
    Object.assign(mark.style, {
      left: (k % n) * share + "%", top: Math.floor(k / n) * share + "%", width: share + "%", height: share + "%",
    });
    picture.append(mark);
  });
  card.addEventListener("mouseleave", () => picture.querySelectorAll(".mark").forEach((mark) => mark.remove()));
  return card;
}

function note(found) {
  const text = make("p", "note");
  if (head.attention === "none") text.append("There are no attention maps: the method of this set looks at none.");
  else if (head.attention === "asked for") {
    text.append(
      "A set holds no attention maps. To put them into this page, with the folders and the weights it was built from: ",
      make("code", "", "focusdd gallery SET sources=NAME=PATH selector_weights=PATH")
    );
  } else if (found.cells.some((cell) => !cell.map)) {
    text.append("Where no attention is drawn, the source was not found, or is another picture now.");
  } else return null;
  return text;
}

/** The parts of a composite's description: the picture, and everything else. */
function describe(i, large) {
  const found = composite(i);
  const name = className(classes[i]);
  const picture = stage(i, found, large);
  const rest = make("div");
  const top = make("div");
  top.append(make("h2", "", found.group ? `${name}: ${found.group}` : name));
  const told = [ids[i], `number ${found.index + 1} of its class`];
  if (detect) told.push(many(counts[i], "box"));
  if (detect && counts[i]) told.push(`mean confidence ${means[i].toFixed(2)}`);
  top.append(make("p", "id", told.join(" · ")));
  if (found.boxes.length) {
    const chips = make("ul", "chips");
    for (const [kind, , , , , conf] of [...found.boxes].sort((a, b) => b[5] - a[5])) {
      const chip = make("li");
      const dot = make("i");
      dot.style.background = colour(kind);
      chip.append(dot, className(kind) + " ", make("small", "", (conf / 100).toFixed(2)));
      chips.append(chip);
    }
    rest.append(chips);
  }
  const n = Math.round(Math.sqrt(found.cells.length)) || 1;
  found.cells.forEach((cell, k) => rest.append(cellCard(i, cell, k, n, picture)));
  if (!found.cells.length) rest.append(make("p", "note", "The manifest names no sources of this composite."));
  const more = found.cells.length ? note(found) : null;
  if (more) rest.append(more);
  return [top, picture, rest];
}

function help() {
  const list = make("dl", "keys");
  const keys = [
    ["← ↑ ↓ →", "go from one composite to the next"], ["Enter", "the picture in full"], ["/", "search"],
    ["b", "boxes on and off"], ["a", "attention on and off"], ["Esc", "back"],
  ];
  for (const [key, text] of keys) {
    const term = make("dt");
    term.append(make("kbd", "", key));
    list.append(term, make("dd", "", text));
  }
  return [make("p", "hint", "Point at a composite to see where it comes from; click for the whole picture."), list];
}

/** Fill the panel with a composite: the one under the pointer, else the current one while the grid has the focus. */
function inspect(i) {
  const keyboard = document.activeElement === $("grid") ? shown[current] : undefined;
  const which = i ?? keyboard;
  asked = which;
  $("panel").replaceChildren(...(which === undefined ? help() : describe(which, false)));
  $("panel").dataset.item = which ?? "";
  $("panel").scrollTop = 0;
}

function enlarge(place) {
  if (!shown.length) return;
  current = Math.min(Math.max(place, 0), shown.length - 1);
  reveal();
  const i = shown[current];
  const [top, picture, rest] = describe(i, true);
  rest.prepend(top);
  const left = make("div");
  left.append(picture);
  $("large-view").replaceChildren(left, rest);
  $("place").textContent = `${(current + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
  $("previous").disabled = current === 0;
  $("next").disabled = current === shown.length - 1;
  $("file").hidden = !whole;
  if (whole) $("file").href = file(i);
  if (!$("large").open) $("large").showModal();
}

/** Scroll so that the current tile can be seen. */
function reveal() {
  const grid = $("grid");
  const top = Math.floor(current / columns) * height;
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + height + GAP > grid.scrollTop + grid.clientHeight - GAP) {
    grid.scrollTop = top + height + 2 * GAP - grid.clientHeight;
  }
  draw();
}

// --- what people do

function toggle(id) {
  if ($(id).disabled || $(id).hidden) return;
  $(id).setAttribute("aria-pressed", !pressed(id));
  for (const [i, tile] of tiles) overlay(tile, i);
  if ($("large").open) enlarge(current);
  const which = $("panel").dataset.item;
  if (which !== "") inspect(Number(which));
}

function listen() {
  const grid = $("grid");
  let hover = 0;
  grid.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  new ResizeObserver(() => (measure(), draw())).observe($("tiles"));
  $("zoom").addEventListener("input", () => {
    measure();
    reveal();
  });
  $("tiles").addEventListener("pointerover", (event) => {
    const tile = event.target.closest(".tile");
    clearTimeout(hover);
    if (tile) hover = setTimeout(() => inspect(Number(tile.dataset.item)), 60);
  });
  $("tiles").addEventListener("pointerleave", () => clearTimeout(hover));
  $("tiles").addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (tile) enlarge(Number(tile.dataset.place));
  });
  grid.addEventListener("focus", () => inspect());
  grid.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(grid.clientHeight / height)) * columns;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page };
    let target = current + (steps[event.key] ?? NaN);
    if (event.key === "Home") target = 0;
    if (event.key === "End") target = shown.length - 1;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      enlarge(current);
    } else if (!Number.isNaN(target) && !event.ctrlKey && !event.metaKey && !event.altKey && shown.length) {
      event.preventDefault();
      if (Math.abs(steps[event.key] ?? 0) <= columns && (target < 0 || target >= shown.length)) return;
      current = Math.min(Math.max(target, 0), shown.length - 1);
      reveal();
      inspect();
    }
  });
  let typing = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => update(false), 120);
  });
  for (const id of ["class", "box", "teacher", "order"]) $(id).addEventListener("change", () => update(false));
  for (const id of ["boxes", "heat"]) $(id).addEventListener("click", () => toggle(id));
  $("clear").addEventListener("click", () => {
    for (const id of ["search", "class", "box", "teacher"]) $(id).value = "";
    update(false);
  });
  $("previous").addEventListener("click", () => enlarge(current - 1));
  $("next").addEventListener("click", () => enlarge(current + 1));
  $("close").addEventListener("click", () => $("large").close());
  $("large").addEventListener("click", (event) => event.target === $("large") && $("large").close());
  $("large").addEventListener("close", () => grid.focus());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=range]), select")) return;
    if ($("large").open && event.key === "ArrowLeft" && current > 0) enlarge(current - 1);
    if ($("large").open && event.key === "ArrowRight" && current < shown.length - 1) enlarge(current + 1);
    if (event.key === "b") toggle("boxes");
    if (event.key === "a") toggle("heat");
    if (event.key === "/" && !$("large").open) {
      event.preventDefault();
      $("search").focus();
    }
  });
  document.addEventListener("DOMContentLoaded", () => {
    clearTimeout(planned);
    planned = 0;
    setTimeout(() => {
      listClasses();
      update(true);
      if (!$("panel").hasChildNodes()) inspect();
    });
  });
}

function folderName() {
  const parts = location.pathname.split("/");
  try {
    return decodeURIComponent(parts[parts.length - 2]) || "Gallery";
  } catch {
    return "Gallery";
  }
}

function begin() {
  const name = (head.name ?? folderName()).replace(/\.incomplete$/, "");
  $("name").textContent = name;
  document.title = name + " · gallery";
  for (const [value, [text]] of Object.entries(ORDERS)) $("order").append(new Option(text, value));
  $("box-label").hidden = $("teacher-label").hidden = $("boxes").hidden = !detect;
  $("heat").disabled = head.attention !== "here";
  if ($("heat").disabled) $("heat").title = "There are no attention maps in this page";
  listen();
}

begin();
