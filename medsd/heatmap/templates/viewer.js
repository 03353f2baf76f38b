"use strict";
// The slide with a map over it: places in level-0 pixels, `view.scale` CSS pixels each, from the viewer's top left.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const viewer = byId("viewer"), canvas = byId("canvas"), slide = byId("slide");
const context = canvas.getContext("2d");
const view = { scale: 1, x: 0, y: 0 };
// Whether `medsd view` gives what the page lacks.
const served = new URLSearchParams(location.search).has("tiles");
// An encoder alone has no probability: no threshold and nothing outlined.
const judged = "probability" in data.layers;
const state = { layer: data.first, opacity: data.opacity, threshold: data.threshold, outline: judged, mask: false, grey: true };
// fitted: what the view was last fitted to, null once the reader has moved; cross: the keyboard reads values at the centre.
// unprinted: the view to go back to, while the page is printed.
let frame = 0, fitted = null, cross = false, traced = null, unprinted = null;

// ---- values

async function unpack(layer, name) {
  // All of a map that the page holds in halves only, from the server behind it.
  if (served && layer.halved) Object.assign(layer, await (await fetch(`maps/${name}.json`)).json(), { halved: false });
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
  layer.levels = [{ rows: layer.rows, columns: layer.columns, side: layer.side, values }];
  while (Math.max(layer.levels.at(-1).rows, layer.levels.at(-1).columns) > 64) layer.levels.push(halved(layer.levels.at(-1)));
}

// Means of 2 x 2 map pixels over those that are seen, for when they are smaller than the screen's.
function halved({ rows, columns, side, values }) {
  const half = { rows: Math.ceil(rows / 2), columns: Math.ceil(columns / 2), side: 2 * side };
  half.values = new Float32Array(half.rows * half.columns);
  for (let row = 0, at = 0; row < half.rows; row++)
    for (let column = 0; column < half.columns; column++, at++) {
      let total = 0, count = 0;
      for (let j = 2 * row; j < Math.min(rows, 2 * row + 2); j++)
        for (let i = 2 * column; i < Math.min(columns, 2 * column + 2); i++) {
          const value = values[j * columns + i];
          if (!Number.isNaN(value)) { total += value; count++; }
        }
      half.values[at] = total / count;
    }
  return half;
}

function valueAt(layer, x, y) {
  const { rows, columns, side, values } = layer.levels[0], column = Math.floor(x / side), row = Math.floor(y / side);
  return row >= 0 && column >= 0 && row < rows && column < columns ? values[row * columns + column] : NaN;
}

// ---- the map

// For each screen pixel along an axis: the two map pixels whose centres it lies between, the second's share, its holder.
function axis(length, start, step, side, size) {
  const first = new Int32Array(length), second = new Int32Array(length), holder = new Int32Array(length), share = new Float32Array(length);
  for (let at = 0; at < length; at++) {
    const place = (start + (at + 0.5) * step) / side, low = Math.floor(place - 0.5);
    first[at] = Math.min(size - 1, Math.max(0, low));
    second[at] = Math.min(size - 1, Math.max(0, low + 1));
    share[at] = place - 0.5 - low;
    holder[at] = place >= 0 && place < size ? Math.floor(place) : -1;
  }
  return { first, second, share, holder };
}

function words([red, green, blue]) {
  const bytes = new Uint8ClampedArray(4 * 256);
  for (let alpha = 0; alpha < 256; alpha++) bytes.set([red, green, blue, alpha], 4 * alpha);
  return new Uint32Array(bytes.buffer);
}

// The map's colours on a canvas of the viewer's size: values interpolated between map pixels first, coloured then.
function painted(layer, width, height) {
  const level = layer.levels.findLast(({ side }) => side * view.scale <= 1.5) || layer.levels[0];
  const { rows, columns, side, values } = level, step = 1 / view.scale;
  const across = axis(width, view.x, step, side, columns), down = axis(height, view.y, step, side, rows);
  const picture = new ImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
  layer.words = layer.words || { above: words(layer.above), below: words(layer.below) };
  const { above, below } = layer.words, most = 255 / layer.vmax, least = layer.vmin < 0 ? 255 / layer.vmin : 0;
  for (let row = 0, at = 0; row < height; row++) {
    const top = down.first[row] * columns, bottom = down.second[row] * columns, low = down.share[row];
    if (down.holder[row] < 0) { at += width; continue; }
    const middle = down.holder[row] * columns;
    for (let column = 0; column < width; column++, at++) {
      if (across.holder[column] < 0) continue;
      // Faded: a place without colour would else look the same whether it was judged or not.
      if (Number.isNaN(values[middle + across.holder[column]])) { pixels[at] = 0xffffffff; continue; }
      if (state.mask && !(valueAt(data.layers.probability, view.x + (column + 0.5) * step, view.y + (row + 0.5) * step) > state.threshold)) continue;
      const left = across.first[column], right = across.second[column], far = across.share[column];
      let total = 0, weight = 0;
      for (let corner = 0; corner < 4; corner++) {
        const value = values[(corner & 2 ? bottom : top) + (corner & 1 ? right : left)];
        if (Number.isNaN(value)) continue;
        const share = (corner & 2 ? low : 1 - low) * (corner & 1 ? far : 1 - far);
        total += share * value;
        weight += share;
      }
      const value = total / weight;
      pixels[at] = value < 0 ? below[Math.min(255, Math.round(value * least))] : above[Math.min(255, Math.round(value * most))];
    }
  }
  layer.canvas = layer.canvas || document.createElement("canvas");
  layer.canvas.width = width;
  layer.canvas.height = height;
  layer.canvas.getContext("2d").putImageData(picture, 0, 0);
  return layer.canvas;
}

// ---- the slide: an overview, and finer tiles where the page holds them or a server gives them

const loaded = new Map();

function tile(level, column, row) {
  const name = `${level}/${column}_${row}`, kept = data.tiles.kept[level][`${column}_${row}`];
  if (!kept && !served) return null;
  if (!loaded.has(name)) {
    const image = new Image();
    image.addEventListener("load", () => { image.ready = true; redraw(); });
    image.addEventListener("error", () => { byId("untiled").hidden = false; });
    image.src = kept ? `data:image/jpeg;base64,${kept}` : `tiles/${name}.jpg`;
    loaded.set(name, image);
    if (loaded.size > 400) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(name);
}

// Draws coarse tiles first; gives the micrometres per pixel of the picture at the viewer's middle.
function drawSlide(zoom, width, height) {
  const x = view.x + width / 2 / view.scale, y = view.y + height / 2 / view.scale;
  let sharp = data.overview.step;
  context.drawImage(slide, 0, 0, data.overview.width, data.overview.height);
  const { steps, side } = data.tiles;
  const finest = Math.max(0, steps.findLastIndex((step) => step * zoom <= 1));
  for (let level = steps.length - 1; level >= finest; level--) {
    const size = side * steps[level], bound = (place, most) => Math.min(Math.ceil(most / size) - 1, Math.max(0, Math.floor(place / size)));
    if (served && level > finest + 1) continue;
    for (let row = bound(view.y, data.height); row <= bound(view.y + height / view.scale, data.height); row++)
      for (let column = bound(view.x, data.width); column <= bound(view.x + width / view.scale, data.width); column++) {
        const image = tile(level, column, row);
        if (!image || !image.ready) continue;
        context.drawImage(image, column * size, row * size, image.naturalWidth * steps[level], image.naturalHeight * steps[level]);
        if (x >= column * size && x < (column + 1) * size && y >= row * size && y < (row + 1) * size) sharp = steps[level];
      }
  }
  return sharp * data.mpp;
}

// ---- outlines

for (const region of data.regions) {
  region.path = new Path2D();
  for (const ring of region.rings) {
    region.path.moveTo(ring[0], ring[1]);
    for (let at = 2; at < ring.length; at += 2) region.path.lineTo(ring[at], ring[at + 1]);
    region.path.closePath();
  }
}

// A dark line, light on its inner side, so that a hole is told from a region.
function drawRegions(width, height) {
  const right = view.x + width / view.scale, bottom = view.y + height / view.scale;
  for (const { path, box } of data.regions) {
    if (box[0] > right || box[1] > bottom || box[2] < view.x || box[3] < view.y) continue;
    context.save();
    context.clip(path, "evenodd");
    context.strokeStyle = "#ffffff";
    context.lineWidth = 6 / view.scale;
    context.stroke(path);
    context.restore();
    context.strokeStyle = "#000000";
    context.lineWidth = 1.4 / view.scale;
    context.stroke(path);
  }
}

function drawNumbers(ratio) {
  const taken = [];
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = "bold 12px system-ui, sans-serif";
  data.regions.forEach(({ top }, index) => {
    const width = context.measureText(index + 1).width + 6;
    const left = (top[0] - view.x) * view.scale + 3, y = (top[1] - view.y) * view.scale;
    // Of a region at the picture's upper edge it stands inside.
    const above = y < 0 ? y - 17 : Math.max(1, y - 17);
    // Large regions have their numbers first; the others show theirs when there is room.
    if (taken.some((other) => left < other[0] + other[2] && other[0] < left + width && Math.abs(above - other[1]) < 16)) return;
    taken.push([left, above, width]);
    context.fillStyle = "#ffffff";
    context.fillRect(left, above, width, 16);
    context.fillStyle = "#000000";
    context.fillText(index + 1, left + 3, above + 12);
  });
}

// Marching squares between the centres of the map pixels; beside an unseen pixel the line runs midway.
function trace() {
  traced = null;
  if (state.threshold === data.threshold) return;
  const { values, rows, columns, side } = data.layers.probability.levels[0], level = state.threshold;
  const at = (row, column) =>
    row < 0 || column < 0 || row >= rows || column >= columns ? NaN : values[row * columns + column];
  const between = (a, b) => (Number.isNaN(a) || Number.isNaN(b) ? 0.5 : (level - a) / (b - a));
  // Edges: 0 top, 1 right, 2 bottom, 3 left. Bits: 8 top left, 4 top right, 2 bottom right, 1 bottom left.
  const pairs = [[], [3, 2], [2, 1], [3, 1], [0, 1], [3, 0, 2, 1], [0, 2], [3, 0],
    [3, 0], [0, 2], [0, 1, 3, 2], [0, 1], [3, 1], [2, 1], [3, 2], []];
  traced = new Path2D();
  for (let row = -1; row < rows; row++) {
    for (let column = -1; column < columns; column++) {
      const a = at(row, column), b = at(row, column + 1), c = at(row + 1, column + 1), d = at(row + 1, column);
      const kind = (a > level ? 8 : 0) | (b > level ? 4 : 0) | (c > level ? 2 : 0) | (d > level ? 1 : 0);
      if (kind === 0 || kind === 15) continue;
      const pair = pairs[kind];
      for (let end = 0; end < pair.length; end++) {
        const edge = pair[end];
        const x = edge === 1 ? 1 : edge === 3 ? 0 : edge === 0 ? between(a, b) : between(d, c);
        const y = edge === 0 ? 0 : edge === 2 ? 1 : edge === 3 ? between(a, d) : between(b, c);
        const point = [(column + 0.5 + x) * side, (row + 0.5 + y) * side];
        if (end % 2) traced.lineTo(...point); else traced.moveTo(...point);
      }
    }
  }
}

// ---- drawing

function redraw() {
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; if (!unprinted) draw(window.devicePixelRatio || 1); });
}

function draw(ratio) {
  const width = viewer.clientWidth, height = viewer.clientHeight;
  if (!width || !height) return;  // in a window of no size; it is drawn when it has one
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const zoom = view.scale * ratio, layer = data.layers[state.layer];
  context.setTransform(zoom, 0, 0, zoom, -view.x * zoom, -view.y * zoom);
  context.save();
  context.beginPath();
  context.rect(0, 0, data.width, data.height);
  context.clip();
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, data.width, data.height);
  context.imageSmoothingQuality = "high";
  const sharp = drawSlide(zoom, width, height);
  if (layer) {
    if (state.grey) drawGrey();
    context.globalAlpha = state.opacity;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.drawImage(painted(layer, width, height), 0, 0);
    context.setTransform(zoom, 0, 0, zoom, -view.x * zoom, -view.y * zoom);
    context.globalAlpha = 1;
  }
  context.lineJoin = context.lineCap = "round";
  if (state.outline && traced) drawTraced();
  else if (state.outline) drawRegions(width, height);
  context.restore();
  if (state.outline && !traced) drawNumbers(ratio);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (cross) drawCross(width / 2, height / 2);
  drawScaleBar(width, height);
  byId("sharp").textContent = `${+sharp.toPrecision(2)} µm per pixel`;
}

// Light grey, 128 to 255: hue is the map's alone.
function drawGrey() {
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fillRect(0, 0, data.width, data.height);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "rgba(255, 255, 255, 0.5)";
  context.fillRect(0, 0, data.width, data.height);
}

function drawTraced() {
  context.setLineDash([6 / view.scale, 5 / view.scale]);
  for (const [colour, thickness] of [["#ffffff", 3.4], ["#000000", 1.4]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness / view.scale;
    context.stroke(traced);
  }
  context.setLineDash([]);
}

function drawCross(x, y) {
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

// On the canvas, so that it keeps its length when the page is printed at another size.
function drawScaleBar(width, height) {
  const most = (width / 5 / view.scale) * data.mpp, power = 10 ** Math.floor(Math.log10(most));
  const length = Math.max(...[1, 2, 5].map((step) => step * power).filter((candidate) => candidate <= most));
  const long = (length / data.mpp) * view.scale;
  const text = length < 1000 ? `${+length.toPrecision(3)} µm` : `${+(length / 1000).toPrecision(3)} mm`;
  context.font = "13px system-ui, sans-serif";
  context.textAlign = "center";
  const wide = Math.max(long, context.measureText(text).width) + 16;
  context.fillStyle = "rgba(255, 255, 255, 0.9)";
  context.fillRect(12, height - 46, wide, 34);
  context.fillStyle = "#000000";
  context.fillText(text, 12 + wide / 2, height - 29);
  context.fillRect(12 + (wide - long) / 2, height - 22, long, 4);
  context.textAlign = "left";
}

// ---- moving

// What the cross marks is read again wherever the view or the threshold went.
function moved() {
  if (cross) readAtCentre();
  redraw();
}

function fit(box, margin = box ? 1.8 : 1.03) {
  const [left, top, right, bottom] = box || [0, 0, data.width, data.height];
  view.scale = limit(Math.min(viewer.clientWidth / (right - left), viewer.clientHeight / (bottom - top)) / margin);
  view.x = (left + right - viewer.clientWidth / view.scale) / 2;
  view.y = (top + bottom - viewer.clientHeight / view.scale) / 2;
  fitted = [box];
  moved();
}

// On paper the viewer has a size of its own, whatever the window's, and shows what the window shows.
function toPaper() {
  unprinted = { ...view, fitted };
  const width = viewer.clientWidth / view.scale, height = viewer.clientHeight / view.scale;
  const box = fitted && !fitted[0] ? [0, 0, data.width, data.height] : [view.x, view.y, view.x + width, view.y + height];
  viewer.style.setProperty("--shape", (box[3] - box[1]) / (box[2] - box[0]));
  viewer.classList.add("paper");
  fit(box, 1);
  draw(3);
}

function toScreen() {
  viewer.classList.remove("paper");
  if (unprinted) ({ scale: view.scale, x: view.x, y: view.y, fitted } = unprinted);
  unprinted = null;
  moved();
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
  moved();
}

function moveBy(left, top) {
  view.x += left / view.scale;
  view.y += top / view.scale;
  fitted = null;
  moved();
}

function place(event) {
  const box = viewer.getBoundingClientRect();
  const left = event.clientX - box.left - viewer.clientLeft, top = event.clientY - box.top - viewer.clientTop;
  return { left, top, x: view.x + left / view.scale, y: view.y + top / view.scale };
}
