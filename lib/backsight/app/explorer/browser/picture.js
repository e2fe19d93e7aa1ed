// One picture, enlarged, with patches that can be chosen and boxes that can be clicked.
const MARKS = { erased: "erased", shuffled: "shuffled", swapped: "swapped" };
const SVG = "http://www.w3.org/2000/svg";

function made(name, attributes = {}, parent = null) {
  const element = name.startsWith("svg:")
    ? document.createElementNS(SVG, name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function render({ model, el }) {
  const figure = made("figure", { class: "backsight-picture" }, el);
  const title = made("div", { class: "backsight-picture-title" }, figure);
  const frame = made("div", { class: "backsight-frame" }, figure);
  const image = made("img", { draggable: "false" }, frame);
  const overlay = made("svg:svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none" }, frame);
  const patches = made("svg:g", {}, overlay);
  const boxes = made("svg:g", {}, overlay);
  const cursor = made("svg:rect", { class: "backsight-cursor" }, overlay);
  const said = made("div", { class: "backsight-unseen", "aria-live": "polite" }, frame);
  const labels = made("div", { class: "backsight-labels" }, frame);
  const caption = made("figcaption", {}, figure);
  let address = null;
  let at = 0;

  function showImage() {
    const bytes = model.get("png");
    if (!bytes || !bytes.byteLength) return;
    const next = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    image.src = next;
    if (address) URL.revokeObjectURL(address);
    address = next;
    // What tests and benchmarks wait for: a new picture is in the page.
    image.dataset.version = String(Number(image.dataset.version || 0) + 1);
  }

  function showWords() {
    title.textContent = model.get("title");
    caption.textContent = model.get("caption");
    image.alt = model.get("alt");
  }

  const size = () => [model.get("rows"), model.get("columns")];
  const chosen = () => new Set(model.get("marks")[model.get("mode")] || []);

  function rectangle(cell) {
    const [rows, columns] = size();
    const column = cell % columns;
    const row = Math.floor(cell / columns);
    return { x: column / columns, y: row / rows, width: 1 / columns, height: 1 / rows };
  }

  function showPatches() {
    patches.replaceChildren();
    const [rows] = size();
    overlay.classList.toggle("backsight-clickable", rows > 0);
    if (rows > 0) {
      overlay.setAttribute("tabindex", "0");
      overlay.setAttribute("role", "application");
      overlay.setAttribute(
        "aria-label",
        `Patches of the picture: arrow keys move, Enter or Space to have the patch ${model.get("mode")}`,
      );
    } else {
      overlay.removeAttribute("tabindex");
      overlay.setAttribute("role", "presentation");
    }
    for (const [name, style] of Object.entries(MARKS)) {
      for (const cell of model.get("marks")[name] || []) {
        const mark = made("svg:rect", { ...rectangle(cell), class: `backsight-mark backsight-${style}` }, patches);
        mark.dataset.cell = String(cell);
      }
    }
    for (const [key, value] of Object.entries(rows > 0 ? rectangle(Math.min(at, rows * size()[1] - 1)) : {})) {
      cursor.setAttribute(key, value);
    }
  }

  function showBoxes() {
    boxes.replaceChildren();
    labels.replaceChildren();
    for (const box of model.get("boxes")) {
      const left = Math.max(0, box.x - box.w / 2);
      const top = Math.max(0, box.y - box.h / 2);
      const width = Math.min(1, box.x + box.w / 2) - left;
      const height = Math.min(1, box.y + box.h / 2) - top;
      const place = { x: left, y: top, width, height };
      made("svg:rect", { ...place, class: "backsight-halo" }, boxes);
      made("svg:rect", { ...place, class: box.removed ? "backsight-box backsight-removed" : "backsight-box" }, boxes);
      const clickable = model.get("queries");
      const label = made(clickable ? "button" : "span", { class: "backsight-label" }, labels);
      label.style.left = `${100 * left}%`;
      label.style.top = `${100 * top}%`;
      label.textContent = box.label;
      label.title = box.says;
      if (clickable) {
        label.setAttribute("type", "button");
        label.setAttribute("aria-pressed", String(Boolean(box.removed)));
        label.setAttribute("aria-label", `${box.says}: remove this object query`);
        label.dataset.query = String(box.query);
        label.addEventListener("click", () => model.send({ kind: "query", query: box.query }));
      }
    }
  }

  function cellAt(event) {
    const [rows, columns] = size();
    const area = overlay.getBoundingClientRect();
    const column = Math.floor(((event.clientX - area.left) / area.width) * columns);
    const row = Math.floor(((event.clientY - area.top) / area.height) * rows);
    if (row < 0 || column < 0 || row >= rows || column >= columns) return null;
    return row * columns + column;
  }

  function set(cell, on) {
    model.send({ kind: "patch", patch: cell, on });
    at = cell;
  }

  let painting = null;
  overlay.addEventListener("pointerdown", (event) => {
    const cell = size()[0] > 0 ? cellAt(event) : null;
    if (cell === null) return;
    painting = { on: !chosen().has(cell), done: new Set([cell]) };
    overlay.setPointerCapture(event.pointerId);
    set(cell, painting.on);
  });
  overlay.addEventListener("pointermove", (event) => {
    const cell = painting ? cellAt(event) : null;
    if (cell === null || painting.done.has(cell)) return;
    painting.done.add(cell);
    set(cell, painting.on);
  });
  for (const end of ["pointerup", "pointercancel"]) overlay.addEventListener(end, () => (painting = null));

  overlay.addEventListener("keydown", (event) => {
    const [rows, columns] = size();
    if (!rows) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key in steps) {
      const next = at + steps[event.key];
      const sameRow = Math.floor(next / columns) === Math.floor(at / columns);
      if (next >= 0 && next < rows * columns && (sameRow || Math.abs(steps[event.key]) > 1)) at = next;
      said.textContent = `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
      showPatches();
    } else if (event.key === "Enter" || event.key === " ") {
      set(at, !chosen().has(at));
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });

  showImage();
  showWords();
  showPatches();
  showBoxes();
  model.on("change:png", showImage);
  for (const name of ["title", "caption", "alt"]) model.on(`change:${name}`, showWords);
  for (const name of ["marks", "rows", "columns", "mode"]) model.on(`change:${name}`, showPatches);
  for (const name of ["boxes", "queries"]) model.on(`change:${name}`, showBoxes);
  return () => address && URL.revokeObjectURL(address);
}

export default { render };
