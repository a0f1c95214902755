const data = JSON.parse(document.getElementById("data").textContent);
const element = id => document.getElementById(id);
const dense = data.variants[0], methods = data.variants.slice(1);  // best first
const MOST = 8;  // methods next to the slider; the select has all of them

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function media(entry, text) {
  if (!entry.video) return make("img", { alt: text, src: entry.src });
  const node = make("video", { muted: true, loop: true, playsInline: true, src: entry.src });
  node.setAttribute("aria-label", text);
  return node;
}

function label(variant) {  // a chunk is never broken
  const parts = variant.chunks.flatMap(chunk => [
    chunk.startsWith(" ") ? " " : "", make("span", { textContent: chunk.trim() })]);
  return make("span", { className: "label" }, ...parts);
}

function words(item, variant) { return variant.label + ": " + item.prompt + ", seed " + item.seed; }

function figure(item, variant) {
  const entry = item.files[variant.label], caption = make("figcaption", {}, label(variant));
  if (entry.judged) {
    const text = entry.wrong.length ? "wrong " + entry.wrong.join(", ") : "right";
    caption.append(make("small", { textContent: text, className: entry.wrong.length ? "wrong" : "" }));
  }
  return make("figure", {}, media(entry, words(item, variant)), caption);
}

function option(select, value, text) { select.append(make("option", { value, textContent: text })); }

data.items.forEach((item, i) => option(element("item"), i, (i + 1) + ". " + item.prompt + " (seed " + item.seed + ")"));
methods.forEach((variant, i) => option(element("variant"), i, variant.label));

function cut() {
  const share = element("slider").value;
  const over = document.querySelector("#stage .over"), edge = document.querySelector("#stage .edge");
  if (over) over.style.clipPath = "inset(0 " + (100 - share) + "% 0 0)";
  if (edge) edge.style.left = share + "%";
}

function show() {
  const item = data.items[element("item").value], variant = methods[element("variant").value], stage = element("stage");
  stage.replaceChildren();
  element("row").replaceChildren();
  element("other").textContent = variant ? variant.label : "";
  if (!item || !variant) return;
  neighbors(item);
  const below = item.files[variant.label], above = item.files[dense.label];
  if (!below || !above) { stage.textContent = "This item was not made by both."; run(true); return; }
  const over = media(above, words(item, dense));
  over.classList.add("over");
  stage.append(media(below, words(item, variant)), over, make("div", { className: "edge" }));
  element("play").hidden = !below.video;
  cut();
  run(true);
}

function neighbors(item) {  // dense and the best methods; a click puts one under the slider
  for (const variant of [dense, ...methods.slice(0, MOST)]) {
    if (!item.files[variant.label]) continue;
    const node = figure(item, variant), place = methods.indexOf(variant);
    if (place < 0) { element("row").append(node); continue; }
    const button = make("button", { type: "button", title: "compare dense with " + variant.label }, node);
    button.setAttribute("aria-pressed", String(place === Number(element("variant").value)));
    button.addEventListener("click", () => { element("variant").value = place; show(); });
    element("row").append(button);
  }
}

function run(on) {  // all videos; a browser may refuse to start them without a click
  element("play").textContent = on ? "pause" : "play";
  for (const video of document.querySelectorAll("video")) {
    if (on) video.play().catch(() => { element("play").textContent = "play"; });
    else video.pause();
  }
}

function together() {  // videos of one item keep the time of the first
  for (const group of document.querySelectorAll(".pair, .item")) {
    const videos = [...group.querySelectorAll("video")];
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - videos[0].currentTime) > 0.08) video.currentTime = videos[0].currentTime;
    }
  }
}

function list() {  // all items, made when they are first looked at
  if (element("items").childElementCount) return;
  for (const item of data.items) {
    const row = make("div", { className: "row" });
    for (const variant of data.variants) if (item.files[variant.label]) row.append(figure(item, variant));
    const text = make("p", { textContent: item.prompt + " (seed " + item.seed + ")" });
    element("items").append(make("section", { className: "item" }, text, row));
  }
  run(element("play").textContent === "pause");
}

element("slider").addEventListener("input", cut);
element("item").addEventListener("change", show);
element("variant").addEventListener("change", show);
element("play").addEventListener("click", event => run(event.target.textContent === "play"));
element("all").addEventListener("toggle", list);
show();
setInterval(together, 500);
