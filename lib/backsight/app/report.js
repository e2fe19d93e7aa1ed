// The page without this script shows every strip, every figure and every number; with it they can be played with.
(() => {
  "use strict";
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  // ------------------------------------------------------------------------------------------------- the player
  const player = one("#player");
  if (player) {
    const SECONDS_A_LAYER = 0.8;
    const GAIN = Number(player.dataset.gain); // of the difference, the same for every picture and depth
    const strips = all(".strip");
    const slider = one("#depth");
    const play = one("#play-button");
    const input = one("#shown-input");
    const shown = one("#shown");
    const difference = one("#difference");
    const chosen = (name) => one(`input[name="${name}"]:checked`, player);
    let timer = 0;
    let strip = null;
    let drawing = 0; // the number of the newest picture: one that is decoded late must not overtake it

    const find = (picture, target, family) => strips.find((each) =>
      each.dataset.picture === picture && each.dataset.target === target && each.dataset.family === family);

    function choose(changed) {
      const [picture, target, family] = ["picture", "target", "family"].map((name) => chosen(name).value);
      let next = find(picture, target, family);
      // What was chosen last stays; the rest gives way where this combination was not saved.
      next ||= strips.find((each) => each.dataset.picture === picture && each.dataset.target === target)
        || strips.find((each) => each.dataset[changed] === chosen(changed).value);
      strip = next;
      for (const each of strips) each.classList.toggle("chosen", each === strip);
      for (const name of ["picture", "target", "family"]) {
        for (const radio of all(`input[name="${name}"]`, player)) radio.checked = radio.value === strip.dataset[name];
      }
      for (const radio of all('input[name="family"]', player)) {
        radio.disabled = !find(strip.dataset.picture, strip.dataset.target, radio.value);
      }
      slider.max = all("button", strip).length - 1;
      one("#shows").textContent = chosen("picture").dataset.shows;
      const given = one(".given img", strip);
      for (const picture of [input, shown]) picture.classList.toggle("pixelated", given.classList.contains("pixelated"));
      difference.classList.toggle("pixelated", given.classList.contains("pixelated"));
      input.src = given.src;
      input.alt = given.alt;
      show();
    }

    async function show() {
      const steps = all("button", strip);
      const at = Math.min(Number(slider.value), steps.length - 1);
      const step = steps[at];
      for (const each of steps) each.removeAttribute("aria-current");
      step.setAttribute("aria-current", "true");
      const { tap, psnr, ssim } = step.dataset;
      slider.setAttribute("aria-valuetext", `${tap}, layer ${at + 1} of ${steps.length}, PSNR ${psnr} dB`);
      one("#depth-name").textContent = tap;
      one("#depth-count").textContent = `, ${at + 1} of ${steps.length}`;
      one("#frame-psnr").textContent = psnr;
      one("#frame-ssim").textContent = ssim;
      const picture = one("img", step);
      shown.src = picture.src;
      shown.alt = picture.alt;
      one("#shown-tap").textContent = tap;
      difference.setAttribute("aria-label", `Absolute difference of the input and the reconstruction from ${tap}, ${GAIN} times`);
      scrollIntoStrip(step);
      const mine = ++drawing;
      await Promise.all([input.decode(), shown.decode()]).catch(() => {});
      if (mine === drawing) draw();
    }

    // scrollIntoView would also scroll the page.
    function scrollIntoStrip(step) {
      const list = step.closest("ol");
      const box = step.getBoundingClientRect();
      const frame = list.getBoundingClientRect();
      if (box.left < frame.left) list.scrollLeft -= frame.left - box.left;
      if (box.right > frame.right) list.scrollLeft += box.right - frame.right;
    }

    function pixels(picture, width, height) {
      const canvas = Object.assign(document.createElement("canvas"), { width, height });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0, width, height);
      return context.getImageData(0, 0, width, height);
    }

    function draw() {
      const [width, height] = [input.naturalWidth, input.naturalHeight];
      if (!width) return;
      const before = pixels(input, width, height);
      const after = pixels(shown, width, height).data;
      for (let i = 0; i < after.length; i += 1) {
        before.data[i] = i % 4 === 3 ? 255 : Math.min(255, GAIN * Math.abs(before.data[i] - after[i]));
      }
      difference.width = width;
      difference.height = height;
      difference.getContext("2d").putImageData(before, 0, 0);
      difference.dataset.tap = one("#shown-tap").textContent;
    }

    const playing = () => timer !== 0;
    function label() {
      play.textContent = calm.matches ? "Next layer" : playing() ? "Pause" : "Play";
    }
    function stop() {
      clearInterval(timer);
      timer = 0;
      label();
    }
    function forward() {
      const last = Number(slider.max);
      if (playing() && Number(slider.value) >= last) return stop();
      slider.value = Number(slider.value) >= last ? 0 : Number(slider.value) + 1;
      show();
    }
    play.addEventListener("click", () => {
      if (calm.matches) return forward(); // nothing moves by itself for those who ask for that
      if (playing()) return stop();
      if (slider.value === slider.max) slider.value = 0;
      show();
      timer = setInterval(forward, 1000 * SECONDS_A_LAYER);
      label();
    });
    calm.addEventListener("change", stop);
    slider.addEventListener("input", () => { stop(); show(); });
    for (const radio of all('input[type="radio"]', player)) radio.addEventListener("change", () => choose(radio.name));
    for (const each of strips) {
      all("button", each).forEach((button, at) => button.addEventListener("click", () => {
        stop();
        slider.value = at;
        show();
      }));
    }
    for (const thumb of all(".thumbs img", player)) {
      const picture = thumb.previousElementSibling.value;
      const given = one(".given img", strips.find((each) => each.dataset.picture === picture));
      thumb.src = given.src;
      thumb.classList.toggle("pixelated", given.classList.contains("pixelated"));
    }
    player.hidden = false;
    slider.value = 0;
    choose("picture");
    label();
  }

  // ------------------------------------------------------------------------------------------ figures, enlarged
  const enlarged = one("#enlarged");
  const papers = all(".paper");
  if (enlarged && typeof enlarged.showModal === "function") {
    let at = 0;
    function turn(to) {
      at = (to + papers.length) % papers.length;
      const small = one("img", papers[at]);
      const large = one("img", enlarged);
      large.src = small.src;
      large.alt = small.alt;
      large.width = small.getAttribute("width");
      large.height = small.getAttribute("height");
      const caption = one("figcaption", papers[at].closest("figure"));
      one("#enlarged-caption").textContent = caption ? one("span", caption).textContent : "";
      one(".count", enlarged).textContent = `Figure ${at + 1} of ${papers.length}`;
      const file = one("#enlarged-file");
      file.hidden = !papers[at].hasAttribute("href");
      file.href = papers[at].getAttribute("href") || "#";
    }
    papers.forEach((paper, place) => paper.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab, as with every link
      event.preventDefault();
      turn(place);
      enlarged.showModal();
    }));
    one("#previous").addEventListener("click", () => turn(at - 1));
    one("#next").addEventListener("click", () => turn(at + 1));
    one("#close").addEventListener("click", () => enlarged.close());
    enlarged.addEventListener("click", (event) => { if (event.target === enlarged) enlarged.close(); });
    enlarged.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") turn(at - 1);
      if (event.key === "ArrowRight") turn(at + 1);
    });
    // The one that was open last, which need not be the one that opened it.
    enlarged.addEventListener("close", () => {
      const inside = papers[at].closest("details:not([open])");
      if (inside) inside.open = true;
      papers[at].focus();
    });
  }

  // --------------------------------------------------------------------------------------------------- contents
  const links = new Map(all(".contents a").map((link) => [link.hash.slice(1), link]));
  const marks = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
  let waiting = false;
  function mark() {
    waiting = false;
    const line = innerHeight * 0.3;
    const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
    const above = marks.filter((each) => each.getBoundingClientRect().top <= line);
    const here = atEnd ? marks.at(-1) : above.at(-1) || marks[0];
    for (const [id, link] of links) {
      const current = Boolean(here) && id === here.id;
      if (current === link.hasAttribute("aria-current")) continue;
      if (!current) { link.removeAttribute("aria-current"); continue; }
      link.setAttribute("aria-current", "location");
      const list = link.closest(".contents > ol");
      if (list.scrollWidth > list.clientWidth) list.scrollLeft = link.offsetLeft - list.clientWidth / 3;
    }
  }
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(mark); } };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", later);
  if (marks.length) mark();
})();
