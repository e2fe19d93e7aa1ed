// All depths at once: one button for each layer, with what comes back from it.
function render({ model, el }) {
  const strip = document.createElement("div");
  strip.className = "backsight-strip";
  strip.setAttribute("role", "group");
  strip.setAttribute("aria-label", "All depths");
  el.append(strip);

  function show() {
    const depths = model.get("depths");
    // Buttons are kept where they can be, so that the keyboard's focus stays where it is.
    while (strip.children.length > depths.length) strip.lastChild.remove();
    depths.forEach((depth, index) => {
      let button = strip.children[index];
      if (!button) {
        button = document.createElement("button");
        button.innerHTML = '<img alt=""><b></b><span></span>';
        button.addEventListener("click", () => {
          model.set("chosen", button.dataset.tap);
          model.save_changes();
        });
        strip.append(button);
      }
      const [image, tap, text] = button.children;
      button.dataset.tap = button.title = depth.tap;
      image.src = depth.png;
      tap.replaceChildren(...depth.tap.split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]));
      text.textContent = depth.text;
      button.setAttribute("aria-pressed", String(depth.tap === model.get("chosen")));
    });
  }

  show();
  model.on("change", show);
}

export default { render };
