// What the page asks of the browser around it: its address, downloads, the clipboard, names of the sliders.
const MARKER = "explorer?"; // in Lab the view stands behind # in the address

function inVoila() {
  return document.body.dataset.voila !== undefined;
}

function address(query) {
  const place = new URL(window.location.href);
  if (inVoila()) {
    place.search = query;
    place.hash = "";
  } else {
    place.hash = query ? MARKER + query : "";
  }
  return place.href;
}

function said() {
  if (inVoila()) return window.location.search.slice(1);
  const hash = window.location.hash.slice(1);
  return hash.startsWith(MARKER) ? hash.slice(MARKER.length) : "";
}

function render({ model, el }) {
  el.classList.add("backsight-unseen");
  const root = () => document.querySelectorAll(".backsight-page");

  // ipywidgets does not say to a screen reader what a slider's handle is for.
  const naming = new MutationObserver(() => {
    for (const page of root()) {
      for (const slider of page.querySelectorAll(".widget-slider")) {
        const text = slider.querySelector(".widget-label")?.textContent;
        const handle = slider.querySelector(".noUi-handle");
        const readout = slider.querySelector(".widget-readout")?.textContent;
        if (handle && text && handle.getAttribute("aria-label") !== text) handle.setAttribute("aria-label", text);
        if (handle && readout && handle.getAttribute("aria-valuetext") !== readout) {
          handle.setAttribute("aria-valuetext", readout);
        }
      }
    }
  });
  naming.observe(document.body, { childList: true, subtree: true, characterData: true });

  if (!model.get("started")) {
    model.set("started", true);
    model.save_changes();
    if (said()) model.send({ kind: "opened", query: said() });
  }

  model.on("change:query", () => {
    // The address follows quietly: no entry in the history for each step of a slider.
    try {
      window.history.replaceState(window.history.state, "", address(model.get("query")));
    } catch {
      // browsers allow only so many in a row; the next change catches up
    }
  });

  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "download") {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "image/png" }));
      link.download = message.name;
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    } else if (message.kind === "copy") {
      const text = message.link ? address(message.text) : message.text;
      navigator.clipboard.writeText(text).then(
        () => model.send({ kind: "copied", text: `Copied: ${message.what}.` }),
        () => model.send({ kind: "copied", text: `The browser does not let the page copy; it is ${text}` }),
      );
    }
  });
  return () => naming.disconnect();
}

export default { render };
