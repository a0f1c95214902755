"use strict";
const cell = document.getElementById("cell");

function say(map, x, y) {
  const rows = JSON.parse(map.dataset.rows), columns = JSON.parse(map.dataset.columns);
  x = Math.min(Math.max(x, 0), columns.length - 1);
  y = Math.min(Math.max(y, 0), rows.length - 1);
  const value = JSON.parse(map.dataset.values)[y][x];
  const title = map.closest("figure").querySelector("figcaption").textContent;
  cell.textContent = title + ", " + rows[y] + ", " + columns[x] + ": " + (value === null ? "no value" : value);
  map.dataset.at = JSON.stringify([x, y]);
}

function point(event) {
  const map = event.currentTarget, box = map.getBoundingClientRect(), size = map.viewBox.baseVal;
  say(map, Math.floor((event.clientX - box.left) / box.width * size.width),
      Math.floor((event.clientY - box.top) / box.height * size.height));
}

const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
for (const map of document.querySelectorAll(".map svg")) {
  map.setAttribute("tabindex", "0");
  map.addEventListener("pointermove", point);
  map.addEventListener("click", point);
  map.addEventListener("focus", () => { if (!map.dataset.at) say(map, 0, 0); });
  map.addEventListener("keydown", event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = JSON.parse(map.dataset.at || "[0,0]");
    say(map, x + move[0], y + move[1]);
  });
}
