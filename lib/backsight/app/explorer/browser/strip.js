// All depths at once: one button for each layer, with what comes back from it.
function render({ model, el }) {
  const strip = document.createElement("div");
  strip.className = "backsight-strip";
  strip.setAttribute("role", "group");
  el.append(strip);

  function show() {
    const depths = model.get("depths");
    strip.setAttribute("aria-label", model.get("label"));
    // Buttons are kept where they can be, so that the keyboard's focus stays where it is.
    while (strip.children.length > depths.length) strip.lastChild.remove();
    depths.forEach((depth, index) => {
      let button = strip.children[index];
      if (!button) {
        button = document.createElement("button");
        button.type = "button";
        button.append(document.createElement("img"), document.createElement("b"), document.createElement("span"), document.createElement("span"));
        button.addEventListener("click", () => model.send({ kind: "tap", tap: button.dataset.tap }));
        strip.append(button);
      }
      const [image, tap, score, hue] = button.children;
      button.dataset.tap = depth.tap;
      button.title = depth.tap;
      if (image.src !== depth.png) image.src = depth.png;
      image.alt = "";
      tap.replaceChildren(...depth.tap.split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]));
      score.textContent = depth.score;
      hue.textContent = depth.hue;
      button.setAttribute("aria-label", `${depth.tap}: ${depth.score}, ${depth.hue}`);
      button.setAttribute("aria-pressed", String(depth.tap === model.get("chosen")));
    });
  }

  show();
  for (const name of ["depths", "chosen", "label"]) model.on(`change:${name}`, show);
}

export default { render };
