const data = JSON.parse(document.getElementById("data").textContent);
const element = id => document.getElementById(id);
const dense = data.labels[0];

function media(entry, text) {
  const node = document.createElement(entry.video ? "video" : "img");
  if (entry.video) {
    Object.assign(node, { muted: true, loop: true, playsInline: true });
    node.setAttribute("aria-label", text);
  } else {
    node.alt = text;
  }
  node.src = entry.src;
  return node;
}

function words(item, label) { return label + ": " + item.prompt + ", seed " + item.seed; }

function option(select, value, text) {
  const node = document.createElement("option");
  Object.assign(node, { value, textContent: text });
  select.append(node);
}

data.items.forEach((item, i) => option(element("item"), i, (i + 1) + ". " + item.prompt + " (seed " + item.seed + ")"));
data.labels.slice(1).forEach(label => option(element("variant"), label, label));

function cut() {
  const share = element("slider").value;
  const over = document.querySelector("#stage .over"), edge = document.querySelector("#stage .edge");
  if (over) over.style.clipPath = "inset(0 " + (100 - share) + "% 0 0)";
  if (edge) edge.style.left = share + "%";
}

function show() {
  const item = data.items[element("item").value], label = element("variant").value, stage = element("stage");
  stage.replaceChildren();
  element("other").textContent = label;
  if (!item) return;
  const below = item.files[label], above = item.files[dense];
  if (!below || !above) { stage.textContent = "This item was not made by both."; return; }
  const under = media(below, words(item, label)), over = media(above, words(item, dense));
  over.classList.add("over");
  const edge = document.createElement("div");
  edge.className = "edge";
  stage.append(under, over, edge);
  element("play").hidden = !below.video;
  cut();
  run(true);
}

function run(on) {  // all videos; a browser may refuse to start them without a click
  element("play").textContent = on ? "pause" : "play";
  for (const video of document.querySelectorAll("video")) {
    if (on) video.play().catch(() => { element("play").textContent = "play"; });
    else video.pause();
  }
}

function together() {  // videos of one item keep the time of the first
  for (const group of document.querySelectorAll(".stage, .row")) {
    const videos = [...group.querySelectorAll("video")];
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - videos[0].currentTime) > 0.08) video.currentTime = videos[0].currentTime;
    }
  }
}

element("slider").addEventListener("input", cut);
element("item").addEventListener("change", show);
element("variant").addEventListener("change", show);
element("play").addEventListener("click", event => run(event.target.textContent === "play"));

for (const item of data.items) {
  const box = document.createElement("section"), text = document.createElement("p"), row = document.createElement("div");
  box.className = "item";
  row.className = "row";
  text.textContent = item.prompt + " (seed " + item.seed + ")";
  for (const label of data.labels) {
    const entry = item.files[label];
    if (!entry) continue;
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const node = media(entry, words(item, label));
    node.loading = "lazy";
    caption.textContent = label + (!entry.judged ? "" : entry.wrong.length ? ": wrong " + entry.wrong.join(", ") : ": right");
    figure.append(node, caption);
    row.append(figure);
  }
  box.append(text, row);
  element("items").append(box);
}
show();  // after the items: it starts every video
setInterval(together, 500);
