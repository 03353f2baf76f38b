"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const viewer = byId("viewer"), canvas = byId("canvas"), slide = byId("slide");
const context = canvas.getContext("2d");
// scale: CSS pixels per level-0 pixel; x, y: the level-0 point in the viewer's top left corner.
const view = { scale: 1, x: 0, y: 0 };
// An encoder alone has no probability: no threshold and nothing outlined.
const judged = "probability" in data.layers;
const state = { layer: data.first, opacity: 0.45, threshold: data.threshold, outline: judged, mask: false };
let outline = new Path2D(), frame = 0;
// fitted: what the view was last fitted to, null once the reader has moved; cross: the keyboard reads values at the centre.
let fitted = null, cross = false;

// ---- values

async function unpack(layer) {
  const bytes = Uint8Array.from(atob(layer.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const view16 = new DataView(await new Response(stream).arrayBuffer());
  const values = new Float32Array(layer.rows * layer.columns);
  for (let row = 0, at = 0; row < layer.rows; row++) {
    let code = 0;
    for (let column = 0; column < layer.columns; column++, at++) {
      code = (code + view16.getUint16(2 * at, true)) & 0xffff;
      values[at] = code === 0 ? NaN : layer.low + (code - 1) * layer.step;
    }
  }
  layer.values = values;
}

function valueAt(layer, x, y) {
  const column = Math.floor(x / layer.side), row = Math.floor(y / layer.side);
  const inside = row >= 0 && column >= 0 && row < layer.rows && column < layer.columns;
  return inside ? layer.values[row * layer.columns + column] : NaN;
}

function paint(layer) {
  const picture = new ImageData(layer.columns, layer.rows);
  const pixels = new Uint32Array(picture.data.buffer);
  const words = new Uint32Array(layer.colours.length / 3);
  const bytes = new Uint8ClampedArray(words.buffer);
  for (let at = 0; at < words.length; at++) bytes.set([...layer.colours.slice(3 * at, 3 * at + 3), 255], 4 * at);
  const last = words.length - 1, stretch = last / (layer.vmax - layer.vmin);
  const probability = data.layers.probability;
  for (let row = 0, at = 0; row < layer.rows; row++) {
    for (let column = 0; column < layer.columns; column++, at++) {
      const value = layer.values[at];
      if (Number.isNaN(value)) continue;
      if (state.mask) {
        const here = valueAt(probability, (column + 0.5) * layer.side, (row + 0.5) * layer.side);
        if (!(here > state.threshold)) continue;
      }
      pixels[at] = words[Math.round(Math.min(last, Math.max(0, (value - layer.vmin) * stretch)))];
    }
  }
  layer.canvas = layer.canvas || document.createElement("canvas");
  layer.canvas.width = layer.columns;
  layer.canvas.height = layer.rows;
  layer.canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Marching squares between the centres of the map pixels; beside an unseen pixel the line runs midway.
function trace() {
  const { values, rows, columns, side } = data.layers.probability, level = state.threshold;
  const at = (row, column) =>
    row < 0 || column < 0 || row >= rows || column >= columns ? NaN : values[row * columns + column];
  const cross = (a, b) => (Number.isNaN(a) || Number.isNaN(b) ? 0.5 : (level - a) / (b - a));
  // Edges: 0 top, 1 right, 2 bottom, 3 left. Bits: 8 top left, 4 top right, 2 bottom right, 1 bottom left.
  const pairs = [[], [3, 2], [2, 1], [3, 1], [0, 1], [3, 0, 2, 1], [0, 2], [3, 0],
    [3, 0], [0, 2], [0, 1, 3, 2], [0, 1], [3, 1], [2, 1], [3, 2], []];
  outline = new Path2D();
  for (let row = -1; row < rows; row++) {
    for (let column = -1; column < columns; column++) {
      const a = at(row, column), b = at(row, column + 1), c = at(row + 1, column + 1), d = at(row + 1, column);
      const kind = (a > level ? 8 : 0) | (b > level ? 4 : 0) | (c > level ? 2 : 0) | (d > level ? 1 : 0);
      if (kind === 0 || kind === 15) continue;
      const pair = pairs[kind];
      for (let end = 0; end < pair.length; end++) {
        const edge = pair[end];
        const x = edge === 1 ? 1 : edge === 3 ? 0 : edge === 0 ? cross(a, b) : cross(d, c);
        const y = edge === 0 ? 0 : edge === 2 ? 1 : edge === 3 ? cross(a, d) : cross(b, c);
        const point = [(column + 0.5 + x) * side, (row + 0.5 + y) * side];
        if (end % 2) outline.lineTo(...point); else outline.moveTo(...point);
      }
    }
  }
}

// ---- drawing

function redraw() {
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; draw(); });
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const width = viewer.clientWidth, height = viewer.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const zoom = view.scale * ratio;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.setTransform(zoom, 0, 0, zoom, -view.x * zoom, -view.y * zoom);
  context.save();
  context.beginPath();
  context.rect(0, 0, data.width, data.height);
  context.clip();
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(slide, 0, 0, data.thumbnail.width, data.thumbnail.height);
  const layer = data.layers[state.layer];
  if (layer) {
    // No smoothing: what is shown is what the map holds.
    context.imageSmoothingEnabled = layer.side * zoom < 1;
    context.globalAlpha = state.opacity;
    context.drawImage(layer.canvas, 0, 0, layer.columns * layer.side, layer.rows * layer.side);
    context.globalAlpha = 1;
  }
  if (state.outline) {
    context.lineJoin = context.lineCap = "round";
    for (const [colour, thickness] of [["#ffffff", 3.4], ["#000000", 1.4]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness / view.scale;
      context.stroke(outline);
    }
  }
  context.restore();
  if (cross) drawCross(width / 2, height / 2, ratio);
  drawScaleBar(width);
}

function drawCross(x, y, ratio) {
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  for (const [colour, thickness] of [["#ffffff", 3.4], ["#000000", 1.4]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx, y + 4 * dy);
      context.lineTo(x + 14 * dx, y + 14 * dy);
    }
    context.stroke();
  }
}

function drawScaleBar(width) {
  const most = (width / 5 / view.scale) * data.mpp, power = 10 ** Math.floor(Math.log10(most));
  const length = Math.max(...[1, 2, 5].map((step) => step * power).filter((candidate) => candidate <= most));
  byId("scale-bar").style.width = `${(length / data.mpp) * view.scale}px`;
  byId("scale-text").textContent = length < 1000 ? `${+length.toPrecision(3)} µm` : `${+(length / 1000).toPrecision(3)} mm`;
}

function showValues(x, y) {
  const inside = x >= 0 && y >= 0 && x < data.width && y < data.height;
  const seen = (value, text) => (Number.isNaN(value) ? "not seen" : text);
  byId("at-mm").textContent = inside ? `${((x * data.mpp) / 1000).toFixed(3)}, ${((y * data.mpp) / 1000).toFixed(3)} mm` : "–";
  byId("at-px").textContent = inside ? `${Math.floor(x)}, ${Math.floor(y)} px` : "–";
  for (const [name, layer] of Object.entries(data.layers)) {
    const value = valueAt(layer, x, y), sign = value > 0 && layer.vmin < 0 ? "+" : "";
    byId(`at-${name}`).textContent = inside ? seen(value, sign + (name === "probability" ? value.toFixed(3) : value.toPrecision(3))) : "–";
  }
  if (!judged) return;
  const probability = valueAt(data.layers.probability, x, y);
  byId("above").textContent = inside ? seen(probability, probability > state.threshold ? "yes" : "no") : "–";
}

// ---- moving

function fit(box) {
  const margin = box ? 1.8 : 1.03;
  const [left, top, right, bottom] = box || [0, 0, data.width, data.height];
  view.scale = limit(Math.min(viewer.clientWidth / (right - left), viewer.clientHeight / (bottom - top)) / margin);
  view.x = (left + right - viewer.clientWidth / view.scale) / 2;
  view.y = (top + bottom - viewer.clientHeight / view.scale) / 2;
  fitted = [box];
  redraw();
}

function limit(scale) {
  const whole = Math.min(viewer.clientWidth / data.width, viewer.clientHeight / data.height);
  return Math.min(Math.max(scale, whole / 2), Math.max(4, whole));
}

function zoomBy(factor, left = viewer.clientWidth / 2, top = viewer.clientHeight / 2) {
  const scale = limit(view.scale * factor);
  view.x += left / view.scale - left / scale;
  view.y += top / view.scale - top / scale;
  view.scale = scale;
  fitted = null;
  redraw();
}

function moveBy(left, top) {
  view.x += left / view.scale;
  view.y += top / view.scale;
  fitted = null;
  redraw();
}

function place(event) {
  const box = viewer.getBoundingClientRect();
  const left = event.clientX - box.left - viewer.clientLeft, top = event.clientY - box.top - viewer.clientTop;
  return { left, top, x: view.x + left / view.scale, y: view.y + top / view.scale };
}

function showRegion(index) {
  fit(data.boxes[index]);
  readAtCentre();
  viewer.scrollIntoView({ block: "nearest" });
  viewer.focus({ preventScroll: true });
}

function readAtCentre() {
  cross = true;
  showValues(view.x + viewer.clientWidth / 2 / view.scale, view.y + viewer.clientHeight / 2 / view.scale);
}

// ---- wiring

function update() {
  byId("opacity").value = Math.round(100 * state.opacity);
  byId("opacity-text").textContent = `${Math.round(100 * state.opacity)} %`;
  byId("layer").value = state.layer;
  for (const name of Object.keys(data.layers)) byId(`bar-${name}`).hidden = name !== state.layer;
  if (judged) {
    byId("threshold").value = state.threshold;
    byId("threshold-text").textContent = state.threshold.toFixed(3);
    byId("outline").checked = state.outline;
    byId("mask").checked = state.mask;
  }
  redraw();
}

function setThreshold(value) {
  state.threshold = value;
  trace();
  if (state.mask) Object.values(data.layers).forEach(paint);
  update();
}

function setMask(on) {
  state.mask = on;
  Object.values(data.layers).forEach(paint);
  update();
}

function listen() {
  byId("layer").addEventListener("change", (event) => { state.layer = event.target.value; update(); });
  byId("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; update(); });
  if (judged) {
    byId("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
    byId("reset").addEventListener("click", () => setThreshold(data.threshold));
    byId("outline").addEventListener("change", (event) => { state.outline = event.target.checked; update(); });
    byId("mask").addEventListener("change", (event) => setMask(event.target.checked));
  }
  byId("zoom-in").addEventListener("click", () => zoomBy(1.5));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  byId("fit").addEventListener("click", () => fit());
  for (const button of document.querySelectorAll("[data-region]"))
    button.addEventListener("click", () => showRegion(Number(button.dataset.region)));
  window.addEventListener("resize", () => (fitted ? fit(...fitted) : redraw()));
  listenToPointers();
  viewer.addEventListener("keydown", (event) => {
    const keys = {
      ArrowLeft: () => moveBy(-60, 0), ArrowRight: () => moveBy(60, 0),
      ArrowUp: () => moveBy(0, -60), ArrowDown: () => moveBy(0, 60),
      "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), 0: () => fit(),
    };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
    readAtCentre();
  });
}

function listenToPointers() {
  const held = new Map();
  const spread = () => { const [a, b] = [...held.values()]; return Math.hypot(a.left - b.left, a.top - b.top); };
  viewer.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { left, top } = place(event);
    zoomBy(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.0015)), left, top);
  }, { passive: false });
  viewer.addEventListener("pointerdown", (event) => {
    if (event.target.closest("button")) return;
    held.set(event.pointerId, place(event));
    viewer.setPointerCapture(event.pointerId);
    viewer.classList.add("dragging");
  });
  viewer.addEventListener("pointermove", (event) => {
    const now = place(event), before = held.get(event.pointerId);
    if (cross) redraw();
    cross = false;
    showValues(now.x, now.y);
    if (!before) return;
    const apart = held.size === 2 ? spread() : 0;
    held.set(event.pointerId, now);
    if (held.size === 1) moveBy(before.left - now.left, before.top - now.top);
    else if (held.size === 2 && apart > 0) zoomBy(spread() / apart, now.left, now.top);
  });
  for (const name of ["pointerup", "pointercancel"])
    viewer.addEventListener(name, (event) => {
      held.delete(event.pointerId);
      viewer.classList.toggle("dragging", held.size > 0);
    });
  viewer.addEventListener("pointerleave", () => showValues(-1, -1));
}

// A view can be linked to: report.html#layer=probability&opacity=60&threshold=0.4&mask=1&region=2
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name, least, most) => {
    const value = parseFloat(wanted.get(name));
    return Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : null;
  };
  if (["none", ...Object.keys(data.layers)].includes(wanted.get("layer"))) state.layer = wanted.get("layer");
  state.opacity = (number("opacity", 0, 100) ?? 45) / 100;
  state.threshold = number("threshold", 0, 1) ?? data.threshold;
  state.mask = judged && wanted.get("mask") === "1";
  const region = number("region", 1, data.boxes.length);
  return data.boxes.length && region ? data.boxes[Math.floor(region) - 1] : null;
}

async function start() {
  const box = readAddress();
  await Promise.all([...Object.values(data.layers).map(unpack), slide.decode()]);
  Object.values(data.layers).forEach(paint);
  if (judged) trace();
  listen();
  update();
  fit(box);
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("notice").textContent = `The viewer could not start (${error.message}); a browser from 2023 or later is needed.`;
  byId("notice").hidden = false;
});
