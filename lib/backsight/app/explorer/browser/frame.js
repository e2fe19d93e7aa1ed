// What the page asks of the browser around it: its address, downloads, names of the sliders.
function render({ model, el }) {
  el.classList.add("backsight-unseen");

  // ipywidgets does not say to a screen reader what a slider's handle is for.
  const naming = new MutationObserver(() => {
    for (const slider of document.querySelectorAll(".backsight-page .widget-slider")) {
      const text = slider.querySelector(".widget-label")?.textContent;
      slider.querySelector(".noUi-handle:not([aria-label])")?.setAttribute("aria-label", text);
    }
  });
  naming.observe(document.body, { childList: true, subtree: true });

  function follow() {
    // Alone, the address follows the view, without the token, nor an entry in the history for each step of a slider.
    if (document.body.dataset.voila === undefined) return;
    try {
      window.history.replaceState(null, "", `?${model.get("query")}`);
    } catch {
      // browsers allow only so many in a row; the next change catches up
    }
  }
  follow();
  model.on("change:query", follow);

  model.on("msg:custom", (message, buffers) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "image/png" }));
    link.download = message.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  return () => naming.disconnect();
}

export default { render };
