"use strict";
// Folded parts are printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));

// A confusion matrix of many classes: the cell under the pointer, or under the arrow keys, says what it is.
const live = JSON.parse(document.getElementById("live").textContent);
for (const figure of document.querySelectorAll("[data-live]")) {
  const { classes, cells } = live[Number(figure.dataset.live)];
  const size = classes.length;
  const counts = new Map(cells.map(([row, column, count]) => [row * size + column, count]));
  const frame = figure.querySelector(".frame");
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector("output");
  let row = 0;
  let column = 0;

  const show = (newRow, newColumn) => {
    row = Math.min(Math.max(newRow, 0), size - 1);
    column = Math.min(Math.max(newColumn, 0), size - 1);
    const count = counts.get(row * size + column) ?? 0;
    output.textContent = `${classes[row]} named ${classes[column]}: ${count.toLocaleString("en")}`;
    cursor.hidden = false;
    cursor.style.cssText = `left: ${(100 * column) / size}%; top: ${(100 * row) / size}%; width: ${100 / size}%; height: ${100 / size}%`;
  };
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    show(
      Math.floor(((event.clientY - box.top) / box.height) * size),
      Math.floor(((event.clientX - box.left) / box.width) * size),
    );
  });
  figure.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (move) {
      event.preventDefault();
      show(row + move[0], column + move[1]);
    }
  });
}
