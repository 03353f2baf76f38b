// ---- what the reader reads and sets

// As `probability_text` in medsd/heatmap/numbers.py.
function probabilityText(value) {
  const rest = Math.min(value, 1 - value), telling = rest > 0 ? 1 - Math.floor(Math.log10(rest)) : 0;
  return value.toFixed(Math.max(3, Math.min(telling, 9))).replace(/\.?0+$/, "");
}

function showValues(x, y) {
  const inside = x >= 0 && y >= 0 && x < data.width && y < data.height;
  const seen = (value, text) => (Number.isNaN(value) ? "not seen" : text);
  byId("at-mm").textContent = inside ? `${((x * data.mpp) / 1000).toFixed(3)}, ${((y * data.mpp) / 1000).toFixed(3)} mm` : "–";
  byId("at-px").textContent = inside ? `${Math.floor(x)}, ${Math.floor(y)} px` : "–";
  for (const [name, layer] of Object.entries(data.layers)) {
    const value = valueAt(layer, x, y), sign = value > 0 && layer.vmin < 0 ? "+" : "";
    byId(`at-${name}`).textContent = inside ? seen(value, sign + (name === "probability" ? probabilityText(value) : value.toPrecision(3))) : "–";
  }
  if (!judged) return;
  const probability = valueAt(data.layers.probability, x, y);
  byId("above").textContent = inside ? seen(probability, probability > state.threshold ? "yes" : "no") : "–";
}

function readAtCentre() {
  cross = true;
  showValues(view.x + viewer.clientWidth / 2 / view.scale, view.y + viewer.clientHeight / 2 / view.scale);
}

function showRegion(index) {
  fit(data.regions[index].box);
  readAtCentre();
  viewer.scrollIntoView({ block: "nearest" });
  viewer.focus({ preventScroll: true });
}

function update() {
  const opacity = Math.round(100 * state.opacity), layer = data.layers[state.layer];
  byId("opacity").value = opacity;
  byId("opacity-text").textContent = `${opacity} %`;
  document.body.style.setProperty("--opacity", state.opacity);
  byId("layer").value = state.layer;
  byId("grey").checked = state.grey;
  for (const name of Object.keys(data.layers)) byId(`bar-${name}`).hidden = name !== state.layer;
  let words = layer ? `${layer.title}, strongest colour at ${opacity} %, over the slide in ${state.grey ? "grey" : "its own colours, which the bar does not show"}` : "The slide alone";
  if (judged) {
    const own = state.threshold === data.threshold, at = probabilityText(state.threshold);
    byId("threshold").value = state.threshold;
    byId("threshold-text").textContent = at;
    byId("outline").checked = state.outline;
    byId("mask").checked = state.mask;
    byId("moved").hidden = own;
    if (state.mask) words += `, hidden where the probability is below ${at}`;
    if (state.outline) words += own ? `; regions outlined: ${data.regions.length}` : `; dashed: probability ${at}, not the validated threshold`;
  }
  byId("shown").textContent = `${words}.`;
  moved();
}

// The slider's steps, and the digits of an address, need not hold the validated threshold.
function snapped(value) {
  return Math.abs(value - data.threshold) < 0.0025 ? data.threshold : value;
}

function setThreshold(value) {
  state.threshold = snapped(value);
  trace();
  update();
}

function set(name, value) {
  state[name] = value;
  update();
}

function listen() {
  byId("layer").addEventListener("change", (event) => set("layer", event.target.value));
  byId("opacity").addEventListener("input", (event) => set("opacity", event.target.value / 100));
  byId("grey").addEventListener("change", (event) => set("grey", event.target.checked));
  if (judged) {
    byId("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
    byId("reset").addEventListener("click", () => setThreshold(data.threshold));
    byId("outline").addEventListener("change", (event) => set("outline", event.target.checked));
    byId("mask").addEventListener("change", (event) => set("mask", event.target.checked));
  }
  byId("zoom-in").addEventListener("click", () => zoomBy(1.5));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  byId("fit").addEventListener("click", () => fit());
  for (const button of document.querySelectorAll("[data-region]"))
    button.addEventListener("click", () => showRegion(Number(button.dataset.region)));
  window.addEventListener("resize", () => { if (!unprinted) fitted ? fit(...fitted) : moved(); });
  window.addEventListener("beforeprint", toPaper);
  window.addEventListener("afterprint", toScreen);
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

// A view can be linked to: report.html#layer=probability&opacity=60&threshold=0.4&mask=1&grey=0&region=2
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name, least, most) => {
    const value = parseFloat(wanted.get(name));
    return Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : null;
  };
  if (["none", ...Object.keys(data.layers)].includes(wanted.get("layer"))) state.layer = wanted.get("layer");
  state.opacity = (number("opacity", 0, 100) ?? 100 * data.opacity) / 100;
  state.threshold = snapped(number("threshold", 0, 1) ?? data.threshold);
  state.mask = judged && wanted.get("mask") === "1";
  state.grey = wanted.get("grey") !== "0";
  const region = number("region", 1, data.regions.length);
  return data.regions.length && region ? data.regions[Math.floor(region) - 1].box : null;
}

async function start() {
  // Printed before it is drawn, the page would show an empty frame and full colours.
  byId("notice").textContent = "The picture is being drawn; wait before you print.";
  byId("notice").hidden = false;
  const box = readAddress();
  await Promise.all([...Object.entries(data.layers).map(([name, layer]) => unpack(layer, name)), slide.decode()]);
  if (judged) trace();
  listen();
  update();
  fit(box);
  byId("notice").hidden = true;
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("notice").textContent = `The viewer could not start (${error.message}); a browser from 2023 or later is needed.`;
  byId("notice").hidden = false;
});
