// One picture, enlarged, with patches that can be chosen and boxes that can be clicked.
const SVG = "http://www.w3.org/2000/svg";

function render({ model, el }) {
  el.innerHTML = `<figure class="backsight-picture">
    <div class="backsight-picture-title"></div>
    <div class="backsight-frame"><img draggable="false">
      <svg viewBox="0 0 1 1" preserveAspectRatio="none"><g></g><rect class="backsight-cursor"/></svg>
      <div class="backsight-unseen" aria-live="polite"></div><div class="backsight-labels"></div></div>
    <figcaption></figcaption></figure>`;
  const find = (selector) => el.querySelector(selector);
  const [image, overlay, marks, cursor] = ["img", "svg", "g", ".backsight-cursor"].map(find);
  const labels = find(".backsight-labels");
  let at = 0; // the patch under the keyboard's cursor

  function showImage() {
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    // What tests and benchmarks wait for: a new picture is in the page.
    image.dataset.version = String(Number(image.dataset.version || 0) + 1);
  }

  const shown = () => ({ boxes: [], grid: [0, 0], view: null, ...model.get("shown") });
  const rows = () => shown().grid[0];
  const columns = () => shown().grid[1];
  const count = () => rows() * columns();
  const rectangle = (cell) => {
    const [high, wide] = [1 / rows(), 1 / columns()];
    return { x: (cell % columns()) * wide, y: Math.floor(cell / columns()) * high, width: wide, height: high };
  };
  const place = (element, attributes) => {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const draw = (style, attributes) => {
    marks.append(place(document.createElementNS(SVG, "rect"), { class: `backsight-${style}`, ...attributes }));
  };

  function show() {
    const { title, caption, alt, boxes, view } = shown();
    find(".backsight-picture-title").textContent = title;
    find("figcaption").textContent = caption;
    image.alt = alt;
    marks.replaceChildren();
    labels.replaceChildren();
    if (at >= count()) at = 0;
    if (count()) {
      const says = `Patches of the picture: arrow keys move, Enter or Space to have the patch ${model.get("mode")}`;
      place(overlay, { class: "backsight-clickable", tabindex: 0, role: "application", "aria-label": says });
      place(cursor, rectangle(at));
    }
    for (const style of view ? ["erased", "shuffled", "swapped"] : []) {
      for (const cell of view[style]) draw(`mark backsight-${style}`, { ...rectangle(cell), "data-cell": cell });
    }
    for (const { query, label, x, y, w, h } of boxes) {
      const [left, top] = [Math.max(0, x - w / 2), Math.max(0, y - h / 2)];
      const box = { x: left, y: top, width: Math.min(1, x + w / 2) - left, height: Math.min(1, y + h / 2) - top };
      const removed = view?.removed.includes(query);
      draw("halo", box);
      draw(removed ? "box backsight-removed" : "box", box);
      const button = document.createElement(view ? "button" : "span");
      button.className = "backsight-label";
      button.style.cssText = `left: ${100 * left}%; top: ${100 * top}%`;
      button.textContent = label;
      if (view) {
        place(button, { "aria-pressed": removed, "aria-label": `query ${query}, ${label}: remove this object query` });
        button.addEventListener("click", () => model.send({ kind: "query", query }));
      }
      labels.append(button);
    }
  }

  function cellAt(event) {
    const area = overlay.getBoundingClientRect();
    const column = Math.floor(((event.clientX - area.left) / area.width) * columns());
    const row = Math.floor(((event.clientY - area.top) / area.height) * rows());
    const inside = column >= 0 && column < columns() && row >= 0 && row * columns() < count();
    return inside ? row * columns() + column : null;
  }

  function set(cell, on) {
    at = cell;
    model.send({ kind: "patch", patch: cell, on });
  }

  const chosen = (cell) => shown().view[model.get("mode")].includes(cell);
  let painting = null;
  function paint(event) {
    const cell = count() ? cellAt(event) : null;
    if (cell === null) return;
    if (event.type === "pointerdown") {
      painting = { on: !chosen(cell), done: new Set() };
      overlay.setPointerCapture(event.pointerId);
    }
    if (painting === null || painting.done.has(cell)) return;
    painting.done.add(cell);
    set(cell, painting.on);
  }
  for (const name of ["pointerdown", "pointermove"]) overlay.addEventListener(name, paint);
  for (const name of ["pointerup", "pointercancel"]) overlay.addEventListener(name, () => (painting = null));

  overlay.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    if (event.key in steps) {
      const next = at + steps[event.key];
      if (next >= 0 && next < count()) at = next;
      find(".backsight-unseen").textContent = `row ${Math.floor(at / columns()) + 1}, column ${(at % columns()) + 1}`;
      place(cursor, rectangle(at));
    } else if (event.key === "Enter" || event.key === " ") {
      set(at, !chosen(at));
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });

  model.on("change:png", showImage);
  model.on("change", show);
  if (model.get("png")?.byteLength) showImage();
  show();
  return () => URL.revokeObjectURL(image.src);
}

export default { render };
